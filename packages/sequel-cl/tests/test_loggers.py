"""TensorBoard and Weights & Biases as they are: what was logged is read back from their files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sequel

from .conftest import fit_quiet, small_learner, small_scenario


def expected(result: Any) -> dict[str, list[tuple[int, float]]]:
    """The values of a run of two tasks, from its result."""
    steps = len(result.losses)
    R = result.matrix
    after = [steps // 2, steps]
    out = {"train/loss": list(enumerate(result.losses, start=1))}
    for j in range(2):
        out[f"val/acc/task-{j}"] = [(s, R[i, j]) for i, s in enumerate(after)]
    out["avg/acc"] = [(after[0], R[0, 0]), (after[1], R[1].mean())]
    out["avg/forgetting"] = [(after[0], 0.0), (after[1], R[0, 0] - R[1, 0])]
    return out


def assert_same(found: dict[str, list[tuple[int, float]]], result: Any) -> None:
    wanted = expected(result)
    assert set(wanted) <= set(found)
    for name, pairs in wanted.items():
        assert [s for s, _ in found[name]] == [s for s, _ in pairs]
        values = [v for _, v in found[name]]
        np.testing.assert_allclose(values, [v for _, v in pairs], rtol=1e-6, atol=1e-7)  # float32


@pytest.mark.filterwarnings("ignore")  # tensorboard's own, about NumPy and protobuf
def test_tensorboards_event_file_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scenario = small_scenario(2)
    logger = sequel.TensorBoardLogger(tmp_path / "new" / "folder")
    result = fit_quiet(small_learner(sequel.Naive(), scenario, callbacks=[logger]), scenario)
    events = EventAccumulator(str(tmp_path / "new" / "folder"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    assert_same({n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}, result)


def records(data: bytes) -> Iterator[bytes]:
    """Read a .wandb file: a LevelDB log of 32 KiB blocks, in which a record may come in parts."""
    at, parts = 7, b""  # behind the file's own header
    while at < len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15  # the rest of a block too short for a header
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandbs_offline_run_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name, value in (("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    scenario = small_scenario(2)
    logger = sequel.WandbLogger(tmp_path / "new" / "folder", project="streams")
    result = fit_quiet(small_learner(sequel.Naive(), scenario, callbacks=[logger]), scenario)
    assert wandb.run is None
    wandb.teardown()  # waits for the process that writes the file
    files = list((tmp_path / "new" / "folder").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    found: dict[str, list[tuple[int, float]]] = {}
    for data in records(files[0].read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                found.setdefault(name, []).append((record.history.step.num, float(item.value_json)))
    assert_same(found, result)
