"""hypermixer and palora: a ViT mixes tokens by HyperMixing and turns a dial between two tasks."""

from __future__ import annotations

import copy

import hypermixer
import palora
import pytest
import torch
from torch import Tensor, nn
from toys import ViT, spots


def losses(outputs: list[Tensor], row: Tensor, column: Tensor) -> list[Tensor]:
    return [
        nn.functional.cross_entropy(outputs[0], row),
        nn.functional.cross_entropy(outputs[1], column),
    ]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = ViT()
    report = hypermixer.convert(model)
    assert [entry for entry, _ in report.replaced] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
    ]
    palora.inject(model, ["row", "column"], rank=2)
    optimizer = torch.optim.Adam(palora.param_groups(model, lr=3e-3))
    schedule = palora.Schedule(tasks=2, num=3)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(60):
        out = palora.step_loss(model, losses, spots(32, generator), schedule((step + 1) / 60))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.losses.mean().item())
    return model.eval(), history


def test_both_losses_are_learned(trained: tuple[nn.Module, list[float]]) -> None:
    _, history = trained
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


def test_adapters_stand_on_the_linear_layers_and_mixing_is_left_alone(
    trained: tuple[nn.Module, list[float]],
) -> None:
    model, _ = trained
    adapted = {name.rpartition(".palora_")[0] for name, _ in model.named_parameters()} - {""}
    blocks = {f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    assert adapted == {"embed", "heads.0", "heads.1"} | blocks


@pytest.mark.parametrize("setting", [[0.9, 0.1], [0.25, 0.75]])
def test_a_merged_preference_gives_the_same_outputs(
    trained: tuple[nn.Module, list[float]], setting: list[float]
) -> None:
    model = copy.deepcopy(trained[0]).double()
    images = spots(8, torch.Generator().manual_seed(1))[0].double()
    merged = palora.merge(model, setting)
    assert not [name for name, _ in merged.named_parameters() if "palora" in name]
    with torch.no_grad(), palora.preference(model, setting):
        want = model(images)
    with torch.no_grad():
        got = merged(images)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_dial_moves_the_network(trained: tuple[nn.Module, list[float]]) -> None:
    model, _ = trained
    images = spots(8, torch.Generator().manual_seed(1))[0]
    with torch.no_grad(), palora.preference(model, {"row": 1.0, "column": 0.0}):
        left = model(images)[0]
    with torch.no_grad(), palora.preference(model, {"row": 0.0, "column": 1.0}):
        right = model(images)[0]
    assert (left - right).abs().max() > 1e-3


def test_one_preference_per_image_equals_one_pass_each(
    trained: tuple[nn.Module, list[float]],
) -> None:
    model = copy.deepcopy(trained[0]).double()
    images = spots(3, torch.Generator().manual_seed(1))[0].double()
    table = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        with palora.preference(model, table):
            together = model(images)[0]
        for i in range(3):
            with palora.preference(model, table[i]):
                alone = model(images[i : i + 1])[0]
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
