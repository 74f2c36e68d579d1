from __future__ import annotations

import geomloss
import pytest
import torch
from conftest import lap, pair

import deepemd
from deepemd import compat


def test_pytorchemd_s_function_is_n_times_our_mean() -> None:
    x, y = pair(2, 20, dtype=torch.float32)
    total = compat.earth_mover_distance(x, y, transpose=False, method="exact")
    torch.testing.assert_close(total, 20 * deepemd.emd(x, y))
    swapped = compat.earth_mover_distance(x.transpose(1, 2), y.transpose(1, 2), method="exact")
    torch.testing.assert_close(swapped, total)
    approximate = compat.earth_mover_distance(x, y, transpose=False)
    torch.testing.assert_close(approximate, deepemd.emd(x, y, method="approxmatch"))
    assert bool((approximate / 20 >= 0.98 * deepemd.emd(x, y)).all())
    assert compat.earth_mover_distance(x[0], y[0], transpose=False).shape == (1,)


def test_msn_s_module_returns_squared_distances_whose_root_mean_is_our_mean() -> None:
    x, y = pair(2, 32, dtype=torch.float32)
    dist, assignment = compat.emdModule()(x.requires_grad_(), y, 1e-5, 100_000)
    assert dist.shape == (2, 32)
    assert assignment.dtype == torch.int32
    exact = torch.from_numpy(lap(x, y))
    torch.testing.assert_close(dist.sqrt().mean(1).double(), exact, rtol=1e-4, atol=0)
    for row in assignment:
        assert sorted(row.tolist()) == list(range(32))
    dist.sqrt().mean().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("p", "blur"), [(1, 0.05), (2, 0.1)])
@pytest.mark.parametrize("debias", [True, False])
def test_samples_loss_agrees_with_geomloss(p: int, blur: float, debias: bool) -> None:
    x, y = pair(2, 40)
    ours = compat.SamplesLoss("sinkhorn", p=p, blur=blur, debias=debias, scaling=0.9, n_iter=3000)
    theirs = geomloss.SamplesLoss(
        "sinkhorn", p=p, blur=blur, debias=debias, scaling=0.99, backend="tensorized"
    )
    x.requires_grad_()
    a = ours(x, y)
    (ga,) = torch.autograd.grad(a.sum(), x)
    b = theirs(x, y)
    (gb,) = torch.autograd.grad(b.sum(), x)
    # geomloss stops with its annealing, we iterate on to the fixed point: hence 1 %
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(ga.flatten(), gb.flatten(), dim=0)
    assert float(cosine) > 0.99


def test_samples_loss_takes_weights_single_clouds_and_tends_to_the_emd() -> None:
    x, y = pair(1, 15)
    loss = compat.SamplesLoss(p=1, blur=1e-3, debias=False, scaling=0.95, n_iter=5000)
    single = loss(x[0], y[0])
    assert single.shape == ()
    torch.testing.assert_close(single, deepemd.emd(x[0], y[0]), rtol=1e-2, atol=0)
    even = torch.full((15,), 1 / 15, dtype=torch.float64)
    torch.testing.assert_close(loss(even, x[0], even, y[0]), single)
    with pytest.raises(ValueError, match="got 3 tensors"):
        loss(x, y, x)
    with pytest.raises(ValueError, match="loss must be 'sinkhorn'"):
        compat.SamplesLoss("energy")
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        compat.SamplesLoss(p=3)
