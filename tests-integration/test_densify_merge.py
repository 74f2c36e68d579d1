"""denseformer and lines-merge: a densified language model is fine-tuned twice, then merged."""

from __future__ import annotations

import copy

import denseformer
import lines_merge as lm
import pytest
import torch
from torch import Tensor, nn
from toys import GPT, walks

TASKS = {"up": (0, 1), "down": (8, -1)}  # first token and step: disjoint halves of the vocabulary


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, tasks: list[str], steps: int, lr: float, device: str) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(denseformer.param_groups(model, weight_decay=0.01), lr=lr)
    for step in range(steps):
        first, stride = TASKS[tasks[step % len(tasks)]]
        loss = next_token_loss(model, walks(16, 12, first, stride, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def finetuned() -> tuple[nn.Module, dict[str, nn.Module]]:
    """A densified model that has seen a little of both tasks, and one fine-tuned model of each."""
    torch.manual_seed(0)
    base = train(denseformer.densify(GPT(), dilation=2), ["up", "down"], 20, 3e-3, "cpu")
    return base, {task: train(copy.deepcopy(base), [task], 40, 3e-3, "cpu") for task in TASKS}


def test_the_depth_of_a_densified_model_is_that_of_its_blocks() -> None:
    names = denseformer.densify(GPT(depth=6), dilation=2).state_dict()
    depth = lm.DepthMap.from_names(names)
    for name in names:
        block = depth[name]
        if name.startswith("blocks."):
            assert block is not None
            assert (block.index, block.count) == (int(name.split(".")[1]), 6)
        else:
            assert block is None  # the averages lie between the blocks: they belong to none
    assert {name for name in names if name.startswith("dwa.")} == {"dwa.weight", "dwa.geometry"}


def test_averages_are_scaled_like_the_weights_outside_the_blocks(
    finetuned: tuple[nn.Module, dict[str, nn.Module]],
) -> None:
    base, models = finetuned
    merged = lm.merge(base, models, alpha=0.5, beta=0.5)
    start = base.state_dict()
    for name, value in start.items():
        if not value.is_floating_point():
            assert torch.equal(merged[name], value), name  # the averages' geometry is no weight
            continue
        index = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        delta = sum(model.state_dict()[name].double() - value.double() for model in models.values())
        want = value.double() + (0.5 + 0.5 * index / 5) * delta
        torch.testing.assert_close(merged[name].double(), want, rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged["dwa.weight"], start["dwa.weight"])


def test_one_merged_model_is_better_at_both_tasks_than_the_base(
    finetuned: tuple[nn.Module, dict[str, nn.Module]],
) -> None:
    base, models = finetuned
    merged = copy.deepcopy(base)
    merged.load_state_dict(lm.merge(base, models, alpha="auto", beta=0.5))
    generator = torch.Generator().manual_seed(1)
    for first, stride in TASKS.values():
        tokens = walks(64, 12, first, stride, generator)
        with torch.no_grad():
            before, after = (next_token_loss(model, tokens).item() for model in (base, merged))
        assert after < 0.8 * before


def test_a_merged_checkpoint_on_disk_loads_into_a_densified_model(
    finetuned: tuple[nn.Module, dict[str, nn.Module]], tmp_path
) -> None:
    from safetensors.torch import load_file, save_file

    base, models = finetuned
    for name, model in {"base": base, **models}.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{task}.safetensors" for task in models]
    lm.merge_files(
        tmp_path / "base.safetensors", files, tmp_path / "out", alpha=0.5, beta=0.5, progress=False
    )
    (written,) = (tmp_path / "out").glob("*.safetensors")
    state = load_file(written)
    want = lm.merge(base, models, alpha=0.5, beta=0.5)
    assert all(torch.equal(state[name], want[name]) for name in want)
    model = denseformer.densify(GPT(), dilation=2)
    model.load_state_dict(state)
    tokens = walks(4, 12, 0, 1, torch.Generator().manual_seed(2))
    reference = copy.deepcopy(base)
    reference.load_state_dict(want)
    assert torch.equal(model.eval()(tokens), reference.eval()(tokens))
