from __future__ import annotations

import pytest
import torch
from conftest import lap, pair

import deepemd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "exact"},
        {"method": "auction", "eps": 1e-5},
        {"method": "sinkhorn"},
        {"method": "chamfer"},
        {"method": "sliced"},
        {"method": "approxmatch"},
        {"method": "deepemd", "decode": "soft"},
    ],
)
def test_a_gpu_gives_the_cpu_s_distance_and_gradient(options: dict) -> None:
    x, y = pair(3, 40, dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        value = deepemd.emd(leaf, y.to(device), **options)
        value.sum().backward()
        assert leaf.grad is not None
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(
        results[0][1].flatten(), results[1][1].flatten(), dim=0
    )
    assert float(cosine) > 0.98


def test_auto_on_a_gpu_is_the_certified_network() -> None:
    x, y = pair(4, 64, dtype=torch.float32)
    out = deepemd.match(x.cuda(), y.cuda())
    assert out.method == "deepemd"
    assert bool(out.converged.all())
    exact = torch.from_numpy(lap(x, y))
    assert bool((out.distance.cpu().double() <= exact / 0.99 + 1e-6).all())
