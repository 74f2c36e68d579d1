"""Corpora: English text that comes with Python, any text file, and two public files by download."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

URLS = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", None),
}


@dataclass(frozen=True)
class Corpus:
    """Tokens: bytes as int64, or those of a token file (:mod:`denseformer.recipes.corpora`).

    The first 90 % are for training, the last 10 % for validation; of enwik8 the last 5 % are for the test.
    """

    name: str
    train: Tensor
    validation: Tensor
    size: int
    sha256: str
    test: Tensor | None = None

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Training and validation."""
        return self.train, self.validation


def from_bytes(name: str, raw: bytes, *, held: bool = False) -> Corpus:
    """Split bytes into training and validation, 90 to 10; ``held``: and test, 90 to 5 to 5.

    Raises:
        ValueError: fewer than 1,000 bytes.
    """
    if len(raw) < 1000:
        raise ValueError(f"{name} has {len(raw)} bytes; a corpus needs at least 1,000")
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    cut, last = len(raw) * 9 // 10, len(raw) * 19 // 20 if held else len(raw)
    digest, test = hashlib.sha256(raw).hexdigest(), tokens[last:] if held else None
    return Corpus(name, tokens[:cut], tokens[cut:last], len(raw), digest, test)


def pydoc() -> Corpus:
    """Return the English of Python's own manual: ``pydoc_data.topics``, keys sorted, joined by newlines.

    About 0.46 MB; it differs between versions of Python, so the result carries size and SHA-256.
    """
    from pydoc_data.topics import topics

    return from_bytes("pydoc", "\n".join(topics[key] for key in sorted(topics)).encode())


def text_file(path: str | Path) -> Corpus:
    """Return the bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too short.
    """
    return from_bytes(Path(path).name, Path(path).read_bytes())


def default_dir() -> Path:
    """Return the user's cache folder for this package; ``DENSEFORMER_DATA`` overrides it."""
    if found := os.environ.get("DENSEFORMER_DATA"):
        return Path(found)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(base or Path.home() / ".cache") / "denseformer"


def download(name: str, data_dir: str | Path | None = None) -> Corpus:
    """Return ``"tinyshakespeare"`` or ``"enwik8"``, from ``data_dir`` or else from its public address.

    The file is written to a temporary name and renamed. Its SHA-256 is compared with the known one, or with
    the one noted beside it at the first download.

    Raises:
        ValueError: another name, or a file that differs from its checksum.
        OSError: the download failed.
    """
    if name not in URLS:
        raise ValueError(f"name must be one of {', '.join(URLS)}; got {name!r}")
    url, known = URLS[name]
    folder = Path(data_dir) if data_dir is not None else default_dir()
    path, note = folder / Path(url).name, folder / (Path(url).name + ".sha256")
    if not path.exists():
        print(f"downloading {url} to {path}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url) as source:
            raw = source.read()
        _write(path, raw)
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    expected = known or (note.read_text().strip() if note.exists() else found)
    if found != expected:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {expected}; delete it to load it anew"
        )
    if not known and not note.exists():
        _write(note, (found + "\n").encode())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(archive.namelist()[0])
    return from_bytes(name, raw, held=name == "enwik8")


def _write(path: Path, raw: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as target:
        target.write(raw)
    os.replace(temporary, path)
