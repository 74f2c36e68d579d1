from __future__ import annotations

import pytest
import torch
from conftest import make_net
from torch import nn

import gradient_alignment as ga

F64 = torch.float64


def jacobians(net, x):
    """d f_i / d x of every sample, (B, C, D), one sample at a time: the oracle."""
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda s: net(s[None])[0], row) for row in x]
    )


def test_every_target_is_a_combination_of_the_jacobians_rows(net, batch):
    x, y = batch
    rows, p = jacobians(net, x), net(x).softmax(1).detach()
    own = rows[torch.arange(4), y]
    expected = {
        "logit": own,
        "logprob": own - torch.einsum("bc,bcd->bd", p, rows),
        "loss": torch.einsum("bc,bcd->bd", p, rows) - own,
        "centered": own - rows.mean(1),
        "logsumexp": torch.einsum("bc,bcd->bd", p, rows),
    }
    for of, wanted in expected.items():
        torch.testing.assert_close(
            ga.input_gradient(net, x, y, of=of), wanted, rtol=0, atol=1e-13, msg=of
        )


def test_without_labels_the_predicted_class_is_taken(net, batch):
    x, _ = batch
    best = net(x).argmax(1)
    assert torch.equal(ga.input_gradient(net, x), ga.input_gradient(net, x, best))
    smooth = ga.smoothgrad(net, x, num_samples=1, noise_level=0.0)
    assert torch.equal(smooth, ga.input_gradient(net, x, best))


def test_gradients_can_be_differentiated_on_request(net, batch):
    x, y = batch
    maps = ga.input_gradient(net, x, y, create_graph=True)
    (found,) = torch.autograd.grad(maps.square().sum(), net[0].weight)
    h = 1e-6
    with torch.no_grad():
        net[0].weight[2, 1] += h
        up = ga.input_gradient(net, x, y).square().sum()
        net[0].weight[2, 1] -= 2 * h
        down = ga.input_gradient(net, x, y).square().sum()
    torch.testing.assert_close(found[2, 1], (up - down) / (2 * h), rtol=1e-6, atol=1e-8)
    assert not ga.input_gradient(net, x, y).requires_grad


def test_models_are_evaluated_in_evaluation_mode_and_restored_also_on_errors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = [module.training for module in model.modules()]
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    assert torch.equal(ga.input_gradient(model, x, y), ga.input_gradient(model, x, y))
    with pytest.raises(ValueError, match=r"y must be in 0\.\.1"):
        ga.input_gradient(model, x, y + 5)
    assert [module.training for module in model.modules()] == before


def test_the_callers_tensor_is_left_alone(net, batch):
    x, y = batch
    x = x.clone().requires_grad_()
    ga.input_gradient(net, x, y)
    ga.smoothgrad(net, x, y, num_samples=2)
    assert x.grad is None
    with torch.no_grad():
        assert ga.input_gradient(net, x, y).abs().sum() > 0


def test_smoothgrad_is_the_mean_over_noisy_copies(net, batch):
    x, y = batch
    for scale in ("image", "batch"):
        maps = ga.smoothgrad(
            net,
            x,
            y,
            num_samples=3,
            noise_level=0.2,
            scale=scale,
            generator=torch.Generator().manual_seed(3),
        )
        source = torch.Generator().manual_seed(3)
        noise = torch.stack([torch.randn(x.shape, generator=source, dtype=F64) for _ in range(3)])
        total = torch.zeros_like(x)
        for draw in noise:
            for b in range(4):
                span = x[b].max() - x[b].min() if scale == "image" else x.max() - x.min()
                total[b] += ga.input_gradient(
                    net, x[b : b + 1] + 0.2 * span * draw[b], y[b : b + 1]
                )[0]
        torch.testing.assert_close(maps, total / 3, rtol=0, atol=1e-13)


def test_channels_are_reduced_as_named():
    maps = torch.tensor([[[[1.0]], [[-3.0]], [[5.0]]]])
    assert ga.reduce_channels(maps).tolist() == [[[9.0]]]
    assert ga.reduce_channels(maps, "abs-max").tolist() == [[[5.0]]]
    # mean 1, squares (0, 16, 16) / 3
    assert ga.reduce_channels(maps, "std").item() == pytest.approx((32 / 3) ** 0.5)
    flat = torch.tensor([[1.0, -2.0]])
    assert ga.reduce_channels(flat).tolist() == [[1.0, 2.0]]
    assert ga.reduce_channels(flat, "std").tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x, y: ga.input_gradient(n, x, y, of="softmax"), ValueError, "of must be one of"),
        (lambda n, x, y: ga.input_gradient(n, x.long(), y), TypeError, "convert to float"),
        (lambda n, x, y: ga.input_gradient(n, x, y.float()), ValueError, "integer class indices"),
        (lambda n, x, y: ga.input_gradient(n, x, y[:2]), ValueError, r"y must have shape \(4,\)"),
        (
            lambda n, x, y: ga.input_gradient(lambda x: x, x[None], y),
            ValueError,
            r"\(B, C\) logits",
        ),
        (lambda n, x, y: ga.smoothgrad(n, x, y, num_samples=0), ValueError, "num_samples must be"),
        (lambda n, x, y: ga.smoothgrad(n, x, y, noise_level=-1), ValueError, "noise_level must be"),
        (lambda n, x, y: ga.smoothgrad(n, x, y, scale="x"), ValueError, "scale must be one of"),
        (lambda n, x, y: ga.reduce_channels(x, "sum"), ValueError, "how must be one of"),
    ],
)
def test_bad_input(call, error, message, net, batch):
    with pytest.raises(error, match=message):
        call(net, *batch)


def test_saliency_is_captums(batch):
    attr = pytest.importorskip("captum.attr")
    net, (x, y) = make_net(), batch
    wanted = attr.Saliency(net).attribute(x.clone().requires_grad_(), y, abs=False)
    torch.testing.assert_close(ga.input_gradient(net, x, y), wanted, rtol=0, atol=1e-14)
