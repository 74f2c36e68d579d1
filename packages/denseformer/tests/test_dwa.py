"""The module: initialisation, types, state dicts, errors of a run, transforms."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
from conftest import oracle, randomise, relative, run_through
from torch import Tensor, nn

import denseformer.functional as F_dwa
from denseformer import DWA, DenseStack
from denseformer.core.run import DepthRun

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SINES = [torch.sin, torch.cos, torch.tanh, torch.sin, torch.cos]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STARTS: list[dict[str, Any]] = [
    {}, {"dilation": 2}, {"dilation": 4, "period": 5}, {"pattern": "last_k"}, {"pattern": "final"},
]  # fmt: skip


@pytest.mark.parametrize("kw", STARTS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_initially_the_network_is_the_plain_one_bit_for_bit(
    kw: dict[str, Any], dtype: torch.dtype
) -> None:
    """Outputs and all gradients, small and large, with and without autograd."""
    for numel in (24, 90_000):
        x0 = torch.randn(2, numel // 2).to(dtype).requires_grad_()
        outs = []
        for dwa in (None, DWA(5, **kw)):
            run, x = (dwa.begin(x0) if dwa is not None else None), x0
            for block in SINES:
                x = block(x) if run is None else run(block(x))
            outs.append((x, *torch.autograd.grad(x.float().square().sum(), x0)))
        for a, b in zip(*outs, strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            assert torch.equal(run_through(DWA(5, **kw), x0, SINES), outs[0][0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_run_in_float32_and_the_stream_keeps_its_type(dtype: torch.dtype) -> None:
    """One rounding at the end: equal to the float64 loop over the same rounded blocks, rounded once."""
    dwa = randomise(DWA(3))
    x0 = torch.randn(50, dtype=torch.float64).to(dtype)
    xs: list[Tensor] = [x0]
    run, x = dwa.begin(x0), x0
    for n, block in enumerate(SINES[:3], start=1):
        xs.append(block(x))
        x = run(xs[-1])
        exact = sum(w * t.double() for w, t in zip(dwa.row(n).double(), xs, strict=True))
        assert x.dtype == dtype
        tolerance = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-15
        assert relative(x.double(), exact) < max(tolerance, 1e-15)


def test_half_precision_saturates_to_infinity() -> None:
    dwa = DWA(1)
    with torch.no_grad():
        dwa.weight.fill_(60_000.0)
    run = dwa.begin(torch.ones(2, dtype=torch.float16))
    assert run(torch.ones(2, dtype=torch.float16)).tolist() == [float("inf")] * 2


def test_autocast_keeps_the_stream_and_its_values() -> None:
    for size in (20, 70_000):
        dwa, x0 = randomise(DWA(9)), torch.randn(size, requires_grad=True)
        blocks = [torch.sin] * 9
        y = run_through(dwa, x0, blocks)
        want = [y, *torch.autograd.grad(y.sum(), [x0, dwa.weight])]
        with torch.autocast("cpu", torch.bfloat16):
            y = run_through(dwa, x0, blocks)
            got = [y, *torch.autograd.grad(y.sum(), [x0, dwa.weight])]
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
)
def test_gradient_scaling_skips_an_overflow_and_steps_as_without(device: str) -> None:
    """float16 autocast: α's unscaled gradient is that of the loss, and an infinite one skips the step."""
    torch.manual_seed(0)
    dwa, block = DWA(3).to(device), nn.Linear(8, 8).to(device)
    start = dwa.weight.detach().clone()
    x = torch.randn(4, 8, device=device)
    optimizer = torch.optim.SGD(dwa.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)

    def loss() -> Tensor:
        with torch.autocast(device, torch.float16):
            run, y = dwa.begin(x), x
            for _ in range(3):
                y = run(y + block(y))
        assert y.dtype == torch.float32
        return y.square().mean()

    (want,) = torch.autograd.grad(loss(), [dwa.weight])
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    # float16 products of the block: 11 bits
    torch.testing.assert_close(dwa.weight.detach(), start - 0.1 * want, rtol=2e-3, atol=2e-3)
    optimizer.zero_grad()
    held = dwa.weight.detach().clone()
    scaler.scale(loss() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(dwa.weight.detach(), held)
    assert scaler.get_scale() == 2.0**9


def test_weights_stay_float32_under_every_cast() -> None:
    net = nn.Sequential(nn.Linear(2, 2), DWA(3))
    for cast in (net.bfloat16, net.half, net.double, lambda: net.to(torch.float16), net.float):
        cast()
        assert net[1].weight.dtype == torch.float32
        assert net[1].geometry.dtype == torch.int64
    assert net.bfloat16()[0].weight.dtype == torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64"):
            DWA(3, dtype=dtype)
    with pytest.raises(
        ValueError, match="backend must be one of auto, eager, reference; got 'triton'"
    ):
        DWA(3, backend="triton")


def test_nan_stays_with_its_token_and_infinity_poisons_later_blocks() -> None:
    dwa = randomise(DWA(5))
    x0 = torch.randn(4, 3)
    clean = run_through(dwa, x0, SINES)
    x0[1] = torch.nan
    dirty = run_through(dwa, x0, SINES)
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(dirty[keep], clean[keep])
    assert dirty[1].isnan().all()


def test_initial_scale_and_views() -> None:
    dwa = DWA(3, pattern="final", init_scale=1e-4)
    assert dwa.row(3).tolist() == torch.tensor([1e-4, 1e-4, 1e-4, 1.0]).tolist()
    assert dwa.row(3)._base is dwa.weight
    assert dwa.matrix()[:2].abs().sum() == 0
    with pytest.raises(ValueError, match=r"depth 2 has no average; the rows are \(3,\)"):
        dwa.row(2)
    assert "final, depth 3, 1 rows, 4 weights" in repr(dwa)


# State


def test_round_trips_of_the_state(tmp_path: Any) -> None:
    dwa = randomise(DWA(6, 2, 3))
    for other in (copy.deepcopy(dwa), pickle.loads(pickle.dumps(dwa))):
        assert torch.equal(other.weight, dwa.weight)
    buffer = io.BytesIO()
    torch.save(dwa.state_dict(), buffer)
    buffer.seek(0)
    safetensors.torch.save_file(dwa.state_dict(), tmp_path / "dwa.safetensors")
    for state in (torch.load(buffer), safetensors.torch.load_file(tmp_path / "dwa.safetensors")):
        fresh = DWA(6, 2, 3)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.weight, dwa.weight)
    fresh = DWA(6, 2, 3)
    fresh.load_state_dict({"weight": dwa.weight.detach()}, strict=True)
    assert torch.equal(fresh.weight, dwa.weight)


def test_right_after_a_forward_pass_copies_and_pickles() -> None:
    dwa = randomise(DWA(5))
    y = run_through(dwa, torch.randn(3, requires_grad=True), SINES)
    assert y.requires_grad
    assert torch.equal(copy.deepcopy(dwa).weight, dwa.weight)
    assert torch.equal(pickle.loads(pickle.dumps(dwa)).weight, dwa.weight)


def test_another_geometry_is_refused_with_both_named() -> None:
    state = DWA(6, 2, 3).state_dict()
    with pytest.raises(
        RuntimeError, match=r"depth=6, dilation=2, period=3.*depth=6, dilation=1, period=1"
    ):
        DWA(6).load_state_dict(state)
    same_size = DWA(
        3, pattern="last_k", last_k=3
    ).state_dict()  # as many weights as another geometry
    assert same_size["weight"].shape == DWA(3).weight.shape
    with pytest.raises(RuntimeError, match="last_k"):
        DWA(3).load_state_dict(same_size)


def test_the_authors_layouts_in_and_out() -> None:
    dwa = randomise(DWA(6, 2, 3))
    state = dwa.to_reference_state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "alphas.2.weight": (1, 2), "alphas.5.weight": (1, 4),
    }  # fmt: skip
    other = DWA(6, 2, 3)
    other.load_state_dict(state)
    assert torch.equal(other.weight, dwa.weight)
    grouped = randomise(DWA(6, 2, groups=2))
    state = grouped.to_reference_state_dict("weights")
    assert [tuple(v.shape) for v in state.values()] == [(1, 1), (1, 2), (1, 2)]
    assert list(state) == ["weights.0.weight", "weights.1.weight", "weights.2.weight"]
    holder = nn.ModuleDict({"inner": DWA(6, 2, groups=2)})
    holder.load_state_dict({f"inner.{k}": v for k, v in state.items()})
    assert torch.equal(holder["inner"].weight, grouped.weight)
    with pytest.raises(RuntimeError, match=r"rows N of \{0: 1, 1: 2, 2: 2\} weights"):
        DWA(6).load_state_dict(state)
    with pytest.raises(ValueError, match="layout must be 'alphas' or 'weights', got 'x'"):
        dwa.to_reference_state_dict("x")


def test_meta_device_then_reset() -> None:
    dwa = DWA(6, 2, device="meta")
    assert dwa.weight.is_meta
    dwa.to_empty(device="cpu").reset_parameters()
    fresh = DWA(6, 2)
    for a, b in zip(dwa.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Errors of a run


def test_outputs_that_do_not_fit_are_named() -> None:
    for backend in ("auto", "reference"):
        run = DWA(8, backend=backend).begin(torch.ones(2, 3, 8))
        for _ in range(6):
            run(torch.ones(2, 3, 8))
        with pytest.raises(ValueError, match=r"block 7 returned \(1, 3, 8\), expected \(2, 3, 8\)"):
            run(torch.ones(1, 3, 8))
        with pytest.raises(
            ValueError, match=r"block 7 returned torch\.float64 on cpu, expected torch\.float32"
        ):
            run(torch.ones(2, 3, 8, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"on meta, expected torch\.float32 on cpu"):
            run(torch.ones(2, 3, 8, device="meta"))
        with pytest.raises(TypeError, match="the output of block 7 must be a tensor or a tuple"):
            run({"hidden": torch.ones(2, 3, 8)})
        with pytest.raises(TypeError, match="or a tuple that starts with one, got NoneType"):
            run((None, torch.ones(2, 3, 8)))
        with pytest.raises(TypeError, match=r"real floating-point type, got torch\.int64"):
            run(torch.ones(2, 3, 8, dtype=torch.int64))
    for bad in (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.complex64), "x"):
        with pytest.raises(TypeError, match="x0 must be a tensor"):
            DWA(2).begin(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no partials"):
        DWA(2).begin(torch.ones(2), partials=[torch.ones(2)])


def test_tuples_keep_their_tail() -> None:
    run = DWA(2).begin(torch.ones(2))
    out = run((torch.full((2,), 2.0), "cache", 3))
    assert out[1:] == ("cache", 3)
    assert out[0].tolist() == [2.0, 2.0]


def test_the_number_of_steps_is_held() -> None:
    run = DWA(2).begin(torch.ones(2))
    run(torch.ones(2))
    assert run.depth == 1
    with pytest.raises(RuntimeError, match="the run ended after 1 of 2 blocks"):
        run.close()
    run = DWA(2).begin(torch.ones(2))
    for _ in range(2):
        run(torch.ones(2))
    run.close()
    for again in (lambda: run(torch.ones(2)), run.skip):
        with pytest.raises(RuntimeError, match="this run is over: it has taken all 2"):
            again()


def test_a_skipped_block_acts_as_the_identity() -> None:
    dwa = randomise(DWA(4, dtype=torch.float64))
    x0 = torch.randn(3, dtype=torch.float64)
    blocks = [torch.sin, lambda t: t, torch.cos, torch.tanh]
    run, x = dwa.begin(x0), x0
    for n, block in enumerate(blocks):
        x = run.skip() if n == 1 else run(block(x))
    assert relative(x, oracle(dwa, x0, blocks)) < 1e-15


def test_editing_a_kept_representation_in_place_is_an_error() -> None:
    run, x = DWA(4, 1, 2).begin(torch.ones(2)), torch.ones(2)
    x = run(x.sin())
    out = x.cos()
    x.add_(1)  # block 2 edits its input, X_1, which row 2 reads
    with pytest.raises(RuntimeError, match="representation 1 was changed in place"):
        run(out)
    leaf = torch.ones(300_000, requires_grad=True)
    run = DWA(2).begin(leaf * 1.0)
    x = leaf.exp() * 1.0
    y = run(run(x) * 1.0)
    x.add_(1)  # after its last reader, before backward: the version counter sees it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_block_may_edit_an_average_in_place() -> None:
    dwa = randomise(DWA(5, dtype=torch.float64))
    x0 = torch.randn(4, dtype=torch.float64, requires_grad=True)
    run, x, plain = dwa.begin(x0), x0, [lambda t: (t * 2).sin()] * 5
    for _ in range(5):
        x = run((x.clone() if x is x0 else x).mul_(2).sin())
    want = oracle(dwa, x0, plain)
    assert relative(x, want) < 1e-13
    ours, theirs = (torch.autograd.grad(y.sum(), x0)[0] for y in (x, want))
    assert relative(ours, theirs) < 1e-13


def test_an_average_inside_a_recomputed_region_is_an_error() -> None:
    dwa = DWA(2)

    def region(x: Tensor) -> Tensor:
        return run_through(dwa, x, [torch.sin, torch.cos])

    for reentrant in (False, True):
        x = torch.ones(3, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(region, x, use_reentrant=reentrant)
        with pytest.raises(
            RuntimeError, match=r"recomputed a checkpointed region.*checkpoint=True"
        ):
            y.sum().backward()


# torch.func, forward mode, compilation, export


def _apply(weight: Tensor, x: Tensor, dwa: DWA) -> Tensor:
    run = torch.func.functional_call(dwa, {"weight": weight}, (x,))
    for block in SINES:
        x = run(block(x))
    return x


def test_vmap_jvp_and_functional_call_equal_the_loop() -> None:
    dwa = randomise(DWA(5, 2, dtype=torch.float64))
    xs, tangent = torch.randn(2, 6, 3, dtype=torch.float64)
    weight = dwa.weight.detach()
    assert relative(_apply(weight, xs[0], dwa), oracle(dwa, xs[0], SINES)) < 1e-13
    batched = torch.func.vmap(lambda x: _apply(weight, x, dwa))(xs)
    assert relative(batched, oracle(dwa, xs, SINES)) < 1e-13
    jvp = torch.func.jvp(lambda x: _apply(weight, x, dwa), (xs,), (tangent,))[1]
    theirs = torch.func.jvp(lambda x: oracle(dwa, x, SINES, weight), (xs,), (tangent,))[1]
    assert relative(jvp, theirs) < 1e-13
    grad = torch.func.grad(lambda w: _apply(w, xs, dwa).sum())(weight)
    want = torch.autograd.grad(oracle(dwa, xs, SINES).sum(), dwa.weight)[0]
    assert relative(grad, want) < 1e-12
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(xs, tangent)
        out = torch.autograd.forward_ad.unpack_dual(run_through(dwa, dual, SINES)).tangent
    assert relative(out, theirs) < 1e-13


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="older compilers break the graph")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_with_dynamic_batch(backend: str) -> None:
    """Values and gradients as in eager mode; the next batch size recompiles at most once more."""
    torch._dynamo.reset()
    stack = DenseStack([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)], 2)
    randomise(stack.dwa)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    for batch in (3, 5, 7, 9):
        x = torch.randn(batch, 8)
        a, b = stack(x), compiled(x)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(a.sum(), list(stack.parameters())),
            torch.autograd.grad(b.sum(), list(stack.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="older compilers break the graph")
def test_exports() -> None:
    stack = randomise_stack(DenseStack([nn.Linear(4, 4) for _ in range(4)]))
    x = torch.randn(2, 4)
    program = torch.export.export(stack, (x,))
    torch.testing.assert_close(program.module()(x), stack(x))


def randomise_stack(stack: DenseStack) -> DenseStack:
    randomise(stack.dwa)
    return stack


# The functional row


def test_functional_row_equals_the_sum_and_passes_opcheck() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for count, size in ((1, 5), (3, 5), (9, 5), (9, 70_000)):
            xs = list(torch.randn(count, size, dtype=torch.float64).to(dtype))
            weight = torch.randn(count, dtype=torch.float64).to(
                torch.float32 if dtype != torch.float64 else dtype
            )
            exact = sum(w * x.double() for w, x in zip(weight.double(), xs, strict=True))
            assert relative(F_dwa.dwa(xs, weight).double(), exact) < 2 * torch.finfo(dtype).eps
    xs = [torch.randn(3, requires_grad=True) for _ in range(2)]
    weight = torch.randn(2, requires_grad=True)
    torch.library.opcheck(torch.ops.denseformer.mix, (xs, weight))


def test_functional_row_is_twice_differentiable_and_transforms() -> None:
    xs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *x: F_dwa.dwa(x, w), (weight, *xs))
    assert torch.autograd.gradgradcheck(lambda w, *x: F_dwa.dwa(x, w), (weight, *xs))
    stacked = torch.stack(xs)
    out = torch.func.vmap(lambda x: F_dwa.dwa(list(x), weight), in_dims=1)(stacked)
    assert relative(out, weight @ stacked) < 1e-14
    compiled = torch.compile(F_dwa.dwa, fullgraph=True, backend="aot_eager")
    assert relative(compiled(xs, weight), F_dwa.dwa(xs, weight)) < 1e-14


def test_functional_row_refuses_what_does_not_fit() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="at least one tensor"):
        F_dwa.dwa([], torch.ones(0))
    with pytest.raises(ValueError, match=r"weight must have shape \(1,\), got \(2,\)"):
        F_dwa.dwa([x], torch.ones(2))
    with pytest.raises(TypeError, match="floating-point"):
        F_dwa.dwa([x.int()], torch.ones(1))
    with pytest.raises(ValueError, match=r"xs\[1\] is \(3,\)"):
        F_dwa.dwa([x, torch.ones(3)], torch.ones(2))


def test_scalar_kernels_for_accelerators_agree_with_numbers() -> None:
    """On a GPU the weights stay tensors; the same functions must give the same sums."""
    from denseformer.core import kernels

    for size in (5, 70_000):
        xs, ws = list(torch.randn(9, size)), torch.randn(9)
        init = torch.randn(size)
        for start in (None, init):
            a = kernels.combine(xs, ws.tolist(), start)
            b = kernels.combine(xs, ws.unbind(), start)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            a = kernels.combine(xs[:2], ws[:2].tolist(), start)
            b = kernels.combine(xs[:2], ws[:2].unbind(), start)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@NEEDS_GPU
def test_gpu_equals_cpu() -> None:
    dwa, x0 = randomise(DWA(12)), torch.randn(3, 5, requires_grad=True)
    y = run_through(dwa, x0, [torch.sin] * 12)
    want = torch.autograd.grad(y.sum(), [x0, dwa.weight])
    moved, x1 = copy.deepcopy(dwa).cuda(), x0.detach().cuda().requires_grad_()
    z = run_through(moved, x1, [torch.sin] * 12)
    got = torch.autograd.grad(z.sum(), [x1, moved.weight])
    for a, b in zip([z, *got], [y, *want], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


def test_run_can_be_named_in_annotations() -> None:
    assert isinstance(DWA(1).begin(torch.ones(1)), DepthRun)
