"""The paper's corpora, on small archives and a bucket that the tests make."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
import zstandard

from denseformer.recipes import corpora


def encode(text: str) -> list[int]:
    return list(text.encode())


def archive(path: Path, parts: list[list[str]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, texts in enumerate(parts):
            lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts)
            raw = zstandard.compress(lines.encode())
            info = tarfile.TarInfo(f"{number}.jsonl.zst")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        tar.addfile(tarfile.TarInfo("README"), io.BytesIO())
    return path


def test_token_files_hold_every_document_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "tokens.bin"
    assert corpora.write_tokens(["ab", "c\nd"], path, encode) == 7
    assert np.fromfile(path, "<u2").tolist() == [97, 98, 50256, 99, 10, 100, 50256]
    assert corpora.tokens(corpora.read_tokens(path)).tolist() == np.fromfile(path, "<u2").tolist()
    with pytest.raises(ValueError, match="does not fit 16 bits"):
        corpora.write_tokens(["x"], path, lambda _: [70_000])
    assert [p.name for p in path.parent.iterdir()] == ["tokens.bin"]
    path.write_bytes(b"")
    assert corpora.read_tokens(path).numel() == 0
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="no whole number"):
        corpora.read_tokens(path)


@pytest.mark.parametrize("count", [1, 10, 1999, 2000, 4001])
def test_split_is_the_first_rows_of_the_seeded_permutation(count: int) -> None:
    held = corpora.split_rows(count)
    number = int(np.ceil(0.0005 * count))
    order = np.random.default_rng(2357).permutation(count)
    assert set(np.flatnonzero(held)) == set(order[:number].tolist())


def test_openwebtext2_is_split_and_tokenised_once(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(30)]
    archive(tmp_path / "openwebtext2.jsonl.zst.tar", [texts[:11], texts[11:]])
    assert list(corpora.openwebtext2_documents(tmp_path / "openwebtext2.jsonl.zst.tar")) == texts
    paths = corpora.openwebtext2(tmp_path, encode)
    held = corpora.split_rows(30)
    for path, wanted in zip(paths, (False, True), strict=True):
        own = [t for t, h in zip(texts, held, strict=True) if h is wanted]
        expected = [token for text in own for token in [*text.encode(), 50256]]
        assert corpora.tokens(corpora.read_tokens(path)).tolist() == expected
    (tmp_path / "openwebtext2.jsonl.zst.tar").unlink()
    assert corpora.openwebtext2(tmp_path, encode) == paths  # nothing is read again


def test_archives_are_compared_with_their_first_checksum(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", [["a"]])
    corpora.fetch("unused", path)
    assert (tmp_path / "x.tar.sha256").read_text().strip() == hashlib.sha256(
        path.read_bytes()
    ).hexdigest()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="delete it to load it anew"):
        corpora.fetch("unused", path)


def test_pg19_walks_the_bucket_and_verifies_every_book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = {f"test/{n}.txt": f"book {n}\n" for n in (3, 7, 12)}
    asked: list[str] = []

    def urlopen(url: str) -> io.BytesIO:
        asked.append(url)
        if not url.startswith(corpora.PG19):
            return io.BytesIO(books[url].encode())
        query = parse_qs(urlsplit(url).query)
        assert query["prefix"] == ["test/"]
        names = sorted(books)
        start = int(query.get("pageToken", ["0"])[0])
        page = {
            "items": [
                {
                    "name": name,
                    "mediaLink": name,
                    "md5Hash": base64.b64encode(
                        hashlib.md5(books[name].encode()).digest()
                    ).decode(),
                }
                for name in names[start : start + 2]
            ]
        }
        if start + 2 < len(names):
            page["nextPageToken"] = str(start + 2)  # type: ignore[assignment]
        return io.BytesIO(json.dumps(page).encode())

    monkeypatch.setattr(corpora, "urlopen", urlopen)
    path = corpora.pg19("test", tmp_path, encode)
    expected = [t for name in sorted(books) for t in [*books[name].encode(), 50256]]
    assert corpora.tokens(corpora.read_tokens(path)).tolist() == expected
    count = len(asked)
    assert corpora.pg19("test", tmp_path, encode) == path
    assert len(asked) == count
    path.unlink()
    (tmp_path / "pg19" / "test" / "7.txt").write_text("another book")
    with pytest.raises(ValueError, match="delete it to load it anew"):
        corpora.pg19("test", tmp_path, encode)
    with pytest.raises(ValueError, match="split must be"):
        corpora.pg19("dev", tmp_path, encode)


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str) -> io.BytesIO:
        raise OSError("no route")

    monkeypatch.setattr(corpora, "urlopen", urlopen)
    with pytest.raises(OSError, match="no route"):
        corpora.fetch("https://example.org/x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("tiktoken", corpora.gpt2_encoder),
        ("numpy", lambda: corpora.split_rows(3)),
        ("zstandard", lambda: next(corpora.openwebtext2_documents("x"))),
    ],
)
def test_missing_libraries_name_the_extra(monkeypatch: pytest.MonkeyPatch, module, call) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"denseformer\[data\]"):
        call()


def test_the_default_folder_is_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSEFORMER_DATA", str(tmp_path))
    archive(tmp_path / "openwebtext2.jsonl.zst.tar", [["a", "b"]])
    assert corpora.openwebtext2(encode=encode)[0].parent == tmp_path
    assert torch.is_tensor(corpora.read_tokens(tmp_path / "openwebtext2-train.bin"))
