"""ListOps, generated offline as in the Long Range Arena: nested MIN, MAX, MED and SM of digits."""

from __future__ import annotations

import random
from statistics import median

import torch
from torch import Tensor

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
VOCABULARY = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
_INDEX = {token: i for i, token in enumerate(VOCABULARY)}
_OPERATOR_PROBABILITY = 0.25


def evaluate(operator: str, values: list[int]) -> int:
    """Return an operator's value: MED is the integer part of the median, SM the sum modulo 10."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    return int(median(values)) if operator == "[MED" else sum(values) % 10


def _grow(
    rng: random.Random, depth: int, max_depth: int, max_args: int, room: int
) -> tuple[list[str], int]:
    """Return a tree's tokens and value; give up early (tokens longer than room) on large trees."""
    if depth >= max_depth or rng.random() > _OPERATOR_PROBABILITY:
        digit = rng.randrange(10)
        return [str(digit)], digit
    operator = rng.choice(OPERATORS)
    tokens, values = [operator], []
    for _ in range(rng.randint(2, max_args)):
        part, value = _grow(rng, depth + 1, max_depth, max_args, room - len(tokens))
        tokens += part
        values.append(value)
        if len(tokens) > room:
            return tokens, 0
    return [*tokens, "]"], evaluate(operator, values)


def make_listops(
    num_samples: int,
    *,
    seed: int = 0,
    max_depth: int = 5,
    max_args: int = 5,
    min_length: int = 20,
    max_length: int = 120,
) -> tuple[Tensor, Tensor]:
    """Generate distinct expressions.

    Args:
        num_samples: n.
        seed: of the draw.
        max_depth: of the tree (the arena's edition: 10).
        max_args: of an operator (10).
        min_length: tokens, more than this (500).
        max_length: tokens, fewer than this (2000).

    Returns:
        Token ids (n, ``max_length``) filled up with 0, and values (n,).

    Example:
        >>> tokens, values = make_listops(4)
        >>> tokens.shape, values.shape
        (torch.Size([4, 120]), torch.Size([4]))
    """
    rng = random.Random(seed)
    seen: dict[tuple[str, ...], int] = {}
    while len(seen) < num_samples:
        tokens, value = _grow(rng, 1, max_depth, max_args, max_length)
        if min_length < len(tokens) < max_length:
            seen.setdefault(tuple(tokens), value)
    ids = torch.zeros(num_samples, max_length, dtype=torch.long)
    for row, expression in enumerate(seen):
        ids[row, : len(expression)] = torch.tensor([_INDEX[token] for token in expression])
    return ids, torch.tensor(list(seen.values()))
