"""Downloads: cached, resumable, checked by md5, renamed into place."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from pathlib import Path

__all__ = ["cache_dir", "fetch", "md5"]


def cache_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data: the argument, or ``sequel`` in the user's cache folder."""
    if data_dir is not None:
        return Path(data_dir)
    if sys.platform == "win32":  # pragma: no cover - other systems
        base = os.environ.get("LOCALAPPDATA", str(Path.home()))
    elif sys.platform == "darwin":  # pragma: no cover - other systems
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(base) / "sequel"


def md5(path: str | os.PathLike[str]) -> str:
    """Return a file's md5 in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: str | os.PathLike[str], checksum: str, *, quiet: bool = False) -> Path:
    """Return ``path``, downloaded from ``url`` where it is missing.

    A partial download goes on where it stopped. Raises OSError, and removes the file, where its md5
    is not ``checksum``.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        have = part.stat().st_size if part.exists() else 0
        if not quiet:
            print(f"downloading {url} to {path}", file=sys.stderr)
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request) as source:
            append = have > 0 and getattr(source, "status", 200) == 206
            with open(part, "ab" if append else "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        _verify(part, checksum)
        os.replace(part, path)
    else:
        _verify(path, checksum)
    return path


def _verify(path: Path, checksum: str) -> None:
    found = md5(path)
    if found != checksum:
        path.unlink()
        raise OSError(
            f"{path} has md5 {found}, expected {checksum}: the file was removed; try again"
        )
