"""Where the blocks are, said by a template such as `model.layers.{i}.` or by the name of a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .errors import DepthError
from .families import (
    FAMILIES,
    HINT,
    Container,
    Stack,
    classify,
    detect,
    fallback,
    stage_of_samplers,
    strip_wrappers,
)


def compile_pattern(pattern: str) -> tuple[re.Pattern[str], bool]:
    """Turn `model.layers.{i}.` (or `stages.{s}.blocks.{i}.`) into a regular expression.

    The pattern may follow any prefix that ends in a dot. Returns the expression and whether it has
    a stage.

    Raises:
        DepthError: the pattern has no `{i}`.
    """
    if pattern.count("{i}") != 1 or pattern.count("{s}") > 1:
        raise DepthError(
            f"a pattern needs {{i}} once and {{s}} at most once, e.g. 'model.layers.{{i}}.'; "
            f"got {pattern!r}"
        )
    body = re.escape(pattern.rstrip("."))
    body = body.replace(re.escape("{i}"), r"(?P<i>\d{1,9})").replace(
        re.escape("{s}"), r"(?P<s>\d{1,9})"
    )
    return re.compile(rf"^(?P<lead>(?:[^.]+\.)*?){body}(?=\.|$)"), "{s}" in pattern


def match_patterns(names: Iterable[str], patterns: Iterable[str]) -> list[Stack]:
    """Find the stacks that given patterns select, one for each (pattern, prefix)."""
    names = list(names)
    compiled = [(pattern, *compile_pattern(pattern)) for pattern in patterns]
    stacks: dict[tuple[str, str], Stack] = {}
    for name in names:
        path = strip_wrappers(name)
        for pattern, expression, staged in compiled:
            match = expression.match(path)
            if match is None or any(part.isdigit() for part in match["lead"].split(".")):
                continue
            stem = pattern.split(".{s}")[0].split(".{i}")[0].split("{")[0].rstrip(".")
            key = (pattern, match["lead"])
            stack = stacks.setdefault(key, Stack(match["lead"] + stem, {}, staged=staged))
            stage = int(match["s"]) if staged else 0
            stack.positions[name] = (stage, int(match["i"]))
            break
    for (pattern, lead), stack in stacks.items():
        if stack.staged:
            _add_samplers(stack, pattern, lead, names)
    return list(stacks.values())


def _add_samplers(stack: Stack, pattern: str, lead: str, names: Iterable[str]) -> None:
    """Give what lies in a stage beside its blocks (down-sampling) to the stage that it feeds."""
    body = re.escape(lead + pattern.partition("{s}")[0]) + r"(\d{1,9})\."
    stages: dict[int, dict[str, str]] = {stage: {} for stage, _ in stack.positions.values()}
    samplers: dict[str, int] = {}
    for name in names:
        match = None if name in stack.positions else re.match(body, strip_wrappers(name))
        if match is not None and int(match[1]) in stages:
            samplers[name] = int(match[1])
    stack.samplers = stage_of_samplers(Container(stack.path, stages), samplers)


def family_stacks(
    names: Sequence[str], family: str, sizes: Mapping[str, int] | None = None
) -> list[Stack]:
    """Return the stacks of one named family of `FAMILIES`, or of "generic" or "auto".

    Raises:
        ValueError: unknown family.
        DepthError: no name matches it.
    """
    if family == "auto":
        return detect(names, sizes)
    if family == "generic":
        _, other, rejected = classify(names, use_known=False)
        return fallback(other, rejected, sizes)
    if family not in FAMILIES:
        allowed = ", ".join(["auto", "generic", *FAMILIES])
        raise ValueError(f"unknown family {family!r}; allowed: {allowed}")
    templates = FAMILIES[family]
    if any("{s}" in template for template in templates):
        stacks = [stack for stack in detect(names, sizes) if stack.staged]
    else:
        stacks = match_patterns(names, templates)
    if not stacks:
        raise DepthError(f"no name matches family {family!r} ({', '.join(templates)}); {HINT}")
    return stacks
