"""Checkpoints: a killed run goes on bit by bit, a damaged file is passed over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sequel
from sequel import checkpoint

from .conftest import fit_quiet, small_learner, small_scenario

RUN = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
torch.set_num_threads(1)
import sequel
from sequel import checkpoint
from sequel.testing import tiny_data

def train(folder, out):
    scenario = sequel.scenarios.permuted(tiny_data(60), 3)
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (16,), 6, dropout=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    learner = sequel.Learner(model, optimizer, sequel.DERpp(memory=20), batch_size=7,
                             callbacks=[sequel.Checkpoint(folder, every_steps=4)])
    result = learner.fit(scenario, epochs=2)
    checkpoint.write(out, {**learner.backend.arrays(), "slots": learner.slots.state_dict(),
                           "run": {"matrix": result.matrix, "losses": np.array(result.losses)}}, {})
"""


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    return bool(np.array_equal(a, b))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_a_run_killed_at_twenty_points_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """One server imports torch; its forked children run and are killed, also inside a write."""
    server = (
        RUN
        + """
import os
train(*sys.argv[1:])  # imports everything, so that the children start at once
print("ready", flush=True)
for line in sys.stdin:
    folder, out, slow = line.split()
    pid = os.fork()
    if pid == 0:
        if slow == "1":
            import time
            replace = os.replace
            def late(*a):
                time.sleep(0.02)  # most kills fall into a write
                replace(*a)
            os.replace = late
        try:
            train(folder, out)
        finally:
            os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("end", flush=True)
"""
    )
    process = subprocess.Popen(
        [sys.executable, "-c", server, str(tmp_path / "warm"), str(tmp_path / "warm.st")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def attempt(folder: Path, out: Path, slow: int, wait: float | None) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{folder} {out} {slow}\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if wait is not None:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.kill(pid, signal.SIGKILL)
        assert process.stdout.readline().strip() == "end"

    try:
        assert process.stdout.readline().strip() == "ready"
        start = time.perf_counter()
        attempt(tmp_path / "whole", tmp_path / "whole.st", 0, None)
        length = time.perf_counter() - start
        draw = random.Random(0)
        for _ in range(20):  # twenty kills of one run, each where the one before had come to
            attempt(tmp_path / "cut", tmp_path / "cut.st", 1, draw.uniform(0.05, 0.5) * length)
            if (tmp_path / "cut.st").exists():
                break
        attempt(tmp_path / "cut", tmp_path / "cut.st", 0, None)
        for number in range(4):  # and killed once only, at points spread over the run
            folder, out = tmp_path / f"once{number}", tmp_path / f"once{number}.st"
            attempt(folder, out, number % 2, draw.uniform(0.1, 0.9) * length)
            attempt(folder, out, 0, None)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
    expected, _ = checkpoint.read(tmp_path / "whole.st")
    assert len(expected["run"]["losses"]) == 3 * 2 * 9
    for name in ["cut", *(f"once{n}" for n in range(4))]:
        found, _ = checkpoint.read(tmp_path / f"{name}.st")
        assert same(found, expected), name


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_resume_in_the_middle_of_a_task_is_bit_identical(tmp_path: Path, backend: str) -> None:
    scenario = small_scenario(2)

    def make(callbacks: Any) -> Any:
        torch.manual_seed(0)
        model = sequel.nn.MLP(64, (16,), 6)
        algorithm = sequel.SI(lam=0.1)
        options = {"batch_size": 8, "callbacks": callbacks, "eval_every": 7}
        if backend == "torch":
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            return sequel.Learner(model, optimizer, algorithm, **options)
        optax = pytest.importorskip("optax")
        return sequel.Learner(sequel.nn.to_jax(model), optax.adam(1e-2), algorithm, **options)

    class Stop(sequel.Callback):
        def on_after_training_step(self, learner: Any, **info: Any) -> None:
            if learner.global_step == 17:
                raise KeyboardInterrupt

    whole = make([])
    expected = whole.fit(scenario, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        make([sequel.Checkpoint(tmp_path, every_steps=5), Stop()]).fit(scenario, epochs=2)
    again = make([sequel.Checkpoint(tmp_path, every_steps=5)])
    found = again.fit(scenario, epochs=2)
    assert (found.matrix == expected.matrix).all()
    assert found.losses == expected.losses
    assert found.anytime == expected.anytime
    assert same(again.backend.arrays(), whole.backend.arrays())
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_parameters_move_from_torch_to_jax(tmp_path: Path) -> None:
    optax = pytest.importorskip("optax")
    scenario = small_scenario(2)
    learner = small_learner(sequel.Naive(), scenario)
    learner.fit(scenario)
    learner.save(tmp_path / "t.safetensors")
    tree, header = checkpoint.read(tmp_path / "t.safetensors")
    assert header["backend"] == "torch"
    fresh = sequel.nn.MLP(64, (16, 16), 6)
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in tree["params"].items()})
    other = sequel.Learner(sequel.nn.to_jax(fresh), optax.sgd(0.1), sequel.Naive(), batch_size=8)
    other.setup(scenario)
    x = scenario[0].test.x
    np.testing.assert_allclose(other.predict(x), learner.predict(x), rtol=1e-5, atol=1e-6)


def test_round_trip_through_state_dict_and_file(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    one, two = (small_learner(sequel.EWC(lam=1.0), scenario) for _ in range(2))
    one.fit(scenario, stop_after=1)
    one.save(tmp_path / "deep" / "a.safetensors")
    two.setup(scenario)
    two.load(tmp_path / "deep" / "a.safetensors")
    assert same(one.backend.arrays(), two.backend.arrays())
    three = small_learner(sequel.EWC(lam=1.0), scenario)
    three.setup(scenario)
    three.load_state_dict(one.state_dict())
    a, b, c = (le.fit(scenario).matrix for le in (one, two, three))
    assert (a == b).all()
    assert (a == c).all()


def test_a_checkpoint_is_hardly_larger_than_its_tensors(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.EWC(), scenario)
    learner.fit(scenario, stop_after=1)
    tree, header = learner.state_dict()
    tree["big"] = np.zeros((200, 1000), dtype=np.float32)
    checkpoint.write(tmp_path / "a", tree, header)
    total = sum(v.nbytes for v in checkpoint._flat(tree).values())
    assert (tmp_path / "a").stat().st_size <= 1.05 * total


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.EWC(lam=1.0), scenario)
    learner.fit(scenario, stop_after=1)
    path = tmp_path / "a.safetensors"
    learner.save(path)
    cases = {
        "algorithm": small_learner(sequel.EWC(lam=2.0), scenario),
        "seed": small_learner(sequel.EWC(lam=1.0), scenario, seed=1),
        "batch_size": small_learner(sequel.EWC(lam=1.0), scenario, batch_size=9),
    }
    for word, other in cases.items():
        other.setup(scenario)
        with pytest.raises(RuntimeError, match=word):
            other.load(path)
        other.load(path, strict=False)
    elsewhere = small_learner(sequel.EWC(lam=1.0), scenario)
    elsewhere.setup(sequel.scenarios.rotated(sequel.testing.tiny_data(), 2))
    with pytest.raises(RuntimeError, match="fingerprint"):
        elsewhere.load(path)
    model = sequel.nn.MLP(64, (8,), 6)
    narrow = sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.1), sequel.EWC(lam=1.0), batch_size=8
    )
    narrow.setup(scenario)
    with pytest.raises(RuntimeError, match="shapes"):
        narrow.load(path)


def test_damaged_files_fall_back_or_fail_clearly(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    learner = small_learner(
        sequel.Naive(), scenario, callbacks=[sequel.Checkpoint(tmp_path, keep=3)]
    )
    fit_quiet(learner, scenario)
    files = sorted(tmp_path.glob("step-*"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="not a whole checkpoint"):
        _, header = checkpoint.load_latest(tmp_path) or ({}, {})
    assert header["position"]["task"] == 1
    files[0].write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning, match="not a whole checkpoint"),
        pytest.raises(RuntimeError, match="no whole checkpoint among the 2 files"),
    ):
        checkpoint.load_latest(tmp_path)
    assert checkpoint.load_latest(tmp_path / "empty") is None


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path / "a", {"x": np.ones(3)}, {"n": 1})

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path / "a", {"x": np.zeros(3)}, {"n": 2})
    assert checkpoint.read(tmp_path / "a")[1]["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="must not contain"):
        checkpoint.write(tmp_path / "b", {"x|y": np.zeros(3)}, {})


def test_other_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.write(tmp_path / "a", {"x": np.zeros(1)}, {})
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="format 99"):
        checkpoint.read(tmp_path / "a")
