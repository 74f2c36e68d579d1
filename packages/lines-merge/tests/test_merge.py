"""Every merge function against the float64 reference, and the exact statements of the method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import State, make_finetuned, make_state

import lines_merge as lm
from lines_merge.select import keep_count

# float32 arithmetic against float64: a few roundings of numbers of size one
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


def close(result: State, expected: dict[str, Any]) -> None:
    assert set(result) == set(expected)
    for name, value in result.items():
        np.testing.assert_allclose(
            value.double().numpy(), expected[name], err_msg=name, **TOLERANCE
        )


def expected_merge(base: State, models: list[State], method: str, **arguments: Any) -> Any:
    taus = reference.task_vectors(base, models)
    keep = keep_count(taus.shape[1], arguments.get("density", 0.2))
    if method == "average":
        return taus, taus.mean(axis=0)
    if method == "task_arithmetic":
        weights = np.array(arguments.get("weights", [1.0] * len(models)))
        return taus, (weights[:, None] * taus).sum(axis=0)
    if method == "ties":
        return taus, reference.ties(taus, keep, arguments.get("merge", "mean"))
    if method == "magnitude":
        return taus, reference.trim(taus, keep).sum(axis=0)
    inner = taus.sum(axis=0) if method == "consensus" else reference.ties(taus, keep, "sum")
    masks = reference.tall_masks(taus, inner, arguments.get("lambdas", 0.4))
    return taus, inner * (masks.sum(axis=0) >= arguments.get("k", 2))


CASES = [
    ("average", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"weights": [0.5, -1.0, 2.0]}),
    ("ties", {}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.37, "merge": "sum"}),
    ("ties", {"density": 0.5, "merge": "max"}),
    ("magnitude", {"density": 0.3}),
    ("consensus", {}),
    ("consensus", {"k": 1, "lambdas": 0.6}),
    ("consensus", {"k": 3, "lambdas": 0.2}),
    ("consensus_ties", {"density": 0.5}),
]


@pytest.mark.parametrize(("method", "arguments"), CASES)
@pytest.mark.parametrize("norm", [1, 2])
def test_merge_equals_float64_reference(
    base: State, models: list[State], method: str, arguments: dict[str, Any], norm: int
) -> None:
    taus, merged = expected_merge(base, models, method, **arguments)
    alpha = reference.alpha(taus, merged, norm)
    factors = lm.scales(base, alpha, 0.7)
    result = lm.merge(base, models, method, beta=0.7, norm=norm, **arguments)
    close(result, reference.lines(base, merged, factors))


@pytest.mark.parametrize(("method", "arguments"), CASES)
def test_plain_merge_adds_the_merged_vector_times_alpha(
    base: State, models: list[State], method: str, arguments: dict[str, Any]
) -> None:
    _, merged = expected_merge(base, models, method, **arguments)
    factors = dict.fromkeys(base, 0.3)
    result = lm.merge(base, models, method, lines=False, alpha=0.3, **arguments)
    close(result, reference.lines(base, merged, factors))
    one = lm.merge(base, models, method, lines=False, **arguments)
    close(one, reference.lines(base, merged, dict.fromkeys(base, 1.0)))


@pytest.mark.parametrize(("method", "arguments"), CASES)
def test_beta_zero_is_the_plain_merge(
    base: State, models: list[State], method: str, arguments: dict[str, Any]
) -> None:
    lines = lm.merge(base, models, method, alpha=0.4, beta=0.0, **arguments)
    plain = lm.merge(base, models, method, alpha=0.4, lines=False, **arguments)
    assert all(torch.equal(lines[name], plain[name]) for name in base)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("average", {}),
        ("task_arithmetic", {}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "merge": "sum"}),
        ("ties", {"density": 1.0, "merge": "max"}),
        ("magnitude", {"density": 1.0}),
        ("consensus", {"k": 1}),
        ("consensus_ties", {"k": 1, "density": 1.0}),
        ("dare", {"p": 0.0}),
        ("dare_ties", {"p": 0.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_at_density_one_is_an_edit(
    method: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    base = make_state(dtype=dtype)
    tuned = make_finetuned(base, 0)
    edited = lm.edit(base, tuned, alpha=0.25, beta=0.75)
    merged = lm.merge(base, [tuned], method, alpha=0.25, beta=0.75, **arguments)
    assert all(torch.equal(edited[name], merged[name]) for name in base)


def test_alpha_of_a_sum_is_one_over_t_and_of_a_mean_is_one(
    base: State, models: list[State]
) -> None:
    taus = [lm.TaskVector(base, model) for model in models]
    total = sum(taus[1:], start=taus[0])
    assert lm.auto_alpha(taus, total) == pytest.approx(1 / 3, rel=1e-12, abs=0)
    # the mean is rounded to float32, so that the identity holds to a part in 2^24
    assert lm.auto_alpha(taus, total / 3) == pytest.approx(1, rel=1e-7, abs=0)
    by_rule = lm.merge(base, models, beta=0.5)
    by_value = lm.merge(base, models, alpha=1 / 3, beta=0.5)
    assert all(torch.equal(by_rule[name], by_value[name]) for name in base)


def test_weights_change_the_merged_vector_but_not_the_reference_norm(
    base: State, models: list[State]
) -> None:
    taus = reference.task_vectors(base, models)
    alpha = reference.alpha(taus, (np.array([[2.0], [2.0], [2.0]]) * taus).sum(axis=0))
    assert alpha == pytest.approx(1 / 6)
    auto = lm.merge(base, models, weights=[2.0] * 3, beta=0.3)
    given = lm.merge(base, models, weights=[2.0] * 3, alpha=1 / 6, beta=0.3)
    for name in base:
        torch.testing.assert_close(auto[name], given[name], rtol=0, atol=1e-6)


def test_ties_by_hand() -> None:
    base = {"w": torch.zeros(4)}
    models = [
        {"w": torch.tensor([3.0, -1.0, 0.0, 2.0])},
        {"w": torch.tensor([-1.0, -2.0, 1.0, 2.0])},
    ]
    wanted = {"mean": [3, -1.5, 1, 2], "sum": [3, -3, 1, 4], "max": [3, -2, 1, 2]}
    for how, values in wanted.items():
        result = lm.merge(base, models, "ties", density=1.0, merge=how, lines=False)
        assert result["w"].tolist() == values


@pytest.mark.parametrize("majority", [1.0, -1.0])
@pytest.mark.parametrize("alpha", ["auto", 1.0])
@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_exact_cancellation_takes_the_global_majority_sign(
    majority: float, alpha: float | str, how: str
) -> None:
    base = {"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.zeros(1)}
    one = {"a": torch.ones(1), "b": majority * torch.ones(2), "c": torch.zeros(1)}
    two = {"a": -torch.ones(1), "b": torch.zeros(2), "c": torch.zeros(1)}
    result = lm.merge(base, [one, two], "ties", density=1.0, merge=how, alpha=alpha, beta=0.0)
    factor = 0.5 * 2 / 3 if alpha == "auto" else 1.0  # sums (0, 1, 1, 0), merged (1, 1, 1, 0)
    assert result["a"].item() == pytest.approx(majority * factor)
    assert result["b"].tolist() == pytest.approx([majority * factor] * 2)
    assert result["c"].item() == 0


def test_without_any_majority_cancelled_entries_are_negative_or_zero() -> None:
    base = {"w": torch.zeros(3)}
    models = [{"w": torch.tensor([1.0, 2.0, -2.0])}, {"w": torch.tensor([-1.0, 0.0, 0.0])}]
    for how, value in {"mean": -1.0, "sum": -1.0, "max": 0.0}.items():
        for alpha in ("auto", 1.0):
            out = lm.merge(base, models, "ties", density=1.0, merge=how, alpha=alpha, beta=0.0)["w"]
            ratio = out[0] / out[1]
            assert ratio.item() == pytest.approx(value / 2)
            assert out[1].item() == -out[2].item()


def test_density_one_half_keeps_exactly_two_of_four() -> None:
    base = {"w": torch.zeros(4)}
    result = lm.merge(
        base, [{"w": torch.tensor([3.0, -1.0, 1.0, 2.0])}], "ties", density=0.5, lines=False
    )
    assert result["w"].tolist() == [3, 0, 0, 2]


def test_ties_at_the_threshold_go_to_the_lowest_flat_index() -> None:
    base = {"b": torch.zeros(3), "a": torch.zeros(3)}
    model = {"b": torch.tensor([1.0, -1.0, 2.0]), "a": torch.tensor([0.0, 1.0, -1.0])}
    result = lm.merge(base, [model], "magnitude", density=0.5, lines=False)
    assert result["a"].tolist() == [0, 1, -1]
    assert result["b"].tolist() == [0, 0, 2]
    kept = lm.merge(base, [model], "magnitude", density=0.5, lines=False, compat="reference")
    assert kept["b"].tolist() == [1, -1, 2]


def test_reference_compatibility_keeps_one_more() -> None:
    base = {"w": torch.zeros(10)}
    model = {"w": torch.arange(1.0, 11.0)}
    exact = lm.merge(base, [model], "magnitude", density=0.3, lines=False)["w"]
    reference_rule = lm.merge(
        base, [model], "magnitude", density=0.3, lines=False, compat="reference"
    )["w"]
    assert int(exact.count_nonzero()) == 3
    k = 10 - int(10 * 0.3)
    threshold = model["w"].kthvalue(k).values
    assert torch.equal(reference_rule, torch.where(model["w"] >= threshold, model["w"], 0.0))


def test_tensor_scope_trims_each_tensor_on_its_own(base: State, models: list[State]) -> None:
    result = lm.merge(base, models, "ties", density=0.4, scope="tensor", lines=False)
    for name in base:
        taus = reference.task_vectors({name: base[name]}, [{name: m[name]} for m in models])
        merged = reference.ties(taus, keep_count(taus.shape[1], 0.4))
        expected = base[name].double().numpy().ravel() + merged
        np.testing.assert_allclose(result[name].double().numpy().ravel(), expected, **TOLERANCE)


def test_tensor_scope_takes_the_majority_over_all_tensors() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    one = {"a": torch.tensor([1.0, 2.0]), "b": -torch.ones(3)}
    two = {"a": torch.tensor([-1.0, 0.0]), "b": -torch.ones(3)}
    out = lm.merge(base, [one, two], "ties", density=1.0, scope="tensor", lines=False)
    assert out["a"].tolist() == [-1, 2]


def test_weighted_ties_mean_is_a_weighted_mean() -> None:
    base = {"w": torch.zeros(2)}
    models = [{"w": torch.tensor([2.0, -4.0])}, {"w": torch.tensor([4.0, 1.0])}]
    result = lm.merge(base, models, "ties", density=1.0, weights=[0.25, 0.75], lines=False)
    assert result["w"].tolist() == pytest.approx([(0.5 + 3.0) / 1.0, -4.0])


def test_gradient_weights_are_interpolated_over_depth() -> None:
    base = {f"blocks.{i}.fc.weight": torch.zeros(1) for i in range(3)} | {"embed": torch.zeros(1)}
    model = {name: torch.ones(1) for name in base}
    out = lm.merge(base, [model], weights=[[0.0, 1.0]], lines=False)
    assert [out[name].item() for name in base] == [0.0, 0.5, 1.0, 0.0]


def test_consensus_extremes(base: State, models: list[State]) -> None:
    plain = lm.merge(base, models, alpha=0.5)
    unmasked = lm.merge(base, models, "consensus", k=0, alpha=0.5)
    nothing = lm.merge(base, models, "consensus", k=4, alpha=0.5)
    for name in base:
        assert torch.equal(plain[name], unmasked[name])
        assert torch.equal(base[name], nothing[name])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_dare_drops_with_probability_p_and_rescales(p: float) -> None:
    base = {"w": torch.zeros(200, 500)}
    model = {"w": torch.ones(200, 500)}
    out = lm.merge(base, [model], "dare", p=p, lines=False)["w"]
    values = torch.unique(out)
    survivor = torch.tensor(1 / (1 - p)).item()
    assert values.tolist() == ([survivor] if p == 0 else [0.0, survivor])
    share = (out != 0).double().mean().item()
    # five standard deviations of a binomial proportion
    assert abs(share - (1 - p)) <= 5 * (p * (1 - p) / out.numel()) ** 0.5
    # neighbours are independent: the share of equal pairs is that of independent draws
    pairs = ((out.view(-1)[1:] != 0) == (out.view(-1)[:-1] != 0)).double().mean().item()
    assert abs(pairs - (p * p + (1 - p) ** 2)) <= 0.01


def test_dare_depends_on_seed_model_and_tensor_only(base: State, models: list[State]) -> None:
    first = lm.merge(base, models, "dare", p=0.5, seed=3)
    again = lm.merge(dict(reversed(base.items())), models, "dare", p=0.5, seed=3)
    other = lm.merge(base, models, "dare", p=0.5, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in base)
    assert any(not torch.equal(first[name], other[name]) for name in base)
    named = {"x": models[0], "y": models[1], "z": models[2]}
    shuffled = {"z": models[2], "x": models[0], "y": models[1]}
    one = lm.merge(base, named, "dare", p=0.5)
    two = lm.merge(base, shuffled, "dare", p=0.5)
    for name in base:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_dare_ties_trims_what_survived(base: State, models: list[State]) -> None:
    p = 0.4
    dropped = [lm.merge(base, {str(t): m}, "dare", p=p, lines=False) for t, m in enumerate(models)]
    taus = reference.task_vectors(base, dropped)
    keep = keep_count(taus.shape[1], 0.3)
    result = lm.merge(base, models, "dare_ties", p=p, density=0.3, lines=False)
    close(result, reference.lines(base, reference.ties(taus, keep), dict.fromkeys(base, 1.0)))


@pytest.mark.parametrize(("method", "arguments"), CASES)
def test_merge_commutes_with_the_order_of_two_models(
    base: State, models: list[State], method: str, arguments: dict[str, Any]
) -> None:
    arguments = {k: v for k, v in arguments.items() if k != "weights"}
    one = lm.merge(base, models[:2], method, alpha=0.5, **arguments)
    two = lm.merge(base, models[1::-1], method, alpha=0.5, **arguments)
    assert all(torch.equal(one[name], two[name]) for name in base)


@pytest.mark.parametrize(("method", "arguments"), CASES)
def test_merge_is_equivariant_to_the_scale_of_the_task_vectors(
    method: str, arguments: dict[str, Any]
) -> None:
    base = {name: torch.zeros_like(value) for name, value in make_state().items()}
    models = [make_finetuned(base, seed) for seed in range(3)]
    scaled = [{name: 4 * value for name, value in model.items()} for model in models]
    one = lm.merge(base, models, method, alpha=0.5, **arguments)
    two = lm.merge(base, scaled, method, alpha=0.5, **arguments)
    # a power of two changes no rounding
    assert all(torch.equal(4 * one[name], two[name]) for name in base)


def test_a_registered_merge_is_used_by_name(base: State, models: list[State]) -> None:
    class Median(lm.BaseMerge):
        def __call__(self, base: torch.Tensor, deltas: torch.Tensor, ctx: Any) -> torch.Tensor:
            return deltas.median(dim=0).values

    lm.register_merge("median-of-tests", Median)
    taus = reference.task_vectors(base, models)
    merged = np.median(taus, axis=0)
    factors = lm.scales(base, reference.alpha(taus, merged), 0.2)
    expected = reference.lines(base, merged, factors)
    close(lm.merge(base, models, "median-of-tests", beta=0.2), expected)
    close(lm.merge(base, models, Median(), beta=0.2), expected)


def test_a_bare_protocol_merge_is_enough(base: State, models: list[State]) -> None:
    class First:
        passes = 0

        def prepare(self, stats: Any) -> None:
            self.models = stats.num_models

        def __call__(self, base: torch.Tensor, deltas: torch.Tensor, ctx: Any) -> torch.Tensor:
            return deltas[0]

    method = First()
    result = lm.merge(base, models, method, alpha="auto", beta=0.0)
    assert method.models == 3
    taus = reference.task_vectors(base, models)
    alpha = reference.alpha(taus, taus[0])
    close(result, reference.lines(base, taus[0], dict.fromkeys(base, alpha)))
