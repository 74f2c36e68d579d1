from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palora.core import functional as PF

D = torch.float64


def factors(tasks: int = 3, k: int = 2, rows: int = 4, cols: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, k, cols, dtype=D), torch.randn(tasks, rows, k, dtype=D)


def test_worked_golden_case_forward_and_every_gradient() -> None:
    def leaf(values: object) -> Tensor:
        return torch.tensor(values, dtype=D, requires_grad=True)

    for path in ("weight", "activation"):
        x, w, b = leaf([[2.0, 4.0]]), leaf([[1.0, 2.0]]), leaf([0.5])
        a, up = leaf([[[1.0, 0.0]], [[0.0, 1.0]]]), leaf([[[3.0]], [[-1.0]]])
        lam = leaf([0.25, 0.75])
        if path == "weight":
            y = PF.mixed_linear(x, w, b, a, up, lam, 2.0)
        else:
            y = F.linear(x, w, b) + PF.low_rank_rows(x, a, up, lam, 2.0)
        assert PF.mixed_weight(w, a, up, lam, 2.0).tolist() == [[2.5, 0.5]]
        assert y.item() == 7.5
        y.sum().backward()
        assert x.grad.tolist() == [[2.5, 0.5]]
        assert w.grad.tolist() == [[2.0, 4.0]]
        assert b.grad.tolist() == [1.0]
        assert up.grad.tolist() == [[[1.0]], [[6.0]]]
        assert a.grad.tolist() == [[[3.0, 6.0]], [[-3.0, -6.0]]]
        assert lam.grad.tolist() == [12.0, -8.0]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_path_gradients_to_second_order(many: bool, transposed: bool) -> None:
    A, B = factors(2, 1, 2, 3)
    weight = torch.randn((3, 2) if transposed else (2, 3), dtype=D)
    lam = torch.rand((2, 2) if many else (2,), dtype=D)
    x, bias = torch.randn(4, 3, dtype=D), torch.randn(2, dtype=D)
    inputs = [t.requires_grad_() for t in (x, weight, bias, A, B, lam)]

    def run(x: Tensor, w: Tensor, b: Tensor, A: Tensor, B: Tensor, lam: Tensor) -> Tensor:
        return PF.mixed_linear(x, w, b, A, B, lam, 0.7, transposed=transposed)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_repeat_on_a_kept_graph_and_leave_the_inputs_alone(
    many: bool, transposed: bool
) -> None:
    A, B = factors(2, 1, 2, 3)
    weight = torch.randn((3, 2) if transposed else (2, 3), dtype=D)
    lam = torch.rand((2, 2) if many else (2,), dtype=D)
    inputs = [t.requires_grad_() for t in (torch.randn(4, 3, dtype=D), weight, A, B)]
    before = [t.detach().clone() for t in inputs]
    g = torch.randn(4, 2, dtype=D)
    y = PF.mixed_linear(*inputs[:2], None, *inputs[2:], lam, 0.7, transposed=transposed)
    first = torch.autograd.grad(y, inputs, g, retain_graph=True)
    again = torch.autograd.grad(y, inputs, g)
    x, w, a, b = (t.detach().clone().requires_grad_() for t in before)
    rows = lam if many else lam.expand(1, 2)
    parts = []
    for block, own in zip(x.chunk(len(rows)), rows, strict=True):
        mixed = (w.t() if transposed else w) + 0.7 * sum(own[t] * b[t] @ a[t] for t in range(2))
        parts.append(block @ mixed.t())
    expected = torch.autograd.grad(torch.cat(parts), [x, w, a, b], g)
    for found in (first, again):
        for f, e in zip(found, expected, strict=True):
            close(f, e)
    for t, old in zip(inputs, before, strict=True):
        assert torch.equal(t.detach(), old)


@pytest.mark.parametrize("mode", ["one", "loop", "grouped", "shared"])
def test_convolution_weight_path_gradients_to_second_order(mode: str) -> None:
    A, B = torch.randn(2, 2, 4, dtype=D), torch.randn(2, 4, 2, dtype=D)
    weight, bias = torch.randn(2, 2, 2, 2, dtype=D), torch.randn(2, dtype=D)
    lam = torch.rand((2,) if mode == "one" else (2, 2), dtype=D)
    x = torch.randn(2, 2, 3, 3, dtype=D)
    inputs = [t.requires_grad_() for t in (x, weight, bias, A, B, lam)]

    def run(x: Tensor, w: Tensor, b: Tensor, A: Tensor, B: Tensor, lam: Tensor) -> Tensor:
        each = 2 if mode == "shared" else 1
        return PF.mixed_conv(
            x, w, b, A, B, lam, 0.7, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
            sizes=(2,) if mode == "one" else (each, each), mode="loop" if mode == "one" else mode,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_path_equals_autograd_of_the_formula(frozen: bool) -> None:
    A, B = factors()
    weight = torch.randn(4, 5, dtype=D, requires_grad=not frozen)
    x = torch.randn(7, 5, dtype=D, requires_grad=True)
    lam = torch.tensor([0.2, 0.5, 0.3], dtype=D, requires_grad=True)
    leaves = [A.requires_grad_(), B.requires_grad_(), x, lam] + ([] if frozen else [weight])
    g = torch.randn(7, 4, dtype=D)
    naive = sum((lam[t] * 0.5 * B[t] @ A[t] for t in range(3)), weight)
    ours = torch.autograd.grad((PF.mixed_linear(x, weight, None, A, B, lam, 0.5) * g).sum(), leaves)
    theirs = torch.autograd.grad((x @ naive.t() * g).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_weight_path_saves_no_mixed_weight() -> None:
    A, B = factors(2, 1, 64, 64)
    weight = torch.randn(64, 64, dtype=D, requires_grad=True)
    x = torch.randn(3, 64, dtype=D, requires_grad=True)
    A.requires_grad_(), B.requires_grad_()
    known = {t.data_ptr() for t in (A, B, weight, x)}
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        PF.mixed_linear(x, weight, None, A, B, torch.tensor([0.5, 0.5], dtype=D), 1.0)
    assert sum(saved) < 64 * 64  # the factors B_cat·diag(λ) and λ; a copy of W would be 4096
    assert max(saved) <= 2 * 64


def test_vmap_and_functional_gradients_over_preferences() -> None:
    A, B = factors()
    weight, x = torch.randn(4, 5, dtype=D), torch.randn(7, 5, dtype=D)
    lams = torch.rand(6, 3, dtype=D)
    ys = torch.func.vmap(lambda lam: PF.mixed_linear(x, weight, None, A, B, lam, 0.5))(lams)
    for y, lam in zip(ys, lams, strict=True):
        close(y, x @ PF.mixed_weight(weight, A, B, lam, 0.5).t())
    jac = torch.func.jacrev(lambda lam: PF.mixed_linear(x, weight, None, A, B, lam, 0.5).sum())(
        lams[0]
    )
    close(jac, torch.stack([0.5 * (x @ (B[t] @ A[t]).t()).sum() for t in range(3)]))


def test_path_choice_is_by_cost() -> None:
    for n, rows, cols in [(1, 8, 8), (3, 8, 8), (4, 8, 8), (5, 8, 8), (400, 100, 3)]:
        activation, weight = n * (rows + cols), rows * cols
        assert PF.prefers_weight_path(n, rows, cols) == (weight < activation)


@settings(max_examples=30, deadline=None)
@given(
    tasks=st.integers(2, 8),
    k=st.integers(1, 4),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_delta_is_the_sum_over_tasks(tasks: int, k: int, rows: int, cols: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = factors(tasks, k, rows, cols)
    lam = torch.distributions.Dirichlet(torch.ones(tasks, dtype=D)).sample()
    expected = sum((lam[t] * B[t] @ A[t] for t in range(tasks)), torch.zeros(rows, cols, dtype=D))
    close(PF.delta_weight(A, B, lam, 3.0), 3.0 * expected)
    rows_lam = lam.expand(2, -1)
    x = torch.randn(4, cols, dtype=D)
    close(PF.low_rank_rows(x, A, B, rows_lam, 3.0, 2), 3.0 * x @ expected.t())
