"""A byte-level language model between two domains: English prose and Python source.

Task 1 is the next byte of the text in CPython's ``pydoc_data/topics.py``, task 2 the next byte of
the standard library's source. One model serves both ends and everything between, also within one
batch: each sample has its own preference.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import json
import json.decoder
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import palora

__all__ = ["ByteModel", "corpora", "main", "train"]


def corpora() -> tuple[Tensor, Tensor]:
    """Return the two texts as byte tensors: about 0.7 MB of English, 0.4 MB of Python."""
    topics = importlib.import_module("pydoc_data.topics").topics
    prose = "\n".join(topics[key] for key in sorted(topics))
    parts = (m for m in vars(asyncio).values() if inspect.ismodule(m))
    loops = sorted({m.__name__: m for m in parts if m.__name__.startswith("asyncio.")}.items())
    modules = [argparse, inspect, json.decoder, *(m for _, m in loops)]
    source = "\n".join(inspect.getsource(m) for m in modules)
    texts = (prose.encode(), source.encode())
    first, second = (torch.tensor(list(text), dtype=torch.long) for text in texts)
    return first, second


class ByteModel(nn.Module):
    """A two-layer causal transformer over bytes.

    Args:
        width: of the residual stream.
        context: longest input.
    """

    def __init__(self, width: int = 64, context: int = 64) -> None:
        """Build the layers."""
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, length, 256)`` for bytes ``(n, length)``."""
        length = x.shape[1]
        hidden = self.embed(x) + self.position[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        logits: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


def _draw(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    return torch.stack([text[s : s + length + 1] for s in starts.tolist()])


def train(steps: int = 300, batch: int = 16, rays: int = 3, seed: int = 0) -> dict[str, Any]:
    """Train the model and compare both ends of the dial in one batch.

    Returns:
        bits per byte on held-out text, by text and by preference, from one mixed batch.
    """
    torch.manual_seed(seed)
    texts = corpora()
    held = [t[-len(t) // 10 :] for t in texts]
    texts = (texts[0][: -len(held[0])], texts[1][: -len(held[1])])
    model = palora.inject(ByteModel(), ["prose", "code"], rank=4)
    optimizer = torch.optim.Adam(palora.param_groups(model, 2e-3))
    schedule = palora.Schedule(2, num=rays)
    generator = torch.Generator().manual_seed(seed)

    def losses(logits: Tensor, target: Tensor) -> list[Tensor]:
        halves = zip(logits.chunk(2), target.chunk(2), strict=True)
        return [F.cross_entropy(y.flatten(0, 1), t.flatten()) for y, t in halves]

    for step in range(steps):
        rows = torch.cat([_draw(t, batch, 64, generator) for t in texts])
        out = palora.step_loss(
            model, losses, (rows[:, :-1], rows[:, 1:]), schedule((step + 1) / steps)
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    model.eval()
    samples = [_draw(t, 32, 64, generator) for t in held]
    # one batch: each text at three preferences, row by row
    dial = torch.tensor([[0.99, 0.01], [0.5, 0.5], [0.01, 0.99]])
    rows = torch.cat([s for s in samples for _ in dial])
    lam = dial.repeat_interleave(32, 0).repeat(2, 1)
    with torch.no_grad(), palora.preference(model, lam):
        logits = model(rows[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    bits = nats.view(2, 3, -1).mean(-1) / torch.log(torch.tensor(2.0))
    return {"prose": bits[0].tolist(), "code": bits[1].tolist(), "preferences": dial.tolist()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(json.dumps(train(args.steps, seed=args.seed)))


if __name__ == "__main__":
    main()
