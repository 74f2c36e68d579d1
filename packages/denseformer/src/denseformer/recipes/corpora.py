"""The paper's corpora, OpenWebText2 and PG-19, as files of uint16 tokens; downloads of tens of gigabytes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import urllib.parse
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor

from denseformer.recipes.data import Corpus, default_dir

OPENWEBTEXT2 = (
    "https://huggingface.co/datasets/segyges/OpenWebText2/resolve/main/openwebtext2.jsonl.zst.tar"
)
PG19 = "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o"
END = 50256
"""The end-of-text token of GPT-2's vocabulary, appended to every document."""
Encode = Callable[[str], list[int]]
TOKENISED = ("openwebtext2", "pg19")
VOCABULARY = 50304
"""GPT-2's 50,257 tokens, padded as in the published models."""


def gpt2_encoder() -> Encode:
    """Return GPT-2's byte-pair encoding of ordinary text, by tiktoken.

    Raises:
        ImportError: tiktoken is missing (``pip install "denseformer[data]"``).
    """
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(
            'the tokenizer needs tiktoken: pip install "denseformer[data]"'
        ) from error
    encode: Encode = tiktoken.get_encoding("gpt2").encode_ordinary
    return encode


def write_tokens(documents: Iterable[str], path: Path, encode: Encode, end: int = END) -> int:
    """Write the documents' tokens, each followed by ``end``, as little-endian uint16; return their number.

    The file is written under a temporary name and renamed.

    Raises:
        ValueError: a token does not fit 16 bits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    count = 0
    try:
        with os.fdopen(handle, "wb") as target:
            for document in documents:
                ids = [*encode(document), end]
                if max(ids) >= 1 << 16 or min(ids) < 0:
                    raise ValueError(f"token {max(ids)} does not fit 16 bits")
                words = array("H", ids)
                if sys.byteorder == "big":
                    words.byteswap()
                target.write(words.tobytes())
                count += len(ids)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


def read_tokens(path: str | Path) -> Tensor:
    """Return a token file as a memory-mapped int16 tensor; ``tokens(t)`` makes a part of it int64.

    Raises:
        ValueError: the size is odd.
    """
    size = Path(path).stat().st_size
    if size % 2:
        raise ValueError(f"{path} has {size} bytes, which is no whole number of 16-bit tokens")
    if not size:
        return torch.empty(0, dtype=torch.int16)
    return torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.int16)


def tokens(part: Tensor) -> Tensor:
    """Return int16 storage as the unsigned numbers that it holds, int64; int64 as it is.

    >>> tokens(torch.tensor([5, -15280], dtype=torch.int16)).tolist()
    [5, 50256]
    """
    return part if part.dtype == torch.long else part.long() & 0xFFFF


def split_rows(count: int, *, test_size: float = 0.0005, seed: int = 2357) -> list[bool]:
    """Return, for each document, whether the authors' split puts it into validation.

    It is ``train_test_split(test_size, seed, shuffle=True)`` of Hugging Face datasets: the first rows of a
    NumPy permutation.

    Raises:
        ImportError: NumPy is missing (``pip install "denseformer[data]"``).
    """
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError('the split needs NumPy: pip install "denseformer[data]"') from error
    held = -(-round(test_size * 1e9) * count // 10**9)
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())
    return [row in chosen for row in range(count)]


def openwebtext2_documents(archive: str | Path) -> Iterator[str]:
    """Yield the texts of ``openwebtext2.jsonl.zst.tar`` in order, streaming.

    Raises:
        ImportError: zstandard is missing (``pip install "denseformer[data]"``).
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            'OpenWebText2 needs zstandard: pip install "denseformer[data]"'
        ) from error
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name.endswith(".jsonl.zst") else None
            if stream is None:
                continue
            with zstandard.ZstdDecompressor().stream_reader(stream) as raw:
                for line in io.TextIOWrapper(raw, encoding="utf-8"):
                    yield json.loads(line)["text"]


def openwebtext2(
    data_dir: str | Path | None = None, encode: Encode | None = None
) -> tuple[Path, Path]:
    """Return the token files of training and validation, made from the archive if they are not there.

    Args:
        data_dir: where archive and token files lie; None is the user's cache. The archive (29 GB) is
            downloaded if it is missing, and its SHA-256 is noted beside it and compared from then on.
        encode: tokenizer; None is :func:`gpt2_encoder`.
    """
    folder = Path(data_dir) if data_dir is not None else default_dir()
    train, validation = folder / "openwebtext2-train.bin", folder / "openwebtext2-validation.bin"
    if train.exists() and validation.exists():
        return train, validation
    archive = fetch(OPENWEBTEXT2, folder / "openwebtext2.jsonl.zst.tar")
    held = split_rows(sum(1 for _ in openwebtext2_documents(archive)))
    encode = encode or gpt2_encoder()
    for path, wanted in ((train, False), (validation, True)):
        texts = zip(openwebtext2_documents(archive), held, strict=True)
        write_tokens((text for text, own in texts if own is wanted), path, encode)
    return train, validation


def pg19(split: str, data_dir: str | Path | None = None, encode: Encode | None = None) -> Path:
    """Return the token file of PG-19's ``"train"``, ``"validation"`` or ``"test"`` books.

    Args:
        split: the folder of the public bucket.
        data_dir: where books and token file lie; None is the user's cache. Missing books are downloaded
            and compared with the MD5 that the bucket lists.
        encode: tokenizer; None is :func:`gpt2_encoder`.

    Raises:
        ValueError: another split, or a book that differs from its checksum.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    folder = (Path(data_dir) if data_dir is not None else default_dir()) / "pg19"
    path = folder / f"pg19-{split}.bin"
    if not path.exists():
        books = [fetch(link, folder / name, md5=md5) for name, link, md5 in _bucket(f"{split}/")]
        texts = (book.read_text(encoding="utf-8") for book in books)
        write_tokens(texts, path, encode or gpt2_encoder())
    return path


def load(name: str, data_dir: str | Path | None = None) -> Corpus:
    """Return ``"openwebtext2"`` or ``"pg19"`` as memory-mapped tokens of GPT-2 (vocabulary 50304).

    ``size`` is that of both token files in bytes, ``sha256`` that of the validation file.

    Raises:
        ValueError: another name, or a file that differs from its checksum.
        OSError: a download failed.
    """
    if name not in TOKENISED:
        raise ValueError(f"name must be one of {', '.join(TOKENISED)}; got {name!r}")
    if name == "openwebtext2":
        train, validation = openwebtext2(data_dir)
    else:
        train, validation = pg19("train", data_dir), pg19("validation", data_dir)
    size = train.stat().st_size + validation.stat().st_size
    digest = hashlib.sha256(validation.read_bytes()).hexdigest()
    return Corpus(name, read_tokens(train), read_tokens(validation), size, digest)


def _bucket(prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, address and MD5 of every object below a prefix, page after page."""
    query = {"prefix": prefix, "fields": "items(name,mediaLink,md5Hash),nextPageToken"}
    while True:
        with urlopen(f"{PG19}?{urllib.parse.urlencode(query)}") as answer:
            page: dict[str, Any] = json.load(answer)
        for item in page.get("items", []):
            yield item["name"], item["mediaLink"], base64.b64decode(item["md5Hash"]).hex()
        if "nextPageToken" not in page:
            return
        query["pageToken"] = page["nextPageToken"]


def fetch(url: str, path: Path, *, md5: str | None = None) -> Path:
    """Return a file, downloaded in pieces under a temporary name if it is missing, and verified.

    Without a known MD5 the SHA-256 of the first download is noted beside the file and compared later.

    Raises:
        ValueError: the file differs from its checksum.
        OSError: the download failed.
    """
    note = path.with_name(path.name + ".sha256")
    if not path.exists():
        print(f"downloading {url} to {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with urlopen(url) as source, os.fdopen(handle, "wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    digest = hashlib.new("md5" if md5 else "sha256", usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    found = digest.hexdigest()
    expected = md5 or (note.read_text().strip() if note.exists() else found)
    if found != expected:
        raise ValueError(
            f"{path} has the checksum {found}, expected {expected}; delete it to load it anew"
        )
    if not md5 and not note.exists():
        note.write_text(found + "\n")
    return path
