from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import close, fill, naive_weight
from torch import Tensor, nn

import palora

D = torch.float64
RAYS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1]])


def network(momentum: float | None = 0.1, affine: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum, affine=affine), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, groups=2), nn.BatchNorm2d(6, momentum=momentum),
        nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.LayerNorm(5),
    ).double()  # fmt: skip


def loop(model: nn.Module, rays: Tensor, *args: Any) -> Tensor:
    outs = []
    for lam in rays:
        with palora.preference(model, lam):
            outs.append(model(*args))
    return torch.stack(outs)


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("affine", [True, False])
def test_one_pass_equals_the_loop_with_gradients_and_running_statistics(
    momentum: float | None, affine: bool
) -> None:
    model = fill(palora.inject(network(momentum, affine), 3, rank=2))
    twin = copy.deepcopy(model)
    x = torch.randn(7, 1, 8, 8, dtype=D)
    for _ in range(2):
        ours, theirs = palora.multi(model, RAYS, x), loop(twin, RAYS, x)
        close(ours, theirs)
        g = torch.randn_like(ours)
        a = torch.autograd.grad((ours * g).sum(), list(model.parameters()))
        b = torch.autograd.grad((theirs * g).sum(), list(twin.parameters()))
        for p, q in zip(a, b, strict=True):
            # cancellation in the gradient through two normalisations costs a digit
            close(p, q, 1e-11)
        for p, q in zip(model.buffers(), twin.buffers(), strict=True):
            close(p.double(), q.double())
    assert int(model[1].num_batches_tracked) == 6
    model.eval(), twin.eval()
    close(palora.multi(model, RAYS, x), loop(twin, RAYS, x))


def test_other_batch_norms_keep_rays_apart_by_their_own_forward() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    for norm in (
        Activated(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.InstanceNorm2d(4),
    ):
        model = fill(palora.inject(nn.Sequential(nn.Conv2d(1, 4, 3), norm).double(), 3, rank=1))
        twin = copy.deepcopy(model)
        x = torch.randn(3, 1, 6, 6, dtype=D)
        close(palora.multi(model, RAYS, x), loop(twin, RAYS, x))
        for p, q in zip(model.buffers(), twin.buffers(), strict=True):
            close(p.double(), q.double())


def test_joint_normalisation_takes_all_rays_as_one_batch() -> None:
    model = fill(
        palora.inject(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double(), 3, rank=1)
    )
    x = torch.randn(6, 4, dtype=D)
    out = palora.multi(model, RAYS, x, norm="joint")
    hidden = loop(nn.Sequential(model[0]), RAYS, x).flatten(0, 1)
    expected = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    close(out.flatten(0, 1), expected)
    assert int(model[1].num_batches_tracked) == 1


def test_norms_added_after_injection_are_found() -> None:
    model = fill(palora.inject(nn.Sequential(nn.Linear(4, 5)).double(), 3, rank=1))
    model.append(nn.BatchNorm1d(5).double())
    x = torch.randn(6, 4, dtype=D)
    close(palora.multi(model, RAYS, x), loop(copy.deepcopy(model), RAYS, x))


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_chunks_change_nothing(chunk: int) -> None:
    model = fill(palora.inject(network(), 3, rank=2))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 1, 8, 8, dtype=D)
    close(palora.multi(model, RAYS, x, chunk=chunk), loop(twin, RAYS, x))
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        close(p.double(), q.double())


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, table: Tensor, *, mask: Tensor, flag: bool = True
    ) -> dict[str, Any]:
        assert table.shape[0] == 2
        y = self.layer(x) * mask + table[:1].sum()
        return {"y": y, "pair": (y.sum(1), "text"), "flag": flag}


def test_arguments_and_outputs_may_be_structures() -> None:
    model = fill(palora.inject(Structured().double(), 3, rank=1))
    x, table = torch.randn(5, 4, dtype=D), torch.randn(2, 4, dtype=D)
    mask = torch.rand(5, 1, dtype=D)
    out = palora.multi(model, RAYS, x, table, mask=mask)
    assert out["flag"] is True
    assert out["pair"][1] == "text"
    for i, lam in enumerate(RAYS):
        with palora.preference(model, lam):
            close(out["y"][i], model(x, table, mask=mask)["y"])
    chunked = palora.multi(model, RAYS, x, table, mask=mask, chunk=2)
    close(chunked["pair"][0], out["pair"][0])
    assert chunked["pair"][1] == "text"


def test_batch_arguments_may_be_named_where_sizes_mislead() -> None:
    model = fill(palora.inject(Structured().double(), 3, rank=1))
    x, table = torch.randn(2, 4, dtype=D), torch.randn(2, 4, dtype=D)  # both have two rows
    mask = torch.rand(2, 1, dtype=D)
    out = palora.multi(model, RAYS, x, table, mask=mask, batch_args=[0, "mask"])
    close(
        out["y"], torch.stack([o["y"] for o in [run(model, lam, x, table, mask) for lam in RAYS]])
    )


def run(model: nn.Module, lam: Tensor, x: Tensor, table: Tensor, mask: Tensor) -> Any:
    with palora.preference(model, lam):
        return model(x, table, mask=mask)


def test_a_loss_inside_the_model_needs_the_loop() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().mean()

    model = fill(palora.inject(Inside(), 3, rank=1))
    with pytest.raises(ValueError, match=r"a loss computed inside the model.*chunk=1"):
        palora.multi(model, RAYS, torch.ones(2, 4))
    assert palora.multi(model, RAYS, torch.ones(2, 4), chunk=1).shape == (3,)


@pytest.mark.parametrize(
    ("kw", "message"), [({"norm": "x"}, "norm must be"), ({"chunk": 0}, "chunk must be at least 1")]
)
def test_bad_options(kw: dict[str, Any], message: str) -> None:
    model = palora.inject(nn.Linear(4, 4), 3, rank=1)
    with pytest.raises(ValueError, match=message):
        palora.multi(model, RAYS, torch.ones(2, 4), **kw)
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        palora.multi(model, RAYS)


def test_a_layer_that_leaves_the_batch_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.ones(3, 4))[:1]

    model = palora.inject(Odd(), 3, rank=1)
    with pytest.raises(ValueError, match=r"layer 'table'.*dimension is 3.*6 rows"):
        palora.multi(model, RAYS, torch.ones(2, 4))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout2d])
def test_shared_dropout_masks(drop: Any, inplace: bool) -> None:
    model = palora.inject(nn.Sequential(nn.Conv2d(1, 8, 1), drop(0.5, inplace=inplace)), 3, rank=1)
    x = torch.ones(4, 1, 3, 3)
    shared = palora.multi(model, RAYS, x, shared_mask=True)
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    own = palora.multi(model, RAYS, x)
    assert not torch.equal(own[0] == 0, own[1] == 0)
    plain = model.eval()
    ratio = shared / palora.multi(plain, RAYS, x, shared_mask=True)
    torch.testing.assert_close(ratio, torch.where(ratio > 1, 2.0, 0.0), rtol=0, atol=1e-5)


def test_first_layers_shortcut_is_left_when_the_input_was_changed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x[::2] += 1.0  # other rows in other rays when the batch is odd
            return self.layer(x)

    model = fill(palora.inject(Noisy().double(), 3, rank=1, path="activation"))
    x = torch.randn(5, 4, dtype=D)
    out = palora.multi(model, RAYS, x)
    tiled = x.repeat(3, 1)
    tiled[::2] += 1.0
    with palora.preference(model, RAYS.repeat_interleave(5, 0)):
        expected = model.layer(tiled)
    close(out.flatten(0, 1), expected)


def test_unpooling_with_indices_runs_in_one_pass() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y, index = nn.functional.max_pool2d(self.a(x), 2, return_indices=True)
            return self.b(nn.functional.max_unpool2d(y, index, 2))

    model = fill(palora.inject(Pooled().double(), 3, rank=1))
    x = torch.randn(2, 1, 6, 6, dtype=D)
    close(palora.multi(model, RAYS, x), loop(model, RAYS, x))


def test_layers_that_see_another_first_dimension_name_the_way_out() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model = fill(palora.inject(TimeFirst(), 2, rank=1))
    rays, x = torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.randn(3, 5, 4)
    with pytest.raises(ValueError, match=r"layer 'layer'.* is 5.* has 6 rows.*use chunk=1"):
        palora.multi(model, rays, x)
    expand = r"is 5.* has 3 rows.*allow_expand=True"
    with pytest.raises(ValueError, match=expand), palora.preference(model, rays[[0, 1, 0]]):
        model(x)
    found = palora.multi(model, rays, x, chunk=1)
    for lam, out in zip(rays, found, strict=True):
        weight = naive_weight(model.layer, lam).float()
        expected = x @ weight.t() + model.layer.bias
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
