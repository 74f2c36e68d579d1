"""Executors, the store, crashes, locks, the command line."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_simulators as toys

from mi_surrogates import (
    CheckpointLocked,
    CheckpointMismatch,
    MIObjective,
    SimulationError,
    optimize,
)
from mi_surrogates.cli import load_space, main
from mi_surrogates.loop.describe import describe
from mi_surrogates.loop.execute import Trial, run_trials
from mi_surrogates.loop.store import Store, write_atomically

HERE = Path(__file__).parent


def run(executor=None, simulator=toys.linear, **options):
    chosen = {
        "surrogate": "quadratic",
        "designs": 8,
        "events": 100,
        "iterations": 3,
        "progress": False,
        "objective": MIObjective(steps=15, hidden=(8,), check_every=5),
    }
    return optimize(simulator, toys.space(), executor=executor, **{**chosen, **options})


@pytest.fixture(scope="module")
def reference():
    return run()


def test_threads_and_slow_stragglers_give_the_same_result(reference) -> None:
    for workers in (1, 8):
        with ThreadPoolExecutor(workers) as pool:
            result = run(pool, toys.straggles, in_flight=3)
        assert np.array_equal(result.theta, reference.theta)
        assert result.value == reference.value


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_the_same_result(reference, workers: int) -> None:
    import multiprocessing

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        result = run(pool)
    assert np.array_equal(result.theta, reference.theta)
    assert np.array_equal(result.values, reference.values)


def test_loky_gives_the_same_result(reference) -> None:
    import loky

    with loky.get_reusable_executor(max_workers=2) as pool:
        result = run(pool)
    assert np.array_equal(result.theta, reference.theta)


@pytest.mark.filterwarnings("default")  # distributed warns of ports and of its own shutdown
def test_dask_cluster_gives_the_same_result(reference) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        result = run(client.get_executor())
    assert np.array_equal(result.theta, reference.theta)
    assert np.array_equal(result.values, reference.values)


def test_unpicklable_simulator_is_refused_before_any_work() -> None:
    with (
        ProcessPoolExecutor(1) as pool,
        pytest.raises(TypeError, match="its attribute 'handle' is what cannot be pickled"),
    ):
        run(pool, toys.Unpicklable())
    with ThreadPoolExecutor(1) as pool:
        run(pool, toys.Unpicklable(), iterations=1)


def test_dead_worker_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    import multiprocessing

    run(checkpoint=tmp_path, iterations=1)
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(SimulationError, match="worker process died"),
    ):
        optimize(
            toys.kills_its_worker,
            toys.space(),
            MIObjective("gaussian"),
            surrogate="quadratic",
            designs=8,
            events=100,
            progress=False,
            executor=pool,
        )
    assert (tmp_path / "state.pt").exists()


def trials(count: int) -> list[Trial]:
    thetas = np.random.default_rng(0).random((count, 2))
    return [Trial(0, i, theta, ((20, i),)) for i, theta in enumerate(thetas)]


def test_hanging_simulations_are_given_up_after_the_timeout() -> None:
    done, failed, release = [], {}, threading.Event()

    def hangs(theta, n, seed):
        if theta[0] > 0.5:
            release.wait(60)
        return toys.linear(theta, n, seed)

    many = [Trial(0, i, np.array([t, 0.0]), ((20, i),)) for i, t in enumerate([0.6, 0.1, 0.9])]
    with ThreadPoolExecutor(3) as pool:
        run_trials(
            hangs,
            many,
            lambda t, x, y: done.append(t.design),
            lambda t, e: failed.update({t.design: e.reason}),
            executor=pool,
            timeout=2.0,
        )
        release.set()
    assert failed == {0: "no result after 2 s", 2: "no result after 2 s"}
    assert done == [1]


class Queueing(Executor):
    """As a process pool: two workers, and a submitted block is "running" while it waits for one."""

    def __init__(self) -> None:
        self._max_workers, self.waiting, self.most = 2, [], 0
        self.lock = threading.Lock()

    def submit(self, function, *args):
        future: Future = Future()
        future.set_running_or_notify_cancel()
        with self.lock:
            self.waiting.append((future, function, args))
            self.most = max(self.most, len(self.waiting))
        threading.Timer(0.01, self.work).start()
        return future

    def work(self) -> None:
        with self.lock:  # design 0 never ends and keeps its worker
            job = next((job for job in self.waiting if job[2][-1] != 0), None)
            if job is not None:
                self.waiting.remove(job)
        if job is not None:
            future, function, args = job
            future.set_result(function(*args))


def test_time_in_the_queue_of_a_pool_does_not_count_as_running() -> None:
    """With a timeout only as many blocks are out as there are workers, those that hang included."""
    pool, done, failed = Queueing(), [], []
    run_trials(
        toys.linear,
        trials(6),
        lambda t, x, y: done.append(t.design),
        lambda t, e: failed.append(t.design),
        executor=pool,
        timeout=1.0,
        in_flight=5,
    )
    assert pool.most == 2
    assert failed == [0]
    assert sorted(done) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("threads", [0, 2])
def test_failed_calls_are_repeated_with_the_same_seed(threads: int) -> None:
    calls: list[tuple[float, int]] = []

    def flaky(theta, n, seed):
        calls.append((float(theta[0]), seed))
        if sum(c == calls[-1] for c in calls) < 3:
            raise OSError("the network blinked")
        return toys.linear(theta, n, seed)

    done: list[int] = []
    failed: list[SimulationError] = []
    pool = ThreadPoolExecutor(threads) if threads else None
    run_trials(
        flaky,
        trials(4),
        lambda t, x, y: done.append(t.design),
        lambda t, e: failed.append(e),
        executor=pool,
        retries=2,
    )
    assert sorted(done) == [0, 1, 2, 3]
    calls.clear()
    run_trials(
        flaky,
        trials(4),
        lambda t, x, y: done.append(t.design),
        lambda t, e: failed.append(e),
        executor=pool,
        retries=1,
    )
    assert sorted(e.design for e in failed) == [0, 1, 2, 3]
    assert "the network blinked" in str(failed[0])
    if pool:
        pool.shutdown()


def test_executor_that_fails_in_its_own_way_is_a_failed_trial() -> None:
    class Odd(Executor):
        def submit(self, *args, **kwargs):
            future: Future = Future()
            future.set_exception(KeyError("lost in transport"))
            return future

    failed = []
    run_trials(
        toys.linear,
        [Trial(0, 0, np.ones(2), ((5, 1), (5, 2)))],
        print,
        lambda t, e: failed.append(str(e)),
        executor=Odd(),
        retries=0,
    )
    assert failed == ["design 0, seed 1: KeyError: 'lost in transport'"]


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, reference) -> None:
    first = run(checkpoint=tmp_path, iterations=1)
    assert len(first.history) == 1
    for name in ("0001/0002.npz", "0001/0005.npz"):  # as after a crash in the next iteration
        full = run(checkpoint=tmp_path / "other", iterations=2)
        source = (tmp_path / "other" / "events" / name).read_bytes()
        write_atomically(tmp_path / "events" / name, source)
    result = run(checkpoint=tmp_path)
    assert np.array_equal(result.theta, reference.theta)
    assert result.value == reference.value
    assert result.history[1].value == full.history[1].value
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["events"] == 2400


def test_known_failures_are_not_simulated_again(tmp_path: Path) -> None:
    options = {"simulator": toys.sometimes_fails, "checkpoint": tmp_path, "retries": 0}
    first = run(**options, iterations=2)
    (tmp_path / "state.pt").unlink()
    calls = []

    def counting(theta, n, seed):
        calls.append(seed)
        return toys.linear(theta, n, seed)

    counting.__module__, counting.__qualname__ = "toy_simulators", "sometimes_fails"
    again = run(**{**options, "simulator": counting}, iterations=2)
    assert not calls
    assert again.history[-1].failed.keys() == first.history[-1].failed.keys()
    assert np.array_equal(again.theta, first.theta)


CRASH = """
import os, random, signal, sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import toy_simulators as toys
from mi_surrogates import MIObjective, optimize

def work(folder):
    return optimize(
        toys.linear, toys.space(), MIObjective(steps=15, hidden=(8,), check_every=5),
        surrogate="ensemble", designs=8, events=100, iterations=12, progress=False, checkpoint=folder,
    ).theta.tobytes().hex()

# every attempt is a process of its own, forked from this one so that it need not import torch again
draw, kills, runs, wrong = random.Random(0), 0, 0, 0
expected = work(None)
while kills < 20 or runs == 0:
    folder, done = os.path.join(sys.argv[1], str(runs)), False
    while not done:
        child = os.fork()
        if child == 0:
            with open(folder + ".theta", "w") as file:
                file.write(work(folder))
            os._exit(0)
        patience, status = time.monotonic() + draw.uniform(0.0, 0.4), 0
        while not done and time.monotonic() < patience:
            done = os.waitpid(child, os.WNOHANG)[0] == child
            time.sleep(0.001)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    runs += 1
    wrong += open(folder + ".theta").read() != expected
print(kills >= 20, runs >= 1, wrong)
os._exit(0 if sys.stdout.flush() is None else 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX: fork and SIGKILL")
def test_killed_at_twenty_random_moments_the_run_ends_at_the_same_design(tmp_path: Path) -> None:
    """A random time after its start each attempt is killed, and the next goes on in its folder."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH.format(here=str(HERE)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout.strip() == "True True 0", done.stderr


def test_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(checkpoint=tmp_path, iterations=1)
    with pytest.raises(CheckpointMismatch, match=r"seed: 0 there, 1 here"):
        run(checkpoint=tmp_path, seed=1)
    with pytest.raises(CheckpointMismatch, match=r"simulator: toy_simulators.linear there"):
        run(checkpoint=tmp_path, simulator=toys.ignores)
    with pytest.raises(CheckpointMismatch, match="objective"):
        run(checkpoint=tmp_path, objective="reco")
    with pytest.raises(CheckpointMismatch, match="holds a run already"):
        run(checkpoint=tmp_path, resume=False)
    with pytest.raises(CheckpointMismatch, match="no run to resume"):
        run(checkpoint=tmp_path / "new", resume=True)


class Holds:
    def __init__(self, value: object) -> None:
        self.value = value

    def call(self, theta, n, seed):
        return toys.linear(theta, n, seed)

    __call__ = call


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Holds(np.zeros(3)), Holds(np.ones(3))),
        (Holds(np.int64(3)), Holds(np.int64(4))),
        (Holds(torch.zeros(2)), Holds(torch.ones(2))),
        (Holds(Path("a")), Holds(Path("b"))),
        (Holds([{"a": (1, None)}]), Holds([{"a": (2, None)}])),
        (Holds(torch.nn.Linear(1, 1)), Holds(torch.nn.Linear(1, 1))),
        (partial(toys.linear, n=1), partial(toys.linear, n=2)),
        (Holds(1).call, Holds(2).call),
        (Holds(torch.float32), Holds(torch.float64)),
    ],
)
def test_simulators_that_hold_other_values_are_other_configurations(one, other) -> None:
    assert describe(one) != describe(other)
    assert json.loads(json.dumps(describe(one))) == describe(copy.deepcopy(one))


HOLD = """
import sys, time
from mi_surrogates.loop.store import Store
with Store(sys.argv[1], {}):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_two_processes_cannot_share_a_folder_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "locked"
    with pytest.raises(CheckpointLocked, match=f"in use by pid {child.pid} on "):
        Store(tmp_path, {})
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with Store(tmp_path, {}), pytest.raises(CheckpointLocked, match="in this process already"):
        Store(tmp_path, {})
    Store(tmp_path, {}).close()


def as_linear(simulator):
    """Give a simulator the name of `toys.linear`, by which a checkpoint knows it."""
    simulator.__module__, simulator.__qualname__ = toys.linear.__module__, "linear"
    return simulator


def test_full_disk_ends_the_run_with_the_next_design_and_frees_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference
) -> None:
    written: list[Path] = []
    stores: list[Store] = []
    simulated: list[int] = []
    begin = Store.__init__

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 4:  # config.json and three designs
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, data)

    def remembered(self: Store, *arguments) -> None:
        stores.append(self)
        begin(self, *arguments)

    def linear(theta, n, seed):
        wait(stores[0]._pending)  # let the writer keep up
        simulated.append(seed)
        return toys.linear(theta, n, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "__init__", remembered)
        patch.setattr(Store.__module__ + ".write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            run(simulator=as_linear(linear), checkpoint=tmp_path)
    assert len(simulated) == 5  # the fourth cannot be written, the fifth says so
    assert np.array_equal(run(checkpoint=tmp_path).points, reference.points)


def test_lock_that_cannot_be_written_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", full)
        with pytest.raises(OSError, match="No space left"):
            Store(tmp_path, {})
    Store(tmp_path, {}).close()


@pytest.mark.parametrize(("where", "arrived"), [("iteration", 3), ("step", 8)])
def test_interrupt_from_the_keyboard_keeps_what_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference, where: str, arrived: int
) -> None:
    """Within the second iteration, and between its events and the state that follows."""
    calls: list[int] = []
    save = Store.save_state

    def simulator(theta, n, seed):
        calls.append(1)
        if where == "iteration" and len(calls) == 8 + arrived + 1:
            raise KeyboardInterrupt
        return toys.linear(theta, n, seed)

    def save_state(self: Store, state, history) -> None:
        if where == "step" and len(history) == 2:
            raise KeyboardInterrupt
        save(self, state, history)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_state", save_state)
        with pytest.raises(KeyboardInterrupt):
            run(simulator=as_linear(simulator), checkpoint=tmp_path)
    assert len(list((tmp_path / "events" / "0001").iterdir())) == arrived
    result = run(checkpoint=tmp_path, resume=True)
    assert np.array_equal(result.points, reference.points)
    assert np.array_equal(result.values, reference.values)


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def broken(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="power cut"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # on a full disk a rest would take what is left


def test_no_state_is_written_after_events_that_could_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, {})
    store.save_events(0, 0, np.zeros((2, 1)), np.zeros((2, 1)))
    store.flush()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    store.save_events(0, 1, np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(OSError, match="no space left"):
        store.save_state({}, [])
    monkeypatch.undo()
    store.close()
    assert not (tmp_path / "state.pt").exists()
    with Store(tmp_path, {}) as again:
        assert again.load_events(0, 0) is not None
        assert again.load_events(0, 1) is None
        again.save_state({"a": 1}, [])
    with Store(tmp_path, {}) as again:
        assert again.load_state() == {"a": 1}


@pytest.mark.slow
def test_memory_of_many_iterations_is_flat(tmp_path: Path) -> None:
    """Events live on disk; what stays is a few numbers for each design."""
    import gc
    import tracemalloc

    sizes = []

    def remember(iteration) -> None:
        if iteration.index in (10, 49):
            gc.collect()  # what lives, not what waits to be freed
            sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    run(
        checkpoint=tmp_path,
        objective=MIObjective("gaussian"),
        iterations=50,
        events=2000,
        callbacks=[remember],
        sigma_min=0.5,
    )
    tracemalloc.stop()
    grown = sizes[1] - sizes[0]
    events = 39 * 8 * 2000 * 2 * 8  # bytes of the events between the two
    assert grown < events / 20


SPACE = """
[parameters.a]
initial = 0.3
lower = 0.0
upper = 1.0
sigma = 0.08
[parameters.b]
initial = 0.8
lower = 0.0
upper = 1.0
[[linear]]
a = [1.0, 1.0]
upper = 1.2
"""


def test_command_line_runs_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.chdir(HERE)
    folder = str(tmp_path / "run")
    common = [
        "toy_simulators:linear",
        "--space",
        str(tmp_path / "space.toml"),
        "--method",
        "gaussian",
    ]
    common += ["--surrogate", "quadratic", "--designs", "8", "--events", "100", "--quiet"]
    assert main(["run", *common, "--checkpoint", folder, "--iterations", "2", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["iterations"] == 2
    out = str(tmp_path / "r.pt")
    assert (
        main(["resume", folder, "--iterations", "4", "--quiet", "--workers", "2", "--out", out])
        == 0
    )
    assert "ended by" in capsys.readouterr().out
    assert Path(out).exists()
    picture = tmp_path / "p.png"
    assert main(["report", folder, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.count("accepted") + text.count("rejected") == 4
    assert picture.stat().st_size > 1000
    assert main(["report", folder, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 4
    file = tmp_path / "run" / "history.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["value"] = rows[0]["stderr"] = float("nan")
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["report", folder, "--json"]) == 0  # a nominal design may have failed
    shown = capsys.readouterr().out
    assert "NaN" not in shown
    assert json.loads(shown)["history"][0]["value"] is None
    assert main(["report", folder]) == 0
    assert " nan " in capsys.readouterr().out
    assert main(["run", *common, "--objective", "reco", "--iterations", "1"]) == 0


def test_soft_constraints_come_from_the_space_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    file = tmp_path / "space.toml"
    file.write_text(
        SPACE.replace("0.3", "0.2") + "[[soft]]\nfunction = 'toy_simulators:ring'\nupper = 0.7\n"
    )
    space = load_space(file)
    assert space.violation(np.array([0.6, 0.5])) == 0
    assert space.violation(np.array([0.8, 0.4])) == pytest.approx(0.8 / 0.7 - 1)
    arguments = ["toy_simulators:linear", "--space", str(file), "--method", "gaussian", "--json"]
    arguments += ["--surrogate", "quadratic", "--designs", "auto", "--events", "100", "--quiet"]
    assert main(["run", *arguments, "--iterations", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["violation"] <= 1e-3
    assert found["events"] == 4 * 8 * 100


def test_resume_goes_on_with_the_last_command_that_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.chdir(HERE)
    folder = str(tmp_path / "run")
    tail = ["--space", str(tmp_path / "space.toml"), "--surrogate", "quadratic", "--quiet"]
    tail += ["--method", "gaussian", "--designs", "8", "--events", "100", "--checkpoint", folder]
    tail += ["--iterations", "3", "--json"]
    assert main(["run", "toy_simulators:nothing", *tail]) == 2
    assert main(["run", "toy_simulators:always_fails", *tail]) == 1
    assert "no licence" in capsys.readouterr().err
    folder = str(tmp_path / "other")
    tail[tail.index("--checkpoint") + 1] = folder
    assert main(["run", "toy_simulators:nothing", *tail]) == 2
    assert main(["run", "toy_simulators:linear", *tail[:-2], "1"]) == 0
    assert main(["run", "toy_simulators:linear", *tail, "--seed", "1"]) == 2  # another run
    capsys.readouterr()
    for arguments, iterations in (([], 3), (["--iterations", "4"], 4), ([], 4)):
        assert main(["resume", folder, "--json", "--quiet", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["iterations"] == iterations


def test_command_line_estimates_and_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = toys.linear(np.array([0.7, 0.4]), 600, 0)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    data = str(tmp_path / "d.npz")
    assert main(["estimate", data, "--method", "ksg,gaussian", "--null", "9"]) == 0
    table = capsys.readouterr()
    assert "p = 0.1" in table.out
    assert "gaussian ..." in table.err
    assert main(["estimate", data, "--method", "ksg", "--units", "bits", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["estimates"][0]["value"]
    assert found == pytest.approx(0.5 * np.log2(1 + 1 / 0.04), abs=0.2)
    np.savez(tmp_path / "few.npz", x=x[:120], y=y[:120])  # fewer than two of the usual minibatches
    few = [str(tmp_path / "few.npz"), "--method", "ba", "--json", "--quiet"]
    assert main(["estimate", *few]) == 0
    assert json.loads(capsys.readouterr().out)["estimates"][0]["value"] > 0
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "one.npy", x)
    for name in ("bad.npz", "one.npy"):
        assert main(["estimate", str(tmp_path / name)]) == 2
        assert "is no npz file" in capsys.readouterr().err
    assert main(["problems"]) == 0
    assert "water_filling" in capsys.readouterr().out
    assert main(["problems", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume", "nowhere"], "no run of this command line"),
        (["report", "nowhere"], "no finished iteration"),
        (["estimate", "nowhere.npz"], "nowhere.npz"),
        (["estimate", "bad.npz"], "must have arrays x and y"),
        (["run", "toy", "--space", "s.toml"], "package.module:name"),
        (["run", "no_such_module:f", "--space", "s.toml"], "no module 'no_such_module'"),
        (["run", "math:tau", "--space", "s.toml"], "no callable 'tau'"),
        (["run", "math:sin", "--space", "s.toml", "--workers", "0"], "--workers"),
        (["run", "math:sin", "--space", "empty.toml"], "no .parameters"),
        (["run", "math:sin", "--space", "odd.toml"], "a parameter has initial"),
        (["run", "math:sin", "--space", "extra.toml"], "unknown tables limits"),
        (["run", "math:sin", "--space", "row.toml"], "needs a and upper"),
        (["run", "math:sin", "--space", "soft.toml"], "needs function and upper"),
        (["run", "math:sin", "--space", "number.toml"], "package.module:name, got 5"),
        (
            ["run", "math:sin", "--space", "raises.toml"],
            "soft constraint 'toy_simulators:price': IndexError",
        ),
        (
            ["run", "math:sin", "--space", "array.toml"],
            "soft constraint 'numpy:asarray': TypeError: a constraint must return a tensor, got",
        ),
        (
            ["run", "math:sin", "--space", "lost.toml"],
            "no module 'nowhere' for the soft constraint",
        ),
    ],
)
def test_command_line_says_what_is_wrong(
    arguments,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", z=np.ones(3))
    row = "[parameters.a]\ninitial = 0.5\nlower = 0.0\nupper = 1.0\n"
    Path("s.toml").write_text(row)
    Path("empty.toml").write_text("")
    Path("odd.toml").write_text(row + "unit = 3\n")
    Path("extra.toml").write_text(row + "[limits]\n")
    Path("row.toml").write_text(row + "[[linear]]\na = [1.0]\n")
    Path("soft.toml").write_text(row + "[[soft]]\nupper = 1.0\n")
    Path("raises.toml").write_text(
        row + "[[soft]]\nfunction = 'toy_simulators:price'\nupper = 1.0\n"
    )
    Path("array.toml").write_text(row + "[[soft]]\nfunction = 'numpy:asarray'\nupper = 1.0\n")
    Path("number.toml").write_text(row + "[[soft]]\nfunction = 5\nupper = 1.0\n")
    Path("lost.toml").write_text(row + "[[soft]]\nfunction = 'nowhere:f'\nupper = 1.0\n")
    assert main([*arguments, "--quiet"]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_failing_run_has_status_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(SPACE)
    monkeypatch.chdir(HERE)
    arguments = [
        "run",
        "toy_simulators:always_fails",
        "--space",
        str(tmp_path / "s.toml"),
        "--quiet",
    ]
    assert main(arguments) == 1
    assert "no licence" in capsys.readouterr().err


def test_module_runs_as_a_program_without_optional_libraries() -> None:
    code = "import sys, mi_surrogates; print([m for m in ('matplotlib', 'pandas', 'sklearn', 'botorch', "
    code += "'distributed', 'loky') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "mi_surrogates", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "estimate" in done.stdout
