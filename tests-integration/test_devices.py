"""Each package's smoke test, on the CPU always and on a GPU under `nox -s gpu`.

Forward, backward, autocast to bfloat16 and torch.compile of a network with the method in it, each against
the same network on the CPU in float32. TF32 is off. Stated tolerances: 1e-4 of the largest value for
outputs, 1e-3 for gradients, 6e-2 for bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import deepemd
import denseformer
import gradient_alignment as ga
import hypermixer
import lcnn
import lines_merge as lm
import mi_surrogates as mi
import palora
import pytest
import sequel
import torch
from lookahead_minmax import LookaheadMinmax
from torch import Tensor, nn
from toys import GPT, ViT, ellipses, spots, walks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return str(request.param)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry: single entries near 0 have no digits to compare."""
    assert got.shape == want.shape
    error = (got.detach().cpu().float() - want.detach()).abs().max().item()
    assert error <= tolerance * max(want.detach().abs().max().item(), 1e-3)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip


def images() -> Tensor:
    return spots(6, torch.Generator().manual_seed(0))[0]


def tokens() -> Tensor:
    return walks(6, 10, 0, 1, torch.Generator().manual_seed(0))


def densified() -> nn.Module:
    model = denseformer.densify(GPT(depth=4), dilation=2)
    nn.init.normal_(model.dwa.weight, std=0.3)
    return model


def mixed() -> nn.Module:
    model = ViT(heads=(4,))
    hypermixer.convert(model)
    return model


def adapted() -> nn.Module:
    model = palora.inject(convolutional(), 2, rank=1, default=[0.3, 0.7])
    for name, parameter in model.named_parameters():
        if "palora" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def softened() -> nn.Module:
    return ga.soften(convolutional())


def low_curvature() -> nn.Module:
    model = lcnn.convert(convolutional(), images())
    for _ in range(3):
        model(images())  # running statistics and singular vectors
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "denseformer": (densified, tokens),
    "hypermixer": (mixed, images),
    "palora": (adapted, images),
    "gradient-alignment": (softened, images),
    "lcnn": (low_curvature, images),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, data = NETWORKS[request.param]
    return build().eval(), data()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, list) else output


def test_outputs_and_gradients_equal_those_of_the_cpu(
    network: tuple[nn.Module, Tensor], device: str
) -> None:
    model, x = network
    moved = copy.deepcopy(model).to(device)
    want, got = first(model(x)), first(moved(x.to(device)))
    assert got.device.type == device
    assert_near(got, want, 1e-4)
    want.square().mean().backward()
    got.square().mean().backward()
    pairs = list(zip(moved.parameters(), model.parameters(), strict=True))
    assert any(b.grad is not None and b.grad.abs().max() > 0 for _, b in pairs)
    for a, b in pairs:
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert_near(a.grad, b.grad, 1e-3)


def test_autocast_stays_near_float32(network: tuple[nn.Module, Tensor], device: str) -> None:
    model, x = network
    want = first(model(x))
    moved = copy.deepcopy(model).to(device)
    with torch.autocast(device, torch.bfloat16):
        got = first(moved(x.to(device)))
        loss = got.float().square().mean()
    loss.backward()
    assert_near(got, want, 6e-2)
    grads = [p.grad for p in moved.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)


def test_compiled_in_one_graph_it_computes_the_same(
    network: tuple[nn.Module, Tensor], device: str
) -> None:
    model, x = network
    want = first(model(x))
    backend = "inductor" if device == "cuda" else "aot_eager"  # no C++ compiler is needed on a CPU
    compiled = torch.compile(copy.deepcopy(model).to(device), backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_near(first(compiled(x.to(device))), want, 1e-4)


@pytest.mark.parametrize("method", ["auction", "sinkhorn", "argmax", "refine"])
def test_distances_and_their_gradients_equal_those_of_the_cpu(method: str, device: str) -> None:
    x, y = (ellipses(4, 32, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    options: dict[str, Any] = {"method": method}
    if method in ("argmax", "refine"):
        options = {"method": "deepemd", "model": "tiny", "decode": method}
    results = []
    for place in ("cpu", device):
        cloud = x.to(place, copy=True).requires_grad_()
        loss = deepemd.emd_loss(cloud, y.to(place), **options)
        loss.backward()
        assert loss.device.type == place
        results.append((loss, cloud.grad))
    exact = deepemd.emd(x, y, method="exact").mean()
    (want, want_grad), (got, got_grad) = results
    assert_near(got, want, 1e-2)  # another order of sums may tip a tie between two matchings
    assert torch.cosine_similarity(got_grad.cpu().flatten(), want_grad.flatten(), 0) > 0.95
    assert abs(got.item() - exact.item()) < 0.1 * exact.item()


def test_players_step_back_to_the_same_place(device: str) -> None:
    results = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(5).to(place)) for _ in range(2)]
        players = [torch.optim.Adam([w], 0.1, maximize=i == 1) for i, w in enumerate(weights)]
        lookahead = LookaheadMinmax(players, k=3)
        for _ in range(9):
            for player in players:
                player.zero_grad()
                (weights[0] @ weights[1]).backward()
                player.step()
            lookahead.step()
        results.append(torch.cat([w.detach() for w in weights]))
    assert results[1].device.type == device
    assert_near(results[1], results[0], 1e-5)


def test_weights_are_edited_to_the_same_bits(device: str) -> None:
    torch.manual_seed(0)
    base = {f"blocks.{i}.weight": torch.randn(8, 8) for i in range(4)}
    tuned = {name: value + 0.1 * torch.randn(8, 8) for name, value in base.items()}
    want = lm.edit(base, tuned, gamma=0.2)
    moved = [{name: value.to(device) for name, value in state.items()} for state in (base, tuned)]
    got = lm.edit(*moved, gamma=0.2)
    assert all(value.device.type == device for value in got.values())
    assert all(torch.equal(got[name].cpu(), value) for name, value in want.items())


def test_the_regularised_loss_and_its_gradients_equal_those_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    model = softened()
    x, y = images(), torch.arange(6) % 4
    results = []
    for place in ("cpu", device):
        moved = copy.deepcopy(model).to(place)
        regularizer = ga.ScoreMatching(weight=1e-2, estimator="exact")
        loss = ga.RegularizedLoss(moved, regularizer)(x.to(place), y.to(place))
        loss.backward()
        results.append((loss, [p.grad for p in moved.parameters()]))
    (want, want_grads), (got, got_grads) = results
    assert_near(got, want, 1e-4)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_near(a, b, 1e-3)


def test_importance_of_parameters_equals_that_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    model = convolutional().eval()
    x, y = images(), torch.arange(6) % 4
    results = []
    for place in ("cpu", device):
        moved = copy.deepcopy(model).to(place)
        ewc = sequel.torch.EWC(moved, lam=2.0)
        ewc.consolidate([(x.to(place), y.to(place))])
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1)
        results.append((ewc.penalty(), ewc.omega.get()))
    (want, want_omega), (got, got_omega) = results
    assert got.device.type == device
    assert_near(got, want, 1e-4)
    for name, value in want_omega.items():
        assert_near(got_omega[name], value, 1e-3)


def test_information_on_a_device_is_near_the_closed_form(device: str) -> None:
    """Gaussian with correlation 0.8: half the log of 1 / (1 - 0.64) is 0.511 nats."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=generator)
    y = 0.8 * x + 0.6 * torch.randn(2000, 1, generator=generator)
    found = mi.mutual_information(
        x,
        y,
        method="mine",
        max_steps=400,
        device=device,
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(found.value - 0.511) < 0.1


def test_curvature_on_a_device_equals_that_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    model = low_curvature().eval()
    x, y = images(), torch.arange(6) % 4
    want = lcnn.curvature(model, x, y, method="exact")
    got = lcnn.curvature(
        copy.deepcopy(model).to(device), x.to(device), y.to(device), method="exact"
    )
    assert got.hessian_norm.device.type == device
    assert_near(got.hessian_norm, want.hessian_norm, 1e-3)
    assert_near(got.grad_norm, want.grad_norm, 1e-3)
