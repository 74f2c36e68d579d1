from __future__ import annotations

import pytest
import torch
from conftest import make_net

import gradient_alignment as ga

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="torch.compile before 2.8 does not trace these derivatives"
)

F64 = torch.float64


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    x = torch.randn(4, 5, generator=source, dtype=F64)
    noise = torch.randn(2, 4, 5, generator=source, dtype=F64)
    return x, torch.tensor([0, 2, 1, 2]), noise


@pytest.mark.parametrize(
    "method", ["antithetic", "forward-over-reverse", "forward-forward", "taylor-cv"]
)
def test_traces_compile_as_one_graph_and_stay_differentiable(method):
    net = make_net()
    x, y, noise = batch()

    def trace(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        fn = ga.class_logit(net, y)
        return ga.hessian_trace(fn, x, method=method, noise=noise).square().mean()

    torch._dynamo.reset()
    found = torch.compile(trace, fullgraph=True, backend="aot_eager")(x, noise)
    wanted = trace(x, noise)
    # sums in another order; finite differences divide by 1e-4, and f is of order 1
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(found, wanted, **close)
    parameters = list(net.parameters())[:3]
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("objective", ["fd-ssm", "esm"])
def test_objectives_compile_as_one_graph(objective):
    net = make_net()
    x, y, noise = batch()

    def loss(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        fn = ga.class_logit(net, y, of="logsumexp")
        options = {"method": "forward-over-reverse"} if objective == "esm" else {}
        return ga.score_matching_loss(fn, x, objective, noise=noise, **options).mean()

    torch._dynamo.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, noise)
    torch.testing.assert_close(found, loss(x, noise), rtol=1e-7, atol=1e-9)
    parameters = list(net.parameters())[:3]
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(loss(x, noise), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_directions_are_drawn_inside_the_graph_for_any_batch(distribution):
    net = make_net().float()

    def trace(x: torch.Tensor) -> torch.Tensor:
        fn = ga.class_logit(net, of="logsumexp")
        return ga.hessian_trace(fn, x, method="forward-forward", distribution=distribution)

    torch._dynamo.reset()
    compiled = torch.compile(trace, fullgraph=True, backend="aot_eager")
    exact = ga.hessian_trace(ga.class_logit(net, of="logsumexp"), torch.zeros(1, 5), method="exact")
    for size in (4000, 3000, 2000):  # the second size makes the batch symbolic
        found = compiled(torch.zeros(size, 5))
        assert found.shape == (size,)
        error = found.std() / size**0.5
        assert (found.mean() - exact[0]).abs() < 6 * error
