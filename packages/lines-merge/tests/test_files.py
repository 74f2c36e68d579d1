"""Merging files equals merging in memory, within its memory, or leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, make_finetuned, make_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lines_merge as lm
from lines_merge.io import files as files_module
from lines_merge.io.plan import parse_size

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"weights": [0.3, 0.5, 0.2]}),
    ("ties", {}),
    ("ties", {"scope": "tensor", "merge": "sum"}),
    ("ties", {"density": 1.0, "merge": "max"}),
    ("consensus", {}),
    ("consensus_ties", {}),
    ("magnitude", {"density": 0.3}),
    ("dare", {"p": 0.5, "seed": 3}),
    ("dare_ties", {"p": 0.5, "density": 0.5}),
]
Checkpoints = tuple[State, list[State]]


def checkpoints(dtype: torch.dtype) -> Checkpoints:
    base = make_state(dtype=dtype) | {
        "blocks.1.mlp.wide.weight": torch.randn(
            300, 333, generator=torch.Generator().manual_seed(1)
        ).to(dtype)
    }
    models = [make_finetuned(base, seed) for seed in range(3)]
    extra = {"counter": torch.tensor([7]), "empty": torch.zeros(0, 3, dtype=dtype)}
    return base | extra, [model | extra for model in models]


def write(folder: Path, state: State, shards: int = 1, rng: random.Random | None = None) -> Path:
    """Save as a Hugging Face folder, distributing the tensors at random over the shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"torch_dtype": "bfloat16", "model_type": "toy"}')
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = list(state)
    (rng or random.Random(0)).shuffle(names)
    weight_map = {}
    for index in range(shards):
        file = f"part-{index}.safetensors"
        part = names[index::shards]
        save_file({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> State:
    return {
        n: v for file in sorted(folder.glob("*.safetensors")) for n, v in load_file(file).items()
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoints, Path, list[Path]]:
    root = tmp_path_factory.mktemp("family")
    state = checkpoints(torch.bfloat16)
    paths = [write(root / f"m{t}", model) for t, model in enumerate(state[1])]
    return state, write(root / "base", state[0], 3), paths


def same(one: State, two: State) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(("method", "arguments"), METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_equal_memory_bit_for_bit(
    tmp_path: Path, method: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    base, models = checkpoints(dtype)
    folders = [write(tmp_path / f"m{t}", model, 1 + t) for t, model in enumerate(models)]
    report = lm.merge_files(
        write(tmp_path / "base", base, 2),
        folders,
        tmp_path / "out",
        method,
        beta=0.7,
        threads=2,
        max_memory="128MiB",
        progress=False,
        **arguments,
    )
    same(read(tmp_path / "out"), lm.merge(base, models, method, beta=0.7, **arguments))
    assert report.method == method
    assert report.copied == ["counter"]
    assert report.passes >= len(
        lm.plan_files(tmp_path / "base", folders, method, **arguments).passes
    )


def test_thirty_random_shardings_give_the_same_tensors_and_alpha(tmp_path: Path) -> None:
    base, models = checkpoints(torch.bfloat16)
    expected = lm.merge(base, models, "ties", density=0.3)
    alphas = set()
    for seed in range(30):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        paths = [
            write(root / str(t), state, rng.randint(1, 5), rng)
            for t, state in enumerate([base, *models])
        ]
        report = lm.merge_files(
            paths[0],
            paths[1:],
            root / "out",
            "ties",
            density=0.3,
            threads=rng.randint(1, 3),
            max_memory=rng.choice(["72MiB", "100MiB", "1GiB"]),
            shard_size=rng.choice(["10kB", "300kB", "5GB"]),
            progress=False,
        )
        same(read(root / "out"), expected)
        alphas.add(report.alpha)
        shutil.rmtree(root)
    assert len(alphas) == 1


def test_output_is_a_checkpoint_folder(family: Any, tmp_path: Path) -> None:
    (_, _), base, models = family
    (base / "tokenizer.json").write_text("{}")
    (base / "notes.bin2").write_text("not copied")
    out = tmp_path / "nested" / "out"
    report = lm.merge_files(
        base, models, out, shard_size="150kB", dtype="float32", verify=True, progress=False
    )
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(
        [
            "config.json",
            "tokenizer.json",
            "lines_merge.json",
            "model.safetensors.index.json",
            *report.files,
        ]
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    state = read(out)
    assert index["metadata"]["total_size"] == sum(
        v.numel() * v.element_size() for v in state.values()
    )
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert torch.equal(handle.get_tensor(name), state[name])
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert all(value.dtype == torch.float32 for name, value in state.items() if name != "counter")
    for file in report.files:
        header = int.from_bytes((out / file).read_bytes()[:8], "little")
        assert header % 8 == 0
    assert report.bytes_written == sum((out / file).stat().st_size for file in report.files)


def test_result_opens_in_transformers(tmp_path: Path, torchvision_operators: None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    paths = []
    for seed in range(3):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.005 * seed * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / str(seed), max_shard_size="8kB")
        paths.append(tmp_path / str(seed))
    options = {"density": 0.5, "alpha": 0.6}
    lm.merge_files(
        paths[0], paths[1:], tmp_path / "out", "ties", shard_size="10kB", progress=False, **options
    )
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    expected = lm.merge(paths[0], paths[1:], "ties", **options)
    for name, value in expected.items():
        assert torch.equal(merged.state_dict()[name], value)


def test_a_head_that_the_config_ties_is_written_once(tmp_path: Path) -> None:
    base = make_state()
    embed = {"embed_tokens.weight": base.pop("embed.weight")}
    tied = {**base, **embed, "lm_head.weight": embed["embed_tokens.weight"].clone()}
    tuned = make_finetuned(tied, 1)
    expected = lm.edit(
        {**base, **embed}, {n: v for n, v in tuned.items() if "lm_head" not in n}, 0.5
    )
    for number, (start, end) in enumerate(
        [
            (tied, tuned),
            ({**base, **embed}, tuned),
            (tied, {n: v for n, v in tuned.items() if "lm_head" not in n}),
        ]
    ):
        folders = [
            write(tmp_path / f"{number}{part}", state) for part, state in (("b", start), ("m", end))
        ]
        with pytest.raises(lm.KeyMismatchError) if len(start) != len(end) else nullcontext():
            lm.merge_files(folders[0], folders[1:], tmp_path / f"{number}x", progress=False)
        for folder in folders:
            (folder / "config.json").write_text('{"tie_word_embeddings": true}')
        out = tmp_path / f"{number}out"
        lm.merge_files(folders[0], folders[1:], out, alpha=0.5, beta=0.5, progress=False)
        same(read(out), expected)


def test_recipe_of_a_report_makes_the_same_bytes(family: Any, tmp_path: Path) -> None:
    _, base, models = family
    named = {f"task-{t}": path for t, path in enumerate(models)}
    depth = lm.DepthMap.from_patterns("blocks.{i}.")
    report = lm.merge_files(
        base,
        named,
        tmp_path / "one",
        "dare_ties",
        p=0.3,
        seed=5,
        beta=0.9,
        depth=depth,
        dtype=torch.float16,
        outside="depth",
        progress=False,
    )
    again = lm.run_recipe(json.loads(json.dumps(report.recipe)), tmp_path / "two", progress=False)
    from_file = json.loads((tmp_path / "one" / "lines_merge.json").read_text())
    third = lm.run_recipe(from_file["recipe"], tmp_path / "three", progress=False)
    assert from_file["alpha"] == report.alpha == again.alpha == third.alpha
    for name in report.files:
        content = (tmp_path / "one" / name).read_bytes()
        assert (
            content
            == (tmp_path / "two" / name).read_bytes()
            == (tmp_path / "three" / name).read_bytes()
        )
    with pytest.raises(ValueError, match="the recipe lacks base, models"):
        lm.run_recipe({}, tmp_path / "four")


def test_what_cannot_be_written_down_has_no_recipe(family: Any, tmp_path: Path) -> None:
    (state, _), base, models = family
    one = lm.merge_files(state, models, tmp_path / "one", progress=False)
    two = lm.merge_files(base, models, tmp_path / "two", outside=lambda name: 0.5, progress=False)
    three = lm.merge_files(
        base, models, tmp_path / "three", lm.BaseMerge.__subclasses__()[0](), progress=False
    )
    assert (one.recipe, two.recipe, three.recipe) == (None, None, None)
    assert not (tmp_path / "one" / "lines_merge.json").exists()


def test_sweep_writes_every_beta_from_one_reading(family: Any, tmp_path: Path) -> None:
    (base, models), base_path, paths = family
    reports = lm.sweep_files(
        base_path, paths, tmp_path / "grid", [0.1, 0.5], "ties", density=0.4, progress=False
    )
    alone = lm.merge_files(
        base_path, paths, tmp_path / "one", "ties", beta=0.1, density=0.4, progress=False
    )
    assert [report.beta for report in reports] == [0.1, 0.5]
    assert reports[1].bytes_read == alone.bytes_read
    for beta in (0.1, 0.5):
        same(
            read(tmp_path / "grid" / f"beta-{beta}"),
            lm.merge(base, models, "ties", beta=beta, density=0.4),
        )
    for betas in ([], [0.1, 0.1]):
        with pytest.raises(ValueError, match="betas must be different numbers"):
            lm.sweep_files(base_path, paths, tmp_path / "other", betas)
    with pytest.raises(ValueError, match="beta must be finite"):
        lm.sweep_files(base_path, paths, tmp_path / "other", [float("nan")])


def test_portable_path_reads_and_writes_the_same(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, models = family
    lm.merge_files(base, models, tmp_path / "posix", "ties", threads=2, progress=False)
    monkeypatch.setattr(files_module, "POSITIONAL", False)
    monkeypatch.setattr(files_module, "ADVICE", False)
    lm.merge_files(
        base, models, tmp_path / "portable", "ties", threads=2, progress=False, verify=True
    )
    name = "model.safetensors"
    assert (tmp_path / "posix" / name).read_bytes() == (tmp_path / "portable" / name).read_bytes()


def test_inputs_larger_than_memory_are_dropped_behind(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, models = family
    dropped: list[int] = []
    if files_module.ADVICE:
        real = os.posix_fadvise

        def advise(fd: int, offset: int, length: int, advice: int) -> None:
            dropped.append(advice)
            real(fd, offset, length, advice)

        monkeypatch.setattr(os, "posix_fadvise", advise)
    expected = lm.merge_files(base, models, tmp_path / "one", progress=False)
    assert not files_module.ADVICE or os.POSIX_FADV_DONTNEED not in dropped
    monkeypatch.setattr("lines_merge.io.stream.physical_memory", lambda: 1000)
    lm.merge_files(base, models, tmp_path / "two", progress=False)
    assert not files_module.ADVICE or os.POSIX_FADV_DONTNEED in dropped
    for name in expected.files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_mapping_or_module_can_be_merged_into_files(family: Any, tmp_path: Path) -> None:
    (base, models), _, paths = family
    lm.merge_files(base, [models[0], *paths[1:]], tmp_path / "out", progress=False)
    same(read(tmp_path / "out"), lm.merge(base, models))


# Safety of the output


def test_a_folder_that_is_not_empty_is_kept(family: Any, tmp_path: Path) -> None:
    _, base, models = family
    out = tmp_path / "out"
    out.mkdir()
    lm.merge_files(base, models, out, progress=False)  # an empty one is fine
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        lm.merge_files(base, models, out, beta=0.9, progress=False)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "old.txt").write_text("gone afterwards")
    lm.merge_files(base, models, out, beta=0.9, overwrite=True, progress=False)
    assert (out / "model.safetensors").read_bytes() != before
    assert not (out / "old.txt").exists()
    file = tmp_path / "file"
    file.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is a file"):
            lm.merge_files(base, models, file, overwrite=overwrite, progress=False)
    assert file.read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_an_input_is_never_the_output(family: Any, tmp_path: Path) -> None:
    _, base, models = family
    file = models[0] / "model.safetensors"
    for out in (base, models[1], base.parent / "base" / "." / ".", base.parent, base.parent.parent):
        with pytest.raises(ValueError, match="is or holds an input"):
            lm.merge_files(base, models, out, overwrite=True, progress=False)
    for out in (models[0], file):
        with pytest.raises(ValueError, match="is or holds an input"):
            lm.merge_files(base, [file], out, overwrite=True, progress=False)
    with pytest.raises(FileExistsError, match="is a file"):
        lm.merge_files(base, models, file, overwrite=True, progress=False)
    assert file.exists()


def test_a_link_to_the_output_goes_on_pointing_to_it(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, models = family
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    for _ in range(3):  # dangling, then to a folder that is not empty
        lm.merge_files(base, models, link, overwrite=True, progress=False)
        assert link.is_symlink()
        assert (real / "model.safetensors").exists()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lm.merge_files(base, models, ".", progress=False)
    assert (here / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link", "real"]


def test_leftovers_of_killed_runs_go_and_those_of_live_ones_stay(
    family: Any, tmp_path: Path
) -> None:
    _, base, models = family
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getppid(), "x"):
        (tmp_path / f".out.partial-{pid}").mkdir()
    lm.merge_files(base, models, tmp_path / "out", progress=False)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"out", f".out.partial-{os.getppid()}", ".out.partial-x"}


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_progress_never_exceeds_its_total(family: Any, tmp_path: Path, density: float) -> None:
    _, base, models = family
    calls: list[tuple[int, int]] = []
    lm.merge_files(
        base,
        models,
        tmp_path / "out",
        "ties",
        density=density,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1]
    assert all(done <= total for done, total in calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_models_may_come_from_a_generator(family: Any, tmp_path: Path) -> None:
    _, base, models = family
    lm.merge_files(base, (path for path in models), tmp_path / "a", progress=False)
    lm.merge_files(base, models, tmp_path / "b", progress=False)
    first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert first == second


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, models = family
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match="GB to write") as info:
        lm.merge_files(base, models, tmp_path / "out", progress=False)
    assert info.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_failed_merge_leaves_nothing(family: Any, tmp_path: Path) -> None:
    (base, _), base_path, _ = family
    broken = {**base, "norm.weight": base["norm.weight"] * float("nan")}
    path = write(tmp_path / "broken", broken)
    with pytest.raises(lm.NonFiniteError):
        lm.merge_files(base_path, [path], tmp_path / "sub" / "out", progress=False)
    assert list((tmp_path / "sub").iterdir()) == []


def test_verify_notices_bytes_that_changed(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, models = family
    real = files_module.WriteFile.write

    def flip(self: Any, data: memoryview, offset: int) -> None:
        damaged = bytearray(data)
        if len(damaged) > 5000:
            damaged[500] ^= 1
        real(self, memoryview(damaged), offset)

    monkeypatch.setattr(files_module.WriteFile, "write", flip)
    with pytest.raises(lm.CheckpointError, match="differ from what was written"):
        lm.merge_files(base, models, tmp_path / "out", verify=True, progress=False)
    assert list(tmp_path.iterdir()) == []


SLOW_MERGE = """
import sys, time, torch
import lines_merge as lm
from lines_merge.io import output
real = output.FileSink.flush
def flush(self, *arguments):
    real(self, *arguments)
    sys.stdout.write("wrote\\n")  # one write, since two threads may arrive together
    sys.stdout.flush()
    time.sleep(0.2)
output.FileSink.flush = flush
base, model, out = sys.argv[1:]
lm.merge_files(base, [model], out, alpha=0.5, progress=False, overwrite=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("existing", [False, True])
def test_killed_while_writing_leaves_nothing_under_the_final_name(
    family: Any, tmp_path: Path, existing: bool
) -> None:
    _, base, models = family
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("still here")
    command = [sys.executable, "-c", SLOW_MERGE, str(base), str(models[0]), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "wrote\n"
        assert process.stdout.readline() == "wrote\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("[!.]*")] == (["out"] if existing else [])
    if existing:
        assert [path.name for path in out.iterdir()] == ["old"]
    lm.merge_files(base, models[:1], out, alpha=0.5, overwrite=True, progress=False)
    assert (out / "model.safetensors").exists()


# Memory


MEASURE = """
import json, os, re, sys, threading, time
import torch, lines_merge as lm
from lines_merge.io import stream
base, out, cap, method, *models = sys.argv[1:]
def anonymous():
    text = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024
lm.merge(dict(w=torch.zeros(4)), [dict(w=torch.ones(4))], lines=False)  # allocator and thread pools
idle, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
lm.merge_files(base, models, out, method, alpha=0.5, max_memory=cap, threads=2, progress=False)
done = True
watcher.join()
print(peak - idle)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base and three models, 96 MB each in bfloat16."""
    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    base = {f"blocks.{i}.fc.weight": torch.randn(2000, 2000).bfloat16() for i in range(12)}
    paths = [write(root / "base", base, 2)]
    for t in range(3):
        tuned = {n: (v.float() + 0.02 * torch.randn(v.shape)).bfloat16() for n, v in base.items()}
        paths.append(write(root / f"m{t}", tuned, 2))
    return paths


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_memory_stays_below_the_cap(large: list[Path], tmp_path: Path, method: str) -> None:
    cap = 96 * 2**20  # a quarter of the inputs, less than one model
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(large[0]),
        str(tmp_path / "out"),
        str(cap),
        method,
    ]
    result = subprocess.run(
        [*command, *map(str, large[1:])], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) <= cap


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_merge_survives_a_hard_limit_of_the_kernel(large: list[Path], tmp_path: Path) -> None:
    """The process may not allocate more than the cap above what the interpreter holds already."""
    limit = textwrap.dedent(
        """
        import re, resource, sys, torch, lines_merge as lm
        base, out, *models = sys.argv[1:]
        small = dict(w=torch.zeros(4))
        lm.merge(small, [dict(w=torch.ones(4))], lines=False)
        data = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        # address space of two worker threads' stacks and heaps counts as data, too
        threads = 2 * (8 + 64) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (data + threads + 96 * 2**20,) * 2)
        try:
            torch.empty(400 * 2**20, dtype=torch.uint8)
        except RuntimeError:
            print("limited")
        lm.merge_files(base, models, out, "ties", alpha=0.5, max_memory="96MiB", threads=2, progress=False)
        """
    )
    command = [
        sys.executable,
        "-c",
        limit,
        str(large[0]),
        str(tmp_path / "out"),
        *map(str, large[1:]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "limited\n"
    assert (tmp_path / "out" / "model.safetensors").exists()


EDIT_IN_PLACE = """
import re, sys, torch, lines_merge as lm
from safetensors.torch import load_file
def anonymous(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
base, model = sys.argv[1:]
module = torch.nn.Module()
module.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(12))
for block in module.blocks:
    block.fc = torch.nn.Linear(2000, 2000, bias=False, dtype=torch.bfloat16)
small = torch.nn.Sequential(torch.nn.Linear(2, 2))
lm.edit_(small, small.state_dict(), alpha=0.5, beta=0.0)
before = anonymous("VmRSS")
lm.edit_(module, base, 0.5)
print(anonymous("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_editing_in_place_needs_less_than_the_largest_tensor(large: list[Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EDIT_IN_PLACE, str(large[0]), str(large[1])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = 2000 * 2000 * 2
    # the reading buffer of 2 MiB, the cells, and pages of the library that are touched first here
    assert int(result.stdout) <= largest + 16 * 2**20


def test_too_little_memory_is_refused(family: Any, tmp_path: Path) -> None:
    _, base, models = family
    with pytest.raises(
        ValueError, match=r"max_memory must be at least \d+ MiB for 3 models, got 10 MiB"
    ):
        lm.merge_files(base, models, tmp_path / "out", max_memory="10MiB", progress=False)


def test_peak_memory_of_the_plan_does_not_depend_on_the_model(large: list[Path]) -> None:
    tiny = {"blocks.0.fc.weight": torch.ones(2, 2).bfloat16()}
    small = lm.plan_files(tiny, [tiny] * 3, "ties", lines=False, max_memory="256MiB")
    big = lm.plan_files(large[0], large[1:], "ties", max_memory="256MiB")
    assert small.peak_memory == big.peak_memory <= 256 * 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("5GB", 5 * 10**9),
        ("512 mib", 512 * 2**20),
        ("3k", 3000),
        (17, 17),
        ("8b", 8),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize("text", ["much", "-1GB", 0, -3, "1 GiBs", True, "", "1.2.3GB"])
def test_wrong_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="max_memory must"):
        parse_size(text, "max_memory")


# Plan and progress


def test_plan_counts_passes_and_bytes(family: Any) -> None:
    (base, _), base_path, paths = family
    size = sum(value.numel() * value.element_size() for value in base.values())
    cases = {
        ("average", ()): ("write",),
        ("task_arithmetic", ()): ("write",),
        ("task_arithmetic", (("weights", (1, 2, 1)),)): ("norms", "write"),
        ("consensus", ()): ("norms", "write"),
        ("consensus", (("alpha", 0.5),)): ("write",),
        ("ties", (("scope", "tensor"),)): ("statistics 1", "norms", "write"),
        ("ties", ()): ("statistics 1", "norms", "write"),
        ("ties", (("alpha", 0.5),)): ("statistics 1", "write"),
        ("ties", (("density", 1.0), ("alpha", 0.5))): ("write",),
    }
    for (method, arguments), passes in cases.items():
        plan = lm.plan_files(base_path, paths, method, **dict(arguments))
        assert plan.passes == passes
        assert plan.bytes_per_pass == 4 * size - 3 * 8  # integers are read from the base alone
    assert plan.bytes_written > size
    assert "passes       1 (write)" in str(plan)


def test_report_counts_what_was_read(family: Any, tmp_path: Path) -> None:
    _, base, paths = family
    plan = lm.plan_files(base, paths, "consensus")
    report = lm.merge_files(
        base, paths, tmp_path / "out", "consensus", max_memory="72MiB", progress=False
    )
    integers = 8  # copied once, in the writing pass
    assert report.passes == 2
    assert report.bytes_read == 2 * plan.bytes_per_pass - integers
    assert report.gb_per_s > 0
    assert report.to_dict()["gb_per_s"] == report.gb_per_s
    json.dumps(report.to_dict())


def test_progress_reaches_the_total(
    family: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    _, base, paths = family
    seen: list[tuple[int, int]] = []
    lm.merge_files(
        base,
        paths,
        tmp_path / "a",
        "consensus",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    lm.merge_files(base, paths, tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    lm.merge_files(base, paths, tmp_path / "c")
    assert "100 %" in capsys.readouterr().err
    monkeypatch.undo()
    lm.merge_files(base, paths, tmp_path / "d")
    assert "100%" in capsys.readouterr().err


def test_passes_hit_memory_where_the_inputs_fit(
    family: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    _, base, paths = family
    read_bytes = 0
    real = files_module.ReadFile.read_into

    def count(self: Any, target: memoryview, offset: int) -> None:
        nonlocal read_bytes
        read_bytes += len(target)
        real(self, target, offset)

    monkeypatch.setattr(files_module.ReadFile, "read_into", count)
    report = lm.merge_files(
        base, paths, tmp_path / "out", "ties", max_memory="1GiB", threads=1, progress=False
    )
    assert report.passes >= 3
    assert read_bytes < 1.2 * report.bytes_read / report.passes


def test_the_default_number_of_threads(family: Any, monkeypatch: Any) -> None:
    _, base, paths = family
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
        assert lm.plan_files(base, paths).threads == 3
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert lm.plan_files(base, paths).threads == 4
    assert lm.plan_files(base, paths, threads=6).threads == 6
    with pytest.raises(ValueError, match="threads must be at least 1"):
        lm.plan_files(base, paths, threads=0)
