from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import lap, pair
from torch.utils import _pytree

import deepemd
from deepemd import DeepEMD, EMDLoss
from deepemd.core.decode import (
    DECODERS,
    decode_logits,
    decode_streamed,
    refine,
    round_scores,
    sinkhorn_plan,
    soft_plan,
)
from deepemd.core.output import Solution, sparse_plan

BIJECTIVE = [
    {"method": "exact"},
    {"method": "auction", "eps": 1e-3},
    {"method": "deepemd", "decode": "round"},
    {"method": "deepemd", "decode": "refine"},
]
METHODS = [
    *BIJECTIVE,
    {"method": "sinkhorn", "n_iter": 60},
    {"method": "chamfer"},
    {"method": "sliced", "n_proj": 8},
    {"method": "approxmatch"},
    *({"method": "deepemd", "decode": d} for d in ("argmax", "both", "soft", "sinkhorn")),
]


def names(options: dict) -> str:
    return "-".join(str(v) for v in options.values())


# --- decoders --------------------------------------------------------------------------------------


def test_argmax_is_the_row_maximum_and_its_mean_distance(tiny: DeepEMD) -> None:
    x, y = pair(2, 20, dtype=torch.float32)
    index = tiny(x, y).argmax(2)
    out = deepemd.match(x, y, method="deepemd", decode="argmax")
    assert out.index is not None
    assert out.index.equal(index)
    for k in range(2):
        expected = float((x[k] - y[k][index[k]]).norm(dim=1).mean())
        assert float(out.distance[k]) == pytest.approx(expected, rel=1e-6)
        assert bool(out.bijective[k]) == (len(index[k].unique()) == 20)


def test_both_averages_the_two_directions_and_reaches_every_point(tiny: DeepEMD) -> None:
    x, y = pair(1, 20, dtype=torch.float32)
    s = tiny(x, y)
    rows, columns = s.argmax(2)[0], s.argmax(1)[0]
    expected = (x[0] - y[0][rows]).norm(dim=1).mean() + (y[0] - x[0][columns]).norm(dim=1).mean()
    x.requires_grad_(), y.requires_grad_()
    value = deepemd.emd(x, y, method="deepemd", decode="both")
    assert float(value.detach()) == pytest.approx(float(expected) / 2, rel=1e-6)
    value.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert bool((x.grad.norm(dim=2) > 0).all())
    assert bool((y.grad.norm(dim=2) > 0).all())


@pytest.mark.parametrize("size", [1, 7, 16])
def test_streamed_argmax_equals_the_dense_one(tiny: DeepEMD, size: int) -> None:
    x, y = pair(2, 16, m=19, dtype=torch.float32)
    s = tiny(x, y)
    found = decode_streamed(tiny, x, y, chunk_size=size)
    assert found.index is not None
    assert found.inverse is not None
    assert found.index.equal(s.argmax(2))
    assert found.inverse.equal(s.argmax(1))


def test_soft_and_sinkhorn_plans_have_the_stated_marginals() -> None:
    s = 3 * torch.randn(2, 6, 6, dtype=torch.float64)
    sixth = torch.full((2, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(soft_plan(s).sum(2), sixth, rtol=0, atol=1e-15)
    torch.testing.assert_close(soft_plan(s, 2.0) * 6, (s / 2).softmax(2))
    plan = sinkhorn_plan(s, 2000)
    torch.testing.assert_close(plan.sum(1), sixth, rtol=0, atol=1e-15)
    torch.testing.assert_close(plan.sum(2), sixth, rtol=0, atol=1e-9)


def test_round_is_the_permutation_of_largest_score_on_both_routes() -> None:
    import itertools

    s = torch.randn(3, 6, 6, dtype=torch.float64)
    index = round_scores(s).index
    assert index is not None
    for k in range(3):
        best = max(
            itertools.permutations(range(6)), key=lambda o: float(s[k][range(6), list(o)].sum())
        )
        assert index[k].tolist() == list(best)
    from deepemd.solvers._auction import Costs, auction

    on_device = auction(Costs.of(s.log_softmax(2).neg()), eps=1e-6).index
    assert on_device is not None
    assert on_device.equal(index)


@pytest.mark.parametrize("rtol", [0.05, 0.01, 1e-3])
def test_refine_certifies_the_gap_it_was_asked_for(rtol: float) -> None:
    x, y = pair(6, 40, dtype=torch.float32)
    out = deepemd.match(x, y, method="deepemd", decode="refine", rtol=rtol, strict=True)
    exact = torch.from_numpy(lap(x, y))
    assert out.rel_gap is not None
    assert bool((out.rel_gap <= rtol).all())
    assert bool((out.distance.double() <= exact / (1 - rtol) + 1e-6).all())
    assert bool((out.lower.double() <= exact + 1e-6).all())
    assert bool(out.bijective.all())


def test_refine_starts_from_any_bijection_and_keeps_its_best() -> None:
    x, y = pair(4, 20)
    index = torch.stack([torch.randperm(20) for _ in range(4)])
    inverse = index.argsort(1)
    start = Solution(index, inverse, converged=torch.ones(4, dtype=torch.bool))
    for exact in (True, False):
        found = refine(x, y, start, rtol=1e-3, exact=exact)
        np.testing.assert_allclose(found.upper.numpy(), lap(x, y), rtol=1e-3)
        assert found.index.gather(1, found.inverse).equal(torch.arange(20).expand(4, 20))
        assert bool(found.converged.all())
        assert bool((found.lower.numpy() <= lap(x, y) * (1 + 1e-12)).all())
    few = refine(x, y, start, rtol=1e-6, max_iter=1, exact=False)
    assert not bool(few.converged.any())


def test_a_network_without_training_still_refines_to_a_certificate() -> None:
    model = DeepEMD(3, 16, 1, 2)
    x, y = pair(3, 25, dtype=torch.float32)
    out = deepemd.match(x, y, method="deepemd", model=model, rtol=0.01)
    assert bool(out.converged.all())
    np.testing.assert_allclose(out.distance.detach().numpy(), lap(x, y), rtol=0.0102)


def test_different_sizes_become_a_transport_plan_of_the_scores(tiny: DeepEMD) -> None:
    x, y = pair(2, 10, m=14, dtype=torch.float32)
    out = deepemd.match(x, y, method="deepemd", return_plan=True, decode="refine")
    expected = sinkhorn_plan(tiny(x, y), 10)
    torch.testing.assert_close(out.plan, expected, rtol=1e-5, atol=1e-8)
    cost = torch.cdist(x, y)
    torch.testing.assert_close(out.distance, (expected * cost).sum((1, 2)), rtol=1e-5, atol=0)
    exact = deepemd.emd(x, y, method="exact")
    assert bool(((out.distance - exact).abs() < 0.25 * exact).all())
    part = deepemd.match(x, y, method="deepemd", unequal="partial")
    assert bool(part.bijective.all())
    assert bool((part.distance >= deepemd.emd(x, y, unequal="partial") - 1e-6).all())
    back = deepemd.match(y, x, method="deepemd", unequal="partial")
    assert int((back.index >= 0).sum()) == 20


def test_differentiated_weights_reach_the_network() -> None:
    model = DeepEMD(3, 16, 1, 2)
    x, y = pair(1, 8, dtype=torch.float32)
    for how in ("soft", "sinkhorn"):
        model.zero_grad()
        loss = deepemd.emd(
            x, y, method="deepemd", model=model, decode=how, differentiate_weights=True
        )
        loss.sum().backward()
        assert model.head.q.weight.grad is not None
        assert float(model.head.q.weight.grad.abs().sum()) > 0
    model.zero_grad()
    plain = deepemd.emd(x.requires_grad_(), y, method="deepemd", model=model, decode="soft")
    plain.sum().backward()
    assert model.head.q.weight.grad is None
    with pytest.raises(ValueError, match="differentiate_weights needs"):
        deepemd.emd(x, y, method="deepemd", differentiate_weights=True)


def test_a_dual_head_bounds_its_argmax_from_below_and_starts_the_exact_solver() -> None:
    model = DeepEMD(3, 16, 1, 2, head="dual")
    x, y = pair(3, 20, dtype=torch.float32)
    exact = torch.from_numpy(lap(x, y))
    out = deepemd.match(x, y, method="deepemd", model=model, decode="argmax")
    assert out.lower is not None
    assert out.upper is None
    assert out.rel_gap is None
    assert bool((out.lower.double() <= exact + 1e-5).all())
    warm = deepemd.emd(x, y, method="exact", warm_start=model)
    np.testing.assert_allclose(warm.numpy(), exact.numpy(), rtol=1e-6)
    other = deepemd.match(x, y[:, :9], method="deepemd", model=model, decode="argmax")
    assert other.lower is None


def test_decode_logits_knows_every_decoder() -> None:
    x, y = pair(2, 8)
    s = -torch.cdist(x, y)
    for how in DECODERS[2:]:
        found = decode_logits(s, x, y, how)
        assert (found.plan is None) == (how in ("round", "refine"))


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [o for o in METHODS if o["method"] in ("exact", "auction", "chamfer", "sliced")], ids=names
)  # fmt: skip
@pytest.mark.parametrize("p", [1, 2])
def test_gradient_equals_finite_differences(options: dict, p: int) -> None:
    x, y = pair(2, 6)
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: deepemd.emd(a, b, p=p, **options), (x, y))


@pytest.mark.parametrize("sizes", [(5, 8), (8, 5)])
@pytest.mark.parametrize("unequal", ["transport", "partial"])
def test_gradient_for_different_sizes_equals_finite_differences(
    sizes: tuple[int, int], unequal: str
) -> None:
    x, y = pair(2, sizes[0], m=sizes[1])
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: deepemd.emd(a, b, method="exact", unequal=unequal), (x, y)
    )


@pytest.mark.parametrize("options", METHODS, ids=names)
def test_gradient_of_every_method_sums_to_zero_over_both_clouds(options: dict) -> None:
    x, y = pair(2, 12, dtype=torch.float32)
    x.requires_grad_(), y.requires_grad_()
    deepemd.emd(x, y, **options).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    total = x.grad.sum(1) + y.grad.sum(1)  # a translation of both changes nothing
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", BIJECTIVE, ids=names)
def test_gradient_is_the_unit_vector_over_n(options: dict) -> None:
    x, y = pair(2, 10, dtype=torch.float32)
    x.requires_grad_()
    out = deepemd.match(x, y, **options)
    out.distance.sum().backward()
    partner = y.gather(1, out.index.unsqueeze(2).expand(-1, -1, 3))
    unit = torch.nn.functional.normalize(x.detach() - partner, dim=2) / 10
    torch.testing.assert_close(x.grad, unit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", METHODS, ids=names)
@pytest.mark.parametrize("p", [1, 2])
def test_coincident_points_have_gradient_zero_not_nan(options: dict, p: int) -> None:
    x = torch.full((2, 5, 3), 0.7, requires_grad=True)
    y = torch.full((2, 5, 3), 0.7, requires_grad=True)
    value = deepemd.emd(x, y, p=p, root=p == 2, **options)
    value.sum().backward()
    assert value.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    for cloud in (x, y):
        assert cloud.grad is not None
        assert cloud.grad.equal(torch.zeros(2, 5, 3))


def test_one_side_may_not_require_a_gradient() -> None:
    x, y = pair(1, 5)
    deepemd.emd_loss(x.requires_grad_(), y).backward()
    assert x.grad is not None
    assert y.grad is None


# --- shapes, dtypes, masks -------------------------------------------------------------------------


@pytest.mark.parametrize("options", METHODS, ids=names)
def test_every_method_takes_single_clouds_and_empty_batches(options: dict) -> None:
    x, y = pair(1, 8, dtype=torch.float32)
    single = deepemd.match(x[0], y[0], **options)
    assert single.distance.shape == ()
    torch.testing.assert_close(single.distance, deepemd.emd(x, y, **options)[0])
    empty = deepemd.match(x[:0], y[:0], **options)
    assert empty.distance.shape == (0,)
    assert empty.converged.shape == (0,)


@pytest.mark.parametrize("options", METHODS, ids=names)
def test_single_points_are_their_distance(options: dict) -> None:
    x, y = torch.zeros(1, 1, 3), torch.tensor([[[2.0, 3.0, 6.0]]])
    expected = {"chamfer": 14.0, "sliced": None}.get(options["method"], 7.0)
    found = float(deepemd.emd(x, y, **options))
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", METHODS, ids=names)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_result_is_at_least_float32(options: dict, dtype: torch.dtype, result: torch.dtype) -> None:
    x, y = pair(1, 6)
    x = x.to(dtype).requires_grad_()
    out = deepemd.match(x, y.to(dtype), **options)
    assert out.distance.dtype == result
    out.distance.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_autocast_does_not_touch_the_distances() -> None:
    x, y = pair(2, 12, dtype=torch.float32)
    expected = deepemd.emd(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({"method": "exact"}, {"method": "deepemd", "rtol": 1e-5}):
            torch.testing.assert_close(deepemd.emd(x, y, **options), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("options", METHODS, ids=names)
def test_padding_equals_the_unpadded_call_bit_for_bit_in_its_values(options: dict) -> None:
    sizes = [(6, 6), (9, 9), (6, 6)]
    if options["method"] in ("exact", "sinkhorn", "chamfer", "sliced"):
        sizes[2] = (5, 8)
    clouds = [pair(1, n, m=m, seed=k, dtype=torch.float32) for k, (n, m) in enumerate(sizes)]
    mask_x = torch.stack([torch.arange(9) < n for n, _ in sizes]).flip(1)  # padding first
    mask_y = torch.stack([torch.arange(10) < m for _, m in sizes])
    outs = []
    for value in (0.0, torch.nan):
        x, y = torch.full((3, 9, 3), value), torch.full((3, 10, 3), value)
        for k, (a, b) in enumerate(clouds):
            x[k, mask_x[k]], y[k, mask_y[k]] = a[0], b[0]
        x.requires_grad_(), y.requires_grad_()
        out = deepemd.match(x, y, mask_x=mask_x, mask_y=mask_y, return_plan=True, **options)
        out.distance.sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert bool(x.grad.isfinite().all())
        assert bool((x.grad[~mask_x] == 0).all())
        assert bool((y.grad[~mask_y] == 0).all())
        outs.append((out, x.grad))
    assert outs[0][0].distance.equal(outs[1][0].distance)
    assert outs[0][1].equal(outs[1][1])
    out = outs[0][0]
    for k, (a, b) in enumerate(clouds):
        alone = deepemd.match(a, b, return_plan=True, **options)
        torch.testing.assert_close(out.distance[k], alone.distance[0], rtol=1e-5, atol=1e-6)
        if out.index is not None and alone.index is not None:
            places = mask_x[k].nonzero()[:, 0]
            assert bool((out.index[k][~mask_x[k]] == -1).all())
            assert out.index[k][places].equal(alone.index[0])
        if out.plan is not None and not out.plan.is_sparse:
            inside = out.plan[k][mask_x[k]][:, mask_y[k]]
            torch.testing.assert_close(inside.sum(), out.plan[k].sum())
    if options in BIJECTIVE:
        assert out.index is not None
        equal = torch.tensor([n == m for n, m in sizes])
        assert out.bijective.equal(equal)


def test_masks_select_weights_too() -> None:
    x, y = pair(2, 6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    a = torch.rand(2, 6, dtype=torch.float64) * mask
    a = a / a.sum(1, keepdim=True)
    found = deepemd.emd(x, y, a=a, b=a, mask_x=mask, mask_y=mask)
    alone = deepemd.emd(x[1, :4], y[1, :4], a=a[1, :4], b=a[1, :4])
    torch.testing.assert_close(found[1], alone, rtol=1e-9, atol=0)


def test_strided_and_expanded_clouds_are_read_right() -> None:
    x, y = pair(2, 8)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(deepemd.emd(strided, y), deepemd.emd(x, y))
    wide = x[:1].expand(2, -1, -1).requires_grad_()
    torch.testing.assert_close(deepemd.emd(wide, y)[0], deepemd.emd(x, y)[0])


def test_planar_clouds_are_read_by_the_three_dimensional_checkpoint() -> None:
    x, y = pair(2, 12, 2, dtype=torch.float32)
    flat = torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(y, (0, 1))
    for decode in ("argmax", "refine"):
        options = {"method": "deepemd", "decode": decode}
        torch.testing.assert_close(deepemd.emd(x, y, **options), deepemd.emd(*flat, **options))


def test_plan_of_a_matching_is_sparse_and_sums_to_one() -> None:
    index = torch.tensor([[1, 0, -1]])
    plan = sparse_plan(index, 2, torch.float64).to_dense()
    assert plan.tolist() == [[[0.0, 0.5], [0.5, 0.0], [0.0, 0.0]]]
    x, y = pair(2, 7)
    out = deepemd.match(x, y, return_plan=True)
    assert out.plan is not None
    assert out.plan.is_sparse
    torch.testing.assert_close((out.plan.to_dense() * torch.cdist(x, y)).sum((1, 2)), out.distance)


def test_output_is_a_pytree_and_squeezes() -> None:
    x, y = pair(2, 7)
    out = deepemd.match(x, y, method="auction")
    doubled = _pytree.tree_map(lambda v: v * 2 if isinstance(v, torch.Tensor) else v, out)
    torch.testing.assert_close(doubled.distance, 2 * out.distance)
    assert doubled.method == "auction"
    one = deepemd.match(x[0], y[0], method="auction")
    assert one.rel_gap.shape == ()
    assert one.potentials[0].shape == (7,)
    assert deepemd.match(x, y, method="chamfer").rel_gap is None


# --- losses, pairs of sets -------------------------------------------------------------------------


def test_loss_reduces_over_the_batch_and_the_module_agrees() -> None:
    x, y = pair(3, 10)
    d = deepemd.emd(x, y)
    for name, expected in (("none", d), ("mean", d.mean()), ("sum", d.sum())):
        torch.testing.assert_close(deepemd.emd_loss(x, y, reduction=name), expected)
        module = EMDLoss(reduction=name, method="exact")
        torch.testing.assert_close(module(x, y), expected)
        torch.testing.assert_close(copy.deepcopy(module)(x, y), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x, y), expected)
    assert "reduction='sum'" in repr(module)
    with pytest.raises(ValueError, match="reduction must be one of"):
        EMDLoss(reduction="max")
    with pytest.raises(ValueError, match="reduction must be one of"):
        deepemd.emd_loss(x, y, reduction="max")


def test_loss_module_holds_a_frozen_network() -> None:
    model = DeepEMD(3, 16, 1, 2)
    crit = EMDLoss(model=model, decode="argmax")
    assert not any(p.requires_grad for p in crit.parameters())
    x, y = pair(2, 8, dtype=torch.float32)
    expected = deepemd.emd(x, y, method="deepemd", model=model, decode="argmax").mean()
    torch.testing.assert_close(crit(x, y), expected)
    torch.testing.assert_close(copy.deepcopy(crit)(x, y), expected)
    torch.testing.assert_close(
        EMDLoss(model="tiny")(x, y), deepemd.emd(x, y, method="deepemd").mean()
    )


def test_pairwise_equals_the_double_loop_in_any_tiling() -> None:
    x, y = pair(3, 8)[0], pair(4, 8, seed=5)[1]
    mask = torch.ones(3, 8, dtype=torch.bool)
    expected = torch.stack([torch.stack([deepemd.emd(a, b) for b in y]) for a in x])
    for tile in (1, 5, 100):
        torch.testing.assert_close(deepemd.pairwise_emd(x, y, tile=tile), expected)
    torch.testing.assert_close(deepemd.pairwise_emd(x, y, mask_x=mask), expected)
    assert deepemd.pairwise_emd(x[:0], y).shape == (0, 4)
    with pytest.raises(ValueError, match="set of clouds"):
        deepemd.pairwise_emd(x[0], y)


# --- auto ------------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_exact_up_to_2048_points_then_auction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = torch.rand(1, 2049, 3)
    assert deepemd.explain(x[:, :2048], x[:, 1:]) == "exact"
    assert deepemd.explain(x, x) == "auction"
    assert deepemd.explain(x[..., :1], x[..., :1]) == "exact"
    assert deepemd.explain(x[:, :9], x[:, :7]) == "exact"
    assert deepemd.explain(x, x[:, :7]) == "sinkhorn"
    assert deepemd.explain(x[:, :9], x[:, :7], unequal="partial") == "exact"
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6
    assert "certified" in told[1]
    assert deepemd.match(x[:, :9], x[:, 9:18]).method == "exact"


def test_auto_on_an_accelerator_is_the_network_where_it_covers_the_dimension() -> None:
    from deepemd.core.methods import choose

    def chosen(dim: int, *, differ: bool = False, weighted: bool = False) -> str:
        cloud = torch.empty(1, 64, dim, device="meta")
        return choose(
            cloud, cloud, unequal="partial", weighted=weighted, differ=differ, model=None
        )[0]

    assert chosen(3) == chosen(2) == "deepemd"
    assert chosen(5) == chosen(3, differ=True) == "auction"
    assert chosen(3, weighted=True) == "sinkhorn"


# --- bad input -------------------------------------------------------------------------------------

GOOD = torch.rand(2, 5, 3)
BAD = [
    ((GOOD.numpy(), GOOD), {}, TypeError, "x must be a torch.Tensor"),
    ((GOOD, GOOD.tolist()), {}, TypeError, "y must be a torch.Tensor"),
    ((GOOD.long(), GOOD), {}, TypeError, r"floating-point coordinates, got torch.int64"),
    ((GOOD[0, 0], GOOD), {}, ValueError, r"x must be \(B, N, D\) or \(N, D\), got 1 dim"),
    ((GOOD[0], GOOD), {}, ValueError, "differ in rank"),
    ((GOOD, GOOD[..., :2]), {}, ValueError, "D=3 coordinates and those of y 2"),
    ((GOOD[..., :0], GOOD[..., :0]), {}, ValueError, "D=0"),
    ((GOOD, GOOD[:1]), {}, ValueError, "batch sizes differ: 2 for x and 1 for y"),
    ((GOOD[:, :0], GOOD), {}, ValueError, "x has no points"),
    ((GOOD, GOOD[:, :0]), {}, ValueError, "y has no points"),
    ((GOOD * torch.nan, GOOD), {}, ValueError, "x holds 10 points that are not finite"),
    ((GOOD, GOOD * torch.inf), {}, ValueError, "not finite"),
    ((GOOD, GOOD.to("meta")), {}, ValueError, "x is on cpu and y on meta"),
    ((GOOD, GOOD), {"mask_x": torch.ones(2, 5)}, TypeError, "mask_x must be a bool tensor"),
    ((GOOD, GOOD), {"mask_y": [True]}, TypeError, "mask_y must be a bool tensor.*list"),
    ((GOOD, GOOD), {"mask_x": torch.ones(2, 4).bool()}, ValueError, r"must be \(2, 5\)"),
    ((GOOD, GOOD), {"mask_x": torch.zeros(2, 5).bool()}, ValueError, "without any point"),
    ((GOOD, GOOD), {"mask_x": torch.ones(2, 5, device="meta").bool()}, ValueError, "its cloud on"),
    ((GOOD, GOOD), {"a": torch.ones(2, 5)}, ValueError, "sum to 1"),
    ((GOOD, GOOD), {"a": torch.ones(2, 4) / 4}, ValueError, r"a must be \(2, 5\)"),
    ((GOOD, GOOD), {"b": torch.ones(2, 5).long()}, TypeError, "b must be a floating-point"),
    ((GOOD, GOOD), {"method": "emd"}, ValueError, "method must be one of auto, deepemd"),
    ((GOOD, GOOD), {"p": 3}, ValueError, "p must be 1 or 2"),
    ((GOOD, GOOD), {"unequal": "x"}, ValueError, "unequal must be one of"),
    ((GOOD, GOOD), {"normalize": "x"}, ValueError, "normalize must be one of"),
    ((GOOD, GOOD), {"rtol": 0.0}, ValueError, "rtol must be positive"),
    ((GOOD, GOOD), {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    ((GOOD, GOOD[:, :4]), {"unequal": "error"}, ValueError, "unequal='transport'"),
    ((GOOD, GOOD), {"method": "deepemd", "decode": "x"}, ValueError, "decode must be one of"),
    ((GOOD, GOOD), {"method": "deepemd", "model": "huge"}, KeyError, "bundled are tiny"),
    ((GOOD, GOOD), {"method": "auction", "eps": 0.0}, ValueError, "eps must be positive"),
    ((GOOD, GOOD), {"method": "auction", "scaling": 1.0}, ValueError, "scaling must be over 1"),
    ((GOOD, GOOD[:, :4]), {"method": "auction"}, ValueError, "unequal='partial'"),
    ((GOOD, GOOD[:, :4]), {"method": "sinkhorn", "unequal": "partial"}, ValueError, "no partial"),
    ((GOOD, GOOD), {"method": "sliced", "n_proj": 0}, ValueError, "n_proj must be"),
    ((GOOD, GOOD), {"method": "exact", "backend": "x"}, ValueError, "backend must be one of"),
    ((GOOD, GOOD[:, :4]), {"backend": "pot", "unequal": "partial"}, ValueError, "equal size only"),
    ((GOOD, GOOD), {"method": "chamfer", "wrong": 1}, TypeError, "wrong"),
]


@pytest.mark.parametrize(
    ("args", "options", "error", "text"), BAD, ids=[str(k) for k in range(len(BAD))]
)
def test_bad_input_is_named(args: tuple, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        deepemd.emd(*args, **options)


@pytest.mark.parametrize("method", ["deepemd", "auction", "chamfer", "sliced", "approxmatch"])
def test_weights_are_refused_where_they_mean_nothing(method: str) -> None:
    with pytest.raises(NotImplementedError, match="exact, sinkhorn"):
        deepemd.emd(GOOD, GOOD, a=torch.full((2, 5), 0.2), method=method)


def test_check_finite_false_skips_the_look() -> None:
    bad = GOOD.clone()
    bad[0, 0] = torch.nan
    value = deepemd.emd(bad, GOOD, method="chamfer", check_finite=False)
    assert bool(value[1].isfinite())


def test_dimensions_beyond_the_checkpoint_are_refused_and_large_ones_warned_of() -> None:
    x, y = pair(1, 6, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"D=2, 3 coordinates, got D=5"):
        deepemd.emd(x, y, method="deepemd")
    x, y = pair(1, 6, 20, dtype=torch.float32)
    with pytest.warns(UserWarning, match="D=20 coordinates: no checkpoint"):
        out = deepemd.match(x, y, method="deepemd", model=DeepEMD(20, 16, 1, 2, fourier=1))
    assert bool(out.converged.all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(deepemd.emd(x, y)) == pytest.approx(float(lap(x, y)[0]), rel=1e-6)


def test_duplicated_and_elongated_clouds_keep_their_certificates() -> None:
    x = torch.rand(1, 1, 3).expand(1, 20, 3).contiguous()
    y = torch.rand(1, 20, 3).round()
    long = torch.rand(1, 20, 3) * torch.tensor([1e4, 1.0, 1e-4])
    for a, b in ((x, y), (long, long.flip(2)), (long, long + 1)):
        for options in BIJECTIVE:
            out = deepemd.match(a, b, **options)
            exact = float(lap(a, b)[0])
            assert out.lower is not None
            assert float(out.lower) <= exact * (1 + 1e-5)
            assert float(out.upper) >= exact * (1 - 1e-5)


def test_outliers_can_be_normalised_by_rms() -> None:
    x, y = pair(1, 30, dtype=torch.float32)
    x[0, 0] = 100.0
    plain, robust = (
        deepemd.match(x, y, method="deepemd", decode="argmax", normalize=mode).index
        for mode in ("pair", "rms")
    )
    exact = deepemd.match(x, y).index
    assert plain is not None
    assert robust is not None
    assert exact is not None
    assert float((robust == exact).float().mean()) > float((plain == exact).float().mean())
