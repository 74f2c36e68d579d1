from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import fill
from torch import nn
from torch._dynamo.testing import CompileCounter

import palora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="before 2.6 a new preference is a new graph")
@pytest.mark.parametrize("kind", ["one", "rows", "rays"])
def test_whole_graph_without_recompiling_across_preferences(kind: str) -> None:
    model = fill(palora.inject(network(), 2, rank=2)).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 1, 6, 6)
    for seed in range(4):
        torch.manual_seed(seed)
        lam = torch.rand({"one": (2,), "rows": (6, 2), "rays": (3, 2)}[kind])
        lam = lam / lam.sum(-1, keepdim=True)
        if kind == "rays":
            ours, eager = palora.multi(compiled, lam, x), palora.multi(model, lam, x)
        else:
            with palora.preference(model, lam):
                ours, eager = compiled(x), model(x)
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_compiled_training_gives_eager_gradients() -> None:
    model = fill(palora.inject(network(), 2, rank=2))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 1, 6, 6)
    lam = torch.tensor([0.3, 0.7], requires_grad=True)
    other = lam.detach().clone().requires_grad_()
    with palora.preference(model, lam):
        compiled(x).square().mean().backward()
    with palora.preference(twin, other):
        twin(x).square().mean().backward()
    torch.testing.assert_close(lam.grad, other.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    with palora.preference(model, [0.3, 0.7]), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_attention_and_embedding_compile_whole() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = (
                nn.Embedding(9, 8),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )

        def forward(self, x: torch.Tensor) -> Any:
            h = self.embed(x)
            return self.attention(h, h, h, need_weights=False)[0]

    model = fill(palora.inject(Block(), 2, rank=2, target=["embed", "attention"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randint(9, (3, 4))
    for lam in ([0.5, 0.5], torch.full((3, 2), 0.5)):
        with palora.preference(model, lam):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_agrees_with_eager() -> None:
    model = fill(palora.inject(network(), 2, rank=2)).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(6, 1, 6, 6)
    for lam in ([0.3, 0.7], [0.9, 0.1]):
        with palora.preference(model, lam):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_merged_model_exports_with_torch_export() -> None:
    model = fill(palora.inject(network(), 2, rank=2)).eval()
    merged = palora.merge(model, [0.3, 0.7])
    x = torch.randn(6, 1, 6, 6)
    program = torch.export.export(merged, (x,))
    assert not any("palora" in name for name in program.state_dict)
    plain = torch.export.export(network().eval(), (x,))
    ops = [[n.target for n in p.graph.nodes if n.op == "call_function"] for p in (program, plain)]
    assert ops[0] == ops[1]  # the plain model's graph, operation by operation
    torch.testing.assert_close(program.module()(x), merged(x))
