"""EMA, uniform average and BatchNorm re-estimation against their definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import BilinearGame
from torch import nn

from lookahead_minmax import EMA, LookaheadMinmax, UniformAverage, recalibrate


def layer(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return module


def weight_of(average: Any) -> float:
    with average.average():
        return float(average.module.weight.detach())


def test_ema_is_its_recursion() -> None:
    module = layer(1.0, torch.float64)
    ema, expected = EMA(module, decay=0.9), 1.0
    for value in (2.0, -1.0, 0.5):
        nn.init.constant_(module.weight, value)
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    assert weight_of(ema) == pytest.approx(expected, rel=1e-14)
    assert module.weight.item() == 0.5


def test_uniform_average_is_the_mean_of_the_updates() -> None:
    module = layer(100.0, torch.float64)
    average = UniformAverage(module)
    for value in (2.0, -1.0, 0.5):
        nn.init.constant_(module.weight, value)
        average.update()
    assert weight_of(average) == pytest.approx(0.5, rel=1e-14)


def test_live_weights_come_back_after_an_error() -> None:
    module = layer(1.0)
    ema = EMA(module)
    nn.init.constant_(module.weight, 3.0)
    with pytest.raises(ZeroDivisionError), ema.average():
        raise ZeroDivisionError
    assert module.weight.item() == 3.0


def test_half_precision_is_averaged_in_float32() -> None:
    module = layer(1.0, torch.bfloat16)
    ema = EMA(module, decay=0.999)
    nn.init.constant_(module.weight, 2.0)
    for _ in range(100):
        ema.update()
    (value,) = ema.state_dict()["values"].values()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2 - 0.999**100, rel=1e-5)


@pytest.mark.parametrize("buffers", ["copy", "ema"])
def test_buffers_are_copied_or_averaged(buffers: Any) -> None:
    module = nn.BatchNorm1d(2, momentum=1.0)
    ema = EMA(module, decay=0.5, buffers=buffers)
    module(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    ema.update()
    mean = torch.tensor([2.0, 4.0])
    expected = mean if buffers == "copy" else mean / 2
    assert torch.equal(ema.module_state_dict()["running_mean"], expected)
    assert ema.module_state_dict()["num_batches_tracked"] == 1
    assert torch.equal(ema.averaged_module().running_mean, expected)
    assert torch.equal(module.running_mean, mean)


def test_ema_slow_is_updated_at_synchronisations_with_the_synced_point() -> None:
    game = BilinearGame()
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    la = LookaheadMinmax(game.players, k=2)
    ema = EMA(module, decay=0.5)
    la.on_sync(lambda: (module.weight.data.copy_(game.x.data), ema.update()))
    for _ in range(2):
        game.simultaneous()
        la.step()
    assert ema.updates == 1
    assert weight_of(ema) == (1.0 + 0.875) / 2


def test_state_dict_round_trip() -> None:
    module = layer(1.0)
    ema = EMA(module, decay=0.5)
    nn.init.constant_(module.weight, 3.0)
    ema.update()
    other = EMA(layer(7.0), decay=0.5)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert weight_of(other) == 2.0
    assert other.updates == 1
    with pytest.raises(ValueError, match="does not fit the module"):
        EMA(nn.Linear(2, 2)).load_state_dict(ema.state_dict())


def test_deepcopy_is_independent() -> None:
    module = layer(1.0)
    ema = EMA(module, decay=0.5)
    other_module, other = copy.deepcopy((module, ema))
    nn.init.constant_(other_module.weight, 3.0)
    other.update()
    assert (weight_of(ema), weight_of(other)) == (1.0, 2.0)


def test_recalibrate_is_the_mean_over_the_batches() -> None:
    module = nn.BatchNorm1d(1, momentum=0.1)
    module.eval()
    batches = [torch.randn(8, 1) + shift for shift in (1.0, 5.0)]
    recalibrate(module, batches)
    torch.testing.assert_close(module.running_mean, torch.stack(batches).mean((0, 1)))
    assert module.momentum == 0.1
    assert not module.training


def test_bad_options_are_refused() -> None:
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            EMA(layer(1.0), decay=decay)
    with pytest.raises(ValueError, match="buffers must be 'copy' or 'ema', got 'drop'"):
        UniformAverage(layer(1.0), buffers="drop")  # type: ignore[arg-type]
