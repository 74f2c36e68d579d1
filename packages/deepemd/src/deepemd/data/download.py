"""Fetch files once: resumed after an interruption, verified, renamed only when whole."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from pathlib import Path


def cache_dir(data_dir: str | Path | None = None) -> Path:
    """Return the folder of downloads: the argument, ``$DEEPEMD_DATA_DIR``, or the user's cache folder."""
    if data_dir is not None:
        return Path(data_dir)
    if "DEEPEMD_DATA_DIR" in os.environ:
        return Path(os.environ["DEEPEMD_DATA_DIR"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "deepemd"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deepemd"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepemd"


def md5(path: str | Path) -> str:
    """Return the MD5 of a file, in hexadecimal (for integrity, not security)."""
    digest = hashlib.md5(usedforsecurity=False)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, *, checksum: str | None = None, size: int | None = None) -> None:
    """Raise a ValueError that says what differs, where a file is not the published one."""
    if size is not None and path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, expected {size}; delete it, fetch again"
        )
    if checksum is not None and (found := md5(path)) != checksum:
        raise ValueError(f"{path} has MD5 {found}, expected {checksum}; delete it and fetch again")


def _download(url: str, part: Path, *, progress: bool) -> None:
    """Append what is missing of a URL to a partial file."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        resumed = start and getattr(reply, "status", None) == 206
        done = start if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            while block := reply.read(1 << 20):
                file.write(block)
                done += len(block)
                if progress:
                    print(f"\r{part.name}: {done / 2**20:.0f} MB", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)


def fetch(
    urls: tuple[str, ...],
    path: str | Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    progress: bool = True,
) -> Path:
    """Download a file unless it is there already; the first URL that answers is used.

    Args:
        urls: the source and its mirrors.
        path: where to; a partial download is kept as ``<name>.part`` and resumed.
        checksum: the MD5 to expect.
        size: the bytes to expect.
        progress: say what is downloaded, and how far.

    Raises:
        OSError: no URL answered.
        ValueError: the file is not the expected one.
    """
    path = Path(path)
    if path.exists():
        check_file(path, checksum=checksum, size=size)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        if progress:
            print(f"downloading {url} to {path}", file=sys.stderr)
        try:
            _download(url, part, progress=progress)
            break
        except OSError as error:
            failures.append(f"{url}: {error}")
    else:
        raise OSError("no source answered:\n" + "\n".join(failures))
    try:
        check_file(part, checksum=checksum, size=size)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)
    return path
