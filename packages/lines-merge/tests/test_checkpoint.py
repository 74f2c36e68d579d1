"""Reading checkpoints: formats, and everything that a damaged or hostile one can do."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, make_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lines_merge as lm
from lines_merge.io.checkpoint import open_checkpoint
from lines_merge.sources import MemorySource, open_source


def contents(path: Any) -> State:
    source = open_checkpoint(path)
    state = {n: source.read(n, 0, i.numel).view(i.shape).clone() for n, i in source.tensors.items()}
    source.close()
    source.close()
    return state


def same(one: State, two: State) -> None:
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def raw(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_state_dicts(tmp_path: Path, suffix: str, legacy: bool) -> None:
    state = make_state()
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    same(contents(path), state)
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    same(contents(path), state)


def test_folders(tmp_path: Path) -> None:
    state = make_state()
    save_file(state, tmp_path / "diffusion.safetensors")
    same(contents(tmp_path), state)
    half = dict(list(state.items())[:5]), dict(list(state.items())[5:])
    torch.save(state, tmp_path / "pytorch_model.bin")
    same(contents(tmp_path), state)
    for index, part in enumerate(half):
        torch.save(part, tmp_path / f"part{index}.bin")
    weight_map = {n: f"part{i}.bin" for i, part in enumerate(half) for n in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "pytorch_model.bin").unlink()
    same(contents(tmp_path), state)
    same(contents(tmp_path / "pytorch_model.bin.index.json"), state)
    weight_map["more"] = "part1.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(lm.CheckpointError, match=r"no shard holds \['more'\]"):
        contents(tmp_path)


def test_every_dtype_is_read_as_safetensors_writes_it(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    dtypes += [
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ]
    state = {str(dtype): torch.tensor([0.0, 1.0, 2.0]).to(dtype) for dtype in dtypes}
    save_file(state, tmp_path / "all.safetensors")
    found = contents(tmp_path / "all.safetensors")
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8))


def test_module_and_reader_are_sources() -> None:
    model = nn.Linear(2, 2)
    assert open_source(model).label == "Linear"
    reader = MemorySource(model.state_dict())
    assert open_source(reader) is reader


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_pickles_never_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "x": Evil()}, "evil.bin")
    Path("raw.bin").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(1, 1), "module.pt")
    for name in ("evil.bin", "raw.bin", "module.pt"):
        with pytest.raises(lm.CheckpointError, match=f"{name}: (refused|cannot be read)") as info:
            lm.merge({"w": torch.ones(1)}, [name], lines=False)
        assert isinstance(info.value, OSError)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 broken zip"])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(lm.CheckpointError, match=r"a\.bin"):
        contents(tmp_path / "a.bin")


def test_pickles_of_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    torch.save({"w": 3}, tmp_path / "b.pt")
    for name in "ab":
        with pytest.raises(lm.CheckpointError, match="holds no state dict"):
            contents(tmp_path / f"{name}.pt")


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(lm.CheckpointError, match="no such file or folder"):
        contents(tmp_path / "absent")
    with pytest.raises(lm.CheckpointError, match=r"no weight file; looked for model.safetensors"):
        contents(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(lm.CheckpointError, match="not a checkpoint; expected a folder"):
        contents(tmp_path / "a.txt")
    (tmp_path / "a.gguf").write_text("GGUF")
    with pytest.raises(lm.UnsupportedDtypeError, match="GGUF holds quantised weights; dequantise"):
        contents(tmp_path / "a.gguf")
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(lm.CheckpointError, match="several weight files and no index"):
        contents(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(lm.CheckpointError, match=r"holds an adapter.*merge_and_unload"):
        contents(tmp_path)
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "a.safetensors").chmod(0)
        with pytest.raises(lm.CheckpointError, match="cannot be opened"):
            contents(tmp_path / "a.safetensors")


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "short": (b"\x01\x00", "too few"),
    "length past the end": (struct.pack("<Q", 100) + b"{}", "header of 100 bytes"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "header of"),
    "not JSON": (raw(b"{abc"), "bad header"),
    "not UTF-8": (raw(b"\xff\xfe{}"), "bad header"),
    "not an object": (raw([]), "not a JSON object"),
    "deep nesting": (raw(b"[" * 100_000), "bad header"),
    "duplicate name": (raw(b'{"a":{},"a":{}}'), "a name occurs twice"),
    "entry is no object": (raw({"a": 3}), "lacks dtype"),
    "missing offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}), "lacks dtype"),
    "unknown dtype": (raw({"a": entry(dtype="F33")}, bytes(8)), "has dtype 'F33'"),
    "dtype is a list": (raw({"a": entry() | {"dtype": []}}, bytes(8)), "has dtype"),
    "negative shape": (raw({"a": entry(shape=[-2, -1])}, bytes(8)), "has shape"),
    "shape is a number": (raw({"a": entry() | {"shape": 2}}, bytes(8)), "has shape"),
    "shape of booleans": (raw({"a": entry(shape=[True, 2])}, bytes(8)), "has shape"),
    "negative offset": (raw({"a": entry(-8, 0)}, bytes(8)), "has data_offsets"),
    "three offsets": (
        raw({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        "has data_offsets",
    ),
    "size against shape": (raw({"a": entry(0, 4)}, bytes(4)), "offsets .* for 8 bytes"),
    "overlap": (raw({"a": entry(), "b": entry(4, 12)}, bytes(12)), "starts at 4, where 8"),
    "gap": (raw({"a": entry(), "b": entry(12, 20)}, bytes(20)), "starts at 12, where 8"),
    "truncated data": (raw({"a": entry()}, bytes(5)), "tensors end at byte"),
    "data left over": (raw({"a": entry()}, bytes(9)), "tensors end at byte"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, name: str) -> None:
    content, message = BAD_HEADERS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(lm.CheckpointError, match=f"a.safetensors: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0", "U32"])
def test_dtypes_that_exist_elsewhere(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw({"a": entry(dtype=kind)}, bytes(8)))
    with pytest.raises(lm.UnsupportedDtypeError, match=f"a.safetensors: 'a' is {kind}.*dequantise"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    source = open_checkpoint(path)
    os.truncate(path, 600)
    with pytest.raises(lm.CheckpointError, match="ends at byte 600: truncated"):
        source.read("a", 0, 1000)
    source.close()
    with pytest.raises(lm.CheckpointError, match="cannot be read"):
        source.read("a", 0, 1000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F99"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40) | st.integers(), max_size=3) | json_values,
    }
)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_fuzzed_headers_raise_checkpoint_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    valid = raw({"a": entry(), "b": entry(8, 12, "F32", [])}, bytes(12))
    kind = data.draw(st.sampled_from(["bytes", "cut", "flip", "table"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=64))
    elif kind == "cut":
        content = valid[: data.draw(st.integers(0, len(valid)))]
    elif kind == "flip":
        damaged = bytearray(valid)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(damaged)
    else:
        table = data.draw(
            st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4) | json_values
        )
        content = raw(table, data.draw(st.binary(max_size=40)))
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        source = open_checkpoint(path)
    except lm.CheckpointError:
        return
    for name, info in source.tensors.items():
        assert source.read(name, 0, info.numel).numel() == info.numel
    source.close()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "bad index"),
        ("[]", "bad index"),
        ("{}", "bad index"),
        ('{"weight_map": {}}', "bad index"),
        ('{"weight_map": {"a": 3}}', "bad index"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names 'b.safetensors', which is absent"),
        (
            '{"weight_map": {"a": "../a.safetensors"}}',
            "'../a.safetensors' is not a plain file name",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is not a plain file name"),
        ('{"weight_map": {"a": "..\\\\a.safetensors"}}', "is not a plain file name"),
        ('{"weight_map": {"a": "C:a.safetensors"}}', "is not a plain file name"),
        ('{"weight_map": {"a": ".."}}', "is not a plain file name"),
        ('{"weight_map": {"x": "a.safetensors"}}', "lacks 'x', which the index names"),
    ],
)
def test_bad_indexes(tmp_path: Path, index: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(lm.CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "0.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert contents(tmp_path)["a"].item() == 1
