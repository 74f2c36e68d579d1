"""Eq. 1 and what surrounds it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lines_merge as lm

NAMES = [f"blocks.{i}.fc.weight" for i in range(12)] + [
    "embed.weight",
    "norm.weight",
    "head.weight",
]


def test_twelve_blocks_by_the_formula() -> None:
    factors = lm.scales(NAMES, 0.25, 0.75)
    for i in range(12):
        exact = Fraction(1, 4) + Fraction(3, 4) * Fraction(i, 11)
        assert factors[f"blocks.{i}.fc.weight"] == pytest.approx(float(exact), rel=1e-15)
    assert factors["embed.weight"] == factors["head.weight"] == 0.25
    assert factors["blocks.11.fc.weight"] == 1


def test_reverse_mirrors_the_blocks_and_leaves_the_outside() -> None:
    forward, reverse = lm.scales(NAMES, 0.2, 0.8), lm.scales(NAMES, 0.2, 0.8, schedule="reverse")
    for i in range(12):
        assert reverse[f"blocks.{i}.fc.weight"] == forward[f"blocks.{11 - i}.fc.weight"]
    assert reverse["embed.weight"] == 0.2


def test_outside_rules() -> None:
    def outside(rule: object) -> list[float]:
        factors = lm.scales(NAMES, 0.2, 0.8, outside=rule)  # type: ignore[arg-type]
        return [factors[name] for name in ("embed.weight", "norm.weight", "head.weight")]

    assert outside("alpha") == [0.2, 0.2, 0.2]
    assert outside("depth") == [0.2, 1.0, 1.0]
    assert outside(0.5) == [0.5, 0.5, 0.5]
    assert outside(lambda name: float(len(name))) == [12.0, 11.0, 11.0]


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("model.embed_tokens.weight", False),
        ("visual.ln_pre.weight", False),
        ("vision_model.pre_layrnorm.weight", False),
        ("embeddings.LayerNorm.weight", False),
        ("embeddings.norm.weight", False),
        ("cls_token", False),
        ("stem.1.weight", False),
        ("conv1.weight", False),
        ("transformer.wpe.weight", False),
        ("patch_embed.norm.weight", False),
        ("bn1.running_mean", False),
        ("model.norm.weight", True),
        ("ln_f.weight", True),
        ("visual.ln_post.weight", True),
        ("visual.proj", True),
        ("text_projection", True),
        ("logit_scale", True),
        ("lm_head.weight", True),
        ("head.fc.weight", True),
        ("classifier.weight", True),
        ("fc.weight", True),
        ("pooler.dense.weight", True),
        ("encoder.final_layer_norm.weight", True),
        ("vision_model.post_layernorm.bias", True),
    ],
)
def test_outside_by_depth_knows_what_lies_behind_the_blocks(name: str, behind: bool) -> None:
    factors = lm.scales([*NAMES, name], 0.25, 0.5, outside="depth")
    assert factors[name] == (0.75 if behind else 0.25)


@given(st.floats(0, 1), st.integers(2, 200))
def test_the_last_block_keeps_factor_one_for_every_gamma(gamma: float, count: int) -> None:
    names = [f"blocks.{i}.fc.weight" for i in range(count)]
    factors = list(lm.scales(names, gamma, 1 - gamma).values())
    assert factors[-1] == 1
    assert factors[0] == gamma
    assert all(a <= b for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_factors_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="alpha must be finite"):
        lm.scales(NAMES, value, 0.5)
    with pytest.raises(ValueError, match="beta must be finite"):
        lm.scales(NAMES, 0.5, value)
    with pytest.raises(ValueError, match="outside must be finite"):
        lm.scales(NAMES, 0.5, 0.5, outside=value)
    with pytest.raises(ValueError, match="outside"):
        lm.scales(NAMES, 0.5, 0.5, outside=lambda name: value)


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match="'linear' or 'reverse'"):
        lm.scales(NAMES, 0.1, 0.1, schedule="cosine")
    with pytest.raises(ValueError, match="outside must be 'alpha', 'depth'"):
        lm.scales(NAMES, 0.1, 0.1, outside="beta")
    with pytest.raises(TypeError, match="alpha must be a finite number"):
        lm.scales(NAMES, "0.1", 0.1)  # type: ignore[arg-type]
