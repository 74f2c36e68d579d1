"""The decoder, corpora, training, comparison, the command line, the benchmark's formulations."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from torch import Tensor, nn

from denseformer import DWA, Geometry, analysis, cli
from denseformer.recipes import bench, corpora, data
from denseformer.recipes.compare import compare, paired, pearson
from denseformer.recipes.gpt import GPT, GPTConfig, rotate
from denseformer.recipes.train import TrainConfig, evaluate, rate, train, variants

TINY = TrainConfig(GPTConfig(depth=5, width=16, num_heads=2, context=8), steps=6, batch=2, every=3)


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.from_bytes("text", b"the quick brown fox jumps over the lazy dog. " * 60)


# Model


@pytest.mark.parametrize(
    ("depth", "millions"), [(48, 378.45), (64, 491.72), (72, 548.35), (90, 675.78)]
)
def test_parameter_counts_of_the_paper(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(depth, 768, 12, 50304, 256, baseline="plain"))
    count = sum(p.numel() for p in model.parameters())
    assert count == depth * 12 * 768**2 + 50304 * 768 + (2 * depth + 1) * 768
    assert round(count / 1e6, 2) == millions


def test_rotary_turns_interleaved_pairs() -> None:
    """Pair n at time t turns by t·10000^(-2n/channels), as multiplication of complex numbers."""
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * 10_000.0 ** (-torch.arange(0, 6, 2) / 6)
    turned = torch.view_as_complex(x.view(2, 5, 3, 2)) * torch.polar(torch.ones(5, 3), angles)
    torch.testing.assert_close(
        rotate(x), torch.view_as_real(turned).flatten(-2), rtol=1e-6, atol=1e-6
    )


def test_decoder_is_causal_and_bad_shapes_are_refused() -> None:
    model = GPT(GPTConfig(depth=3))
    x = torch.randint(256, (2, 10))
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    torch.testing.assert_close(model(x)[:, :-1], model(changed)[:, :-1])
    with pytest.raises(ValueError, match="baseline must be one of dense, plain"):
        GPTConfig(baseline="x")
    with pytest.raises(ValueError, match="width=10 must be an even multiple of num_heads=4"):
        GPTConfig(width=10)


def test_all_variants_start_equal_to_the_last_bit(corpus: data.Corpus) -> None:
    names = ("plain", "dense", "gains", "last_k", "final")
    outs = []
    for name in names:
        torch.manual_seed(3)
        model = GPT(replace(TINY.model, baseline=name))
        outs.append(model(corpus.train[:16].view(2, 8), corpus.train[1:17].view(2, 8)))
    assert all(torch.equal(out, outs[0]) for out in outs)
    expected = math.log(256)  # nearly uniform at the start
    assert abs(float(outs[0].detach()) - expected) < 0.5


# Training


def test_schedule_is_the_published_one() -> None:
    """Against torch's OneCycleLR with 5 % warm-up, from lr/100 up to lr and down to lr/10."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = 200
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=0.05, div_factor=100, final_div_factor=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    assert rate(0, steps) == pytest.approx(0.01)
    assert rate(steps - 1, steps) == pytest.approx(0.1)
    worst = 0.0
    for step in range(steps - 1):
        worst = max(worst, abs(rate(step, steps) - one_cycle.get_last_lr()[0]))
        optimizer.step()
        one_cycle.step()
    assert worst < 0.15  # OneCycleLR reaches the top one step earlier
    assert max(rate(s, steps) for s in range(steps)) == pytest.approx(1.0)


def test_training_learns_and_records(corpus: data.Corpus) -> None:
    seen: list[str] = []
    result = train(replace(TINY, steps=40, every=20), corpus.tokens, seen.append)
    assert list(result.validation) == [20, 40]
    assert result.validation[40] < result.first_loss
    assert len(seen) == 2
    assert result.history is not None
    assert result.history.steps == [20, 40]
    assert result.validation[40] == pytest.approx(evaluate(result.model, corpus.validation))
    assert json.dumps(result.summary())


def test_evaluation_is_the_mean_over_windows(corpus: data.Corpus) -> None:
    model = GPT(TINY.model)
    tokens = corpus.validation[: 8 * 5 + 1]
    losses = [
        float(model(tokens[None, i : i + 8], tokens[None, i + 1 : i + 9]).detach())
        for i in range(0, 40, 8)
    ]
    assert evaluate(model, tokens, batch=2) == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_delayed_averages_stay_at_the_identity(corpus: data.Corpus) -> None:
    late = train(replace(TINY, delay=6), corpus.tokens)
    dwa = late.model.stack.dwa
    assert torch.equal(dwa.matrix(), DWA(5).matrix())
    plain = train(replace(TINY, model=replace(TINY.model, baseline="plain")), corpus.tokens)
    assert late.validation == plain.validation
    half = train(replace(TINY, delay=3), corpus.tokens)
    assert not torch.equal(half.model.stack.dwa.matrix(), DWA(5).matrix())


@pytest.mark.slow
def test_bfloat16_and_compilation_change_a_run_by_rounding_only(
    corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(TINY, corpus.tokens)
    used: list[nn.Module] = []
    make = torch.compile

    def compile_(model: nn.Module) -> Any:
        used.append(model)
        return make(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = train(replace(TINY, compile=True), corpus.tokens)
    assert len(used) == 1
    assert compiled.validation[6] == pytest.approx(plain.validation[6], abs=1e-5)
    low = train(replace(TINY, bf16=True), corpus.tokens)
    assert low.validation != plain.validation
    # bfloat16 keeps 8 bits; the loss is about 5.5
    assert low.validation[6] == pytest.approx(plain.validation[6], abs=0.05)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_accumulated_parts_make_the_step_of_the_whole_batch(corpus: data.Corpus) -> None:
    whole, parts = (
        train(replace(TINY, batch=6, accumulate=n), corpus.tokens).model.state_dict()
        for n in (1, 3)
    )
    for name, value in whole.items():
        # float32, six AdamW steps of 1e-3 whose gradients are summed in another order
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-4, msg=name)
    with pytest.raises(ValueError, match="accumulate=4 does not divide batch=6"):
        replace(TINY, batch=6, accumulate=4)


def test_dropout_is_drawn_alike_by_every_variant_and_off_in_evaluation(
    corpus: data.Corpus,
) -> None:
    config = replace(TINY.model, dropout=0.3)
    x = corpus.train[:16].view(2, 8)
    outs = []
    for name in ("plain", "dense"):
        torch.manual_seed(3)
        model = GPT(replace(config, baseline=name))
        torch.manual_seed(4)
        outs.append((model(x), model.eval()(x)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert not torch.equal(outs[0][0], outs[0][1])
    undropped = GPT(replace(config, dropout=0.0))
    undropped.load_state_dict(model.state_dict())  # dropout adds no key
    assert torch.equal(undropped(x), outs[1][1])
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout must be in"):
            replace(config, dropout=bad)


def test_a_token_file_trains_as_its_tokens_in_memory(corpus: data.Corpus, tmp_path: Path) -> None:
    files = []
    for name, part in (("a", corpus.train), ("b", corpus.validation)):
        corpora.write_tokens([""], tmp_path / name, lambda _, part=part: part.tolist())
        files.append(corpora.read_tokens(tmp_path / name))
    assert [f.dtype for f in files] == [torch.int16] * 2
    model = replace(TINY.model, vocab=corpora.VOCABULARY)
    long = [corpora.tokens(f) for f in files]
    runs = [train(replace(TINY, model=model), (a, b)) for a, b in (files, long)]
    assert runs[0].validation == runs[1].validation
    assert runs[0].first_loss == runs[1].first_loss


@pytest.mark.slow
def test_trained_averages_are_not_trivial() -> None:
    """Twelve blocks, 300 steps: weights beside the diagonal grow to the hundredths, as in the paper."""
    base = TrainConfig(GPTConfig(depth=12, width=32, num_heads=2), steps=300, every=300)
    found = train(base, data.pydoc().tokens)
    dwa = found.model.stack.dwa
    assert float(analysis.off_diagonal(dwa).abs().mean()) > 0.01
    first = dwa.matrix()[:, 0]
    assert first[0] > 0.01  # X_0 is added for early rows
    assert first[-1] < 0  # and taken away for the last


def test_comparison_pairs_seeds(corpus: data.Corpus) -> None:
    runs: list[str] = []
    found = compare(TINY, corpus, [0, 1], on_run=lambda name, result, numbers: runs.append(name))
    assert runs == ["plain", "1x1", "4x5", "gains"] * 2
    summary = found["summary"]
    for name in ("1x1", "4x5", "gains"):
        assert summary[name]["equal_first_loss"]
        gaps = [
            a["validation"][6] - b["validation"][6]
            for a, b in zip(found["runs"][name], found["runs"]["plain"], strict=True)
        ]
        assert summary[name]["difference"] == pytest.approx(sum(gaps) / 2)
        assert summary[name]["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    assert "cosine" in found["runs"]["plain"][0]
    assert len(found["runs"]["1x1"][0]["first_column"]) == 5
    assert json.dumps(found)
    assert set(variants(TINY)) == {"plain", "1x1", "4x5", "gains"}
    assert math.isnan(paired([1.0], [0.5])[1])
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6])) == pytest.approx(1.0)


# Data


def test_the_built_in_text_is_english_and_carries_its_checksum() -> None:
    found = data.pydoc()
    assert found.size > 300_000
    raw = bytes(torch.cat(found.tokens).to(torch.uint8).tolist())
    assert hashlib.sha256(raw).hexdigest() == found.sha256
    assert len(found.train) == found.size * 9 // 10
    assert b" the " in raw


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 2000)
    assert data.text_file(tmp_path / "a.txt").size == 2000
    (tmp_path / "b.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"b\.txt has 1 bytes"):
        data.text_file(tmp_path / "b.txt")


def test_downloads_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, packed = b"to be or not to be " * 100, io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("enwik8", text)
    (tmp_path / "input.txt").write_bytes(text)
    (tmp_path / "enwik8.zip").write_bytes(packed.getvalue())
    known = hashlib.sha256(text).hexdigest()
    urls = {
        "tinyshakespeare": ((tmp_path / "input.txt").as_uri(), known),
        "enwik8": ((tmp_path / "enwik8.zip").as_uri(), None),
    }
    monkeypatch.setattr(data, "URLS", urls)
    cache = tmp_path / "cache"
    monkeypatch.setenv("DENSEFORMER_DATA", str(cache))
    assert data.download("tinyshakespeare").size == len(text)
    assert "downloading" in capsys.readouterr().err
    enwik8 = data.download("enwik8", cache)
    assert enwik8.sha256 == known
    assert enwik8.test is not None
    sizes = [len(part) for part in (enwik8.train, enwik8.validation, enwik8.test)]
    assert sizes == [len(text) * share // 20 for share in (18, 1, 1)]
    parts = torch.cat([enwik8.train, enwik8.validation, enwik8.test])
    assert bytes(parts.tolist()) == text
    assert (cache / "enwik8.zip.sha256").exists()
    assert not capsys.readouterr().err.count("input.txt")
    for name in ("input.txt", "enwik8.zip"):
        (cache / name).write_bytes(b"tampered" * 300)
    for name in urls:
        with pytest.raises(ValueError, match="has SHA-256"):
            data.download(name)
    with pytest.raises(ValueError, match="name must be one of tinyshakespeare, enwik8; got 'x'"):
        data.download("x")
    monkeypatch.delenv("DENSEFORMER_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_dir() == tmp_path / "denseformer"


# The depth-copy task: what averages can do that a stack cannot


def test_depth_copy_reaches_the_least_squares_optimum() -> None:
    """Frozen random blocks, a linear read-out that wants X_0: only α of the last row can bring it there."""
    from denseformer.recipes.depth_copy import solve

    found = solve(depth=8, steps=300, seed=0)
    assert found.plain > 5 * found.optimum
    assert found.learned <= 1.01 * found.optimum + 1e-9
    assert abs(found.first_weight) > 0.3


# Benchmark formulations


@pytest.mark.parametrize(("k", "p"), [(1, 1), (2, 1), (4, 5)])
def test_all_formulations_compute_the_same(k: int, p: int) -> None:
    spec = Geometry(9, k, p)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(spec.nnz, generator=generator)
    x = torch.randn(4, 8, generator=generator).requires_grad_()
    results: list[list[Tensor]] = []
    for name in ("naive loop", "ours", "preallocated slab"):
        model = bench.METHODS[name](spec)
        with torch.no_grad():
            model.weight.copy_(weights)
        y = model(x, torch.sin)
        results.append([y, *torch.autograd.grad(y.sum(), [x, model.weight])])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert relative(a, b) < 1e-5


def test_measuring_returns_every_method() -> None:
    names = ("plain", "ours", "naive loop", "preallocated slab")
    for train_too in (True, False):
        found = bench.measure(4, numel=256, repeats=1, train=train_too)
        assert tuple(found) == names
        assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_compiled_loop_computes_the_same() -> None:
    torch._dynamo.reset()
    spec, x = Geometry(4), torch.randn(4, 8)
    torch.testing.assert_close(bench.compiled(spec)(x, torch.sin), bench.Ours(spec)(x, torch.sin))


# Command line


def run(capsys: Any, *argv: str) -> Any:
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_inspect_and_plot(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    options = [
        "--depth", "5", "--width", "16", "--num-heads", "2", "--context", "8", "--batch", "2",
        "--steps", "4", "--every", "2", "--data", str(text),
    ]  # fmt: skip
    found = run(capsys, "train", *options, "--out", str(tmp_path / "out"), "--dilation", "2")
    assert list(found["validation"]) == ["2", "4"]
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["first_loss"]
        == found["first_loss"]
    )
    checkpoint = str(tmp_path / "out" / "model.safetensors")
    seen = run(capsys, "inspect", checkpoint)
    assert seen["weights"] == Geometry(5, 2).nnz
    assert seen["geometry"].startswith("2x1, depth 5")
    assert len(seen["largest"]) == min(10, seen["weights"] - 5)
    picture = tmp_path / "alpha.png"
    assert run(capsys, "plot", checkpoint, str(picture))["written"] == str(picture)
    assert picture.stat().st_size > 5000
    assert cli.main(["train", *options, "--baseline", "gains", "--quiet"]) == 0
    assert "first_loss" in capsys.readouterr().out
    summary = run(capsys, "train", *options, "--compare", "1", "--out", str(tmp_path / "all"))
    assert set(summary) == {"plain", "1x1", "4x5", "gains"}


@pytest.mark.parametrize("name", ["openwebtext2", "pg19"])
def test_train_on_a_corpus_of_tokens(name: str, tmp_path: Path, capsys: Any) -> None:
    """From token files that are there already, so that nothing is downloaded."""
    folder = tmp_path / "pg19" if name == "pg19" else tmp_path
    for part in ("train", "validation"):
        numbers = list(range(50_000, 50_200))
        corpora.write_tokens([""], folder / f"{name}-{part}.bin", lambda _, ids=numbers: ids)
    options = [
        "--depth", "2", "--width", "8", "--num-heads", "2", "--context", "8", "--batch", "2", "--steps",
        "2", "--quiet",
    ]  # fmt: skip
    found = run(capsys, "train", "--data", name, "--data-dir", str(tmp_path), *options)
    assert found["first_loss"] == pytest.approx(math.log(corpora.VOCABULARY), abs=0.5)
    assert found["corpus"]["bytes"] == 2 * 2 * 201
    with pytest.raises(ValueError, match="name must be one of openwebtext2, pg19; got 'x'"):
        corpora.load("x")


def test_suggest_and_bench(capsys: Any) -> None:
    found = run(capsys, "suggest", "--depth", "48")
    assert {"dilation": 4, "period": 5, "rows": 9, "weights": 62, "traffic": 71, "live": 8} in found
    assert cli.main(["suggest", "--depth", "12", "--most", "3"]) == 0
    assert "dilation" in capsys.readouterr().out
    found = run(capsys, "bench", "--depth", "3", "--numel", "64", "--repeats", "1")
    assert "ours (ms)" in found
    assert "compiled loop (ms)" not in found


def test_bad_input_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "none.pt")
    mask = torch.ones(2, 3, dtype=torch.bool).tril(1)
    torch.save(DWA(2, pattern=mask).state_dict(), tmp_path / "mask.pt")
    for argv, message in (
        (["inspect", str(tmp_path / "none.pt")], "holds 0 sets of averages"),
        (["inspect", str(tmp_path / "mask.pt")], "mask"),
        (["inspect", str(tmp_path / "missing.pt")], "missing.pt"),
        (["suggest", "--depth", "0"], "depth must be at least 1"),
        (["train", "--data", str(tmp_path / "no.txt")], "no.txt"),
    ):
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--baseline", "x"])
    assert stop.value.code == 2


def test_a_plain_checkpoint_of_torch_save_is_read(tmp_path: Path) -> None:
    dwa = DWA(4, pattern="last_k", last_k=2)
    torch.save({f"dwa.{k}": v for k, v in dwa.state_dict().items()}, tmp_path / "x.pt")
    assert cli.read_dwa(tmp_path / "x.pt").spec == dwa.spec
    assert analysis.off_diagonal(dwa).abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("junk.safetensors", "is no checkpoint"),
        ("junk.pt", "is no checkpoint"),
        ("list.pt", "holds a list"),
        ("names.pt", "holds 0 sets"),
        ("lone.pt", "holds 0 sets"),
        ("format.pt", "unknown format"),
        ("short.pt", r"holds \(4,\) weights"),
    ],
)
def test_unreadable_checkpoints_exit_with_2(
    name: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    geometry = DWA(3).geometry
    made: dict[str, Any] = {
        "list.pt": [1, 2],
        "names.pt": {"geometry": 3},
        "lone.pt": {"geometry": geometry},
        "format.pt": {"geometry": geometry + 9, "weight": torch.ones(9)},
        "short.pt": {"geometry": geometry, "weight": torch.ones(4)},
    }
    path = tmp_path / name
    if name in made:
        torch.save(made[name], path)
    else:
        path.write_bytes(b"junk, not a checkpoint")
    assert cli.main(["inspect", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "option",
    ["--num-heads 0", "--steps 0", "--every 0", "--batch 0", "--context 0", "--context 99999999",
     "--width -8", "--delay -1", "--compare 0", "--compare -1", "--dilation 0", "--dropout 1",
     "--accumulate 3", "--device nowhere"],
)  # fmt: skip
def test_training_options_out_of_range_exit_with_2(option: str, capsys: Any) -> None:
    assert cli.main(["train", "--quiet", *option.split()]) == 2
    assert option.split()[0].strip("-").replace("-", "_") in capsys.readouterr().err


def test_other_numbers_out_of_range_exit_with_2(tmp_path: Path, capsys: Any) -> None:
    torch.save(DWA(3).state_dict(), tmp_path / "x.pt")
    assert cli.main(["inspect", str(tmp_path / "x.pt"), "--top", "-3"]) == 2
    assert cli.main(["bench", "--repeats", "0"]) == 2
    assert cli.main(["bench", "--numel", "0"]) == 2
    assert capsys.readouterr().err.count("at least") == 3
