"""Which block a parameter belongs to, and how deep that block lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .errors import DepthError
from .families import Stack, strip_wrappers
from .patterns import family_stacks, match_patterns

_IMAGE = ("visual", "vision", "image", "vit.")
_TEXT = ("text", "language")
_ORDER = {"image": 0, "encoder": 0}


class Block(NamedTuple):
    """Position of a block: tower, 0-based index from the input, number of blocks in the tower."""

    tower: str
    index: int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]


class DepthMap:
    """Immutable mapping of parameter names to `Block`, or to None outside the blocks.

    Towers (image and text, encoder and decoder) have their own count and their own indices
    0..count-1. Stages (ConvNeXt, ResNet, Swin) are counted through: the first block of stage 2 follows the
    last one of stage 1, and the down-sampling between them goes with the first block of the stage it feeds.

    Example:
        >>> names = [f"model.layers.{i}.mlp.weight" for i in range(12)] + ["lm_head.weight"]
        >>> depth = DepthMap.from_names(names)
        >>> depth["model.layers.10.mlp.weight"]
        Block(tower='model.layers', index=10, count=12)
        >>> depth["lm_head.weight"] is None
        True
    """

    __slots__ = ("_allow_gaps", "_blocks", "_patterns")

    def __init__(
        self,
        blocks: Mapping[str, Block | None],
        *,
        _patterns: tuple[str, ...] = (),
        _allow_gaps: bool = False,
    ) -> None:
        self._blocks = dict(blocks)
        self._patterns = _patterns
        self._allow_gaps = _allow_gaps

    @classmethod
    def from_names(
        cls,
        names: Iterable[str],
        family: str = "auto",
        *,
        allow_gaps: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> DepthMap:
        """Read the depth off parameter names.

        Args:
            names: parameter names, e.g. the keys of a state dict. Prefixes of DDP, FSDP, torch.compile
                and PEFT are ignored.
            family: "auto", "generic" (no table of known containers) or a key of `families.FAMILIES`.
            allow_gaps: rank the blocks that are present instead of refusing missing indices.
            sizes: elements of each tensor; helps "auto" and "generic" to weigh unknown containers.

        Raises:
            DepthError: no block found, or gaps in the indices.
            AmbiguousDepthError: several readings are equally good; the text lists them.
            ValueError: unknown family.
        """
        names = list(names)
        stacks = family_stacks(names, family, sizes)
        return cls(_blocks(names, stacks, allow_gaps), _allow_gaps=allow_gaps)

    @classmethod
    def from_model(
        cls, module: nn.Module, family: str = "auto", *, allow_gaps: bool = False
    ) -> DepthMap:
        """Read the depth off a module's state dict, weighing containers by their parameters."""
        state = module.state_dict()
        sizes = {name: value.numel() for name, value in state.items()}
        return cls.from_names(state, family, allow_gaps=allow_gaps, sizes=sizes)

    @classmethod
    def from_patterns(
        cls,
        patterns: str | Sequence[str],
        names: Iterable[str] | None = None,
        *,
        allow_gaps: bool = False,
    ) -> DepthMap:
        """Say where the blocks are.

        Args:
            patterns: templates such as "model.layers.{i}." or, for stages, "stages.{s}.blocks.{i}.".
                Each (template, prefix) is a tower.
            names: parameter names; without them the map is resolved by the function that it is given to.
            allow_gaps: see `from_names`.

        Raises:
            DepthError: a template without `{i}`; with `names`, nothing matches.
        """
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        match_patterns([], patterns)
        unresolved = cls({}, _patterns=patterns, _allow_gaps=allow_gaps)
        return unresolved if names is None else unresolved.resolve(names)

    def resolve(self, names: Iterable[str]) -> DepthMap:
        """Return the map for these names; one that was built from names checks that it knows them.

        Raises:
            DepthError: a name that the map does not hold, or no name matches the patterns.
        """
        names = list(names)
        if self._patterns:
            stacks = match_patterns(names, self._patterns)
            if not stacks:
                raise DepthError(
                    f"no name matches {', '.join(self._patterns)}; names look like {names[:3]}"
                )
            return DepthMap(_blocks(names, stacks, self._allow_gaps))
        missing = [name for name in names if name not in self._blocks]
        if (
            missing
        ):  # perhaps one side has the prefixes of DDP or torch.compile and the other has not
            plain = {strip_wrappers(name): block for name, block in self._blocks.items()}
            missing = [name for name in names if strip_wrappers(name) not in plain]
            if missing:
                raise DepthError(f"the depth map was built without {missing[:10]}")
            return DepthMap({name: plain[strip_wrappers(name)] for name in names})
        return self

    def __getitem__(self, name: str) -> Block | None:
        """Return the block of a parameter, None outside the blocks; KeyError for an unknown name."""
        if self._patterns:
            raise DepthError("a map built from patterns needs names: call resolve(names) first")
        return self._blocks[name]

    def __contains__(self, name: object) -> bool:
        """Whether the map holds this name."""
        return name in self._blocks

    def __iter__(self) -> Iterator[str]:
        """Iterate over the parameter names."""
        return iter(self._blocks)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._blocks)

    def __eq__(self, other: object) -> bool:
        """Whether both give every name the same block."""
        if not isinstance(other, DepthMap):
            return NotImplemented
        return self._blocks == other._blocks and self._patterns == other._patterns

    def __hash__(self) -> int:
        """Hash the names and their blocks."""
        return hash((frozenset(self._blocks.items()), self._patterns))

    def __repr__(self) -> str:
        """Show the towers."""
        inside = ", ".join(f"{tower}: {count}" for tower, count in self.towers.items())
        return f"DepthMap({inside or ', '.join(self._patterns)})"

    @property
    def towers(self) -> dict[str, int]:
        """Number of blocks of each tower."""
        return {block.tower: block.count for block in self._blocks.values() if block}

    def with_towers(self, towers: str) -> DepthMap:
        """Return the map with towers kept apart, put one after the other, or of a shared count.

        Args:
            towers: "separate"; "sequential" (encoder, then decoder; image, then text: one stack);
                "shared" (every index counts against the deepest tower).

        Raises:
            ValueError: any other word.
        """
        if towers == "separate":
            return self
        counts = self.towers
        if towers == "shared":
            longest = max(counts.values(), default=0)
            return self._map(lambda block: block._replace(count=longest))
        if towers == "sequential":
            total, offsets = 0, {}
            for tower in sorted(counts, key=lambda tower: _ORDER.get(tower, 1)):
                offsets[tower] = total
                total += counts[tower]
            return self._map(
                lambda block: Block("sequential", block.index + offsets[block.tower], total)
            )
        raise ValueError(f"towers must be 'separate', 'sequential' or 'shared', got {towers!r}")

    def _map(self, function: Any) -> DepthMap:
        return DepthMap({n: function(b) if b else None for n, b in self._blocks.items()})

    def describe(self, alpha: float, beta: float, **keywords: Any) -> str:
        """Return the table (tensor, tower, index, count, factor).

        Args:
            alpha: factor of the first block and of everything outside the blocks.
            beta: what the last block has on top of it.
            **keywords: `schedule`, `outside`, `towers`; see `scales`.
        """
        from .schedule import factors

        values = factors(self, alpha, beta, **keywords)
        width = max([6, *map(len, self._blocks)])
        tower_width = max([5, *map(len, self.towers)])
        lines = [f"{'tensor':{width}}  {'tower':{tower_width}}  {'i':>4}  {'L':>4}  factor"]
        for name, block in self._blocks.items():
            tower, index, count = block or ("-", "-", "-")
            lines.append(
                f"{name:{width}}  {tower:{tower_width}}  {index:>4}  {count:>4}  {values[name]:.6g}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the map as JSON."""
        if self._patterns:
            return json.dumps({"patterns": self._patterns, "allow_gaps": self._allow_gaps})
        return json.dumps({"blocks": self._blocks})

    @classmethod
    def from_json(cls, text: str) -> DepthMap:
        """Read what `to_json` wrote.

        Raises:
            DepthError: the text is no depth map.
        """
        try:
            data = json.loads(text)
            if "patterns" in data:
                return cls.from_patterns(data["patterns"], allow_gaps=data["allow_gaps"])
            blocks = {
                name: None if block is None else Block(str(block[0]), int(block[1]), int(block[2]))
                for name, block in data["blocks"].items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DepthError(f"not a depth map: {error}") from error
        return cls(blocks)


def _blocks(
    names: Iterable[str], stacks: Sequence[Stack], allow_gaps: bool
) -> dict[str, Block | None]:
    """Count the blocks of every stack and give each name its own."""
    blocks: dict[str, Block | None] = dict.fromkeys(names)
    for stack, label in zip(stacks, _labels(stacks), strict=True):
        present = sorted(set(stack.positions.values()))
        if not allow_gaps:
            _refuse_gaps(stack, present)
        block = {pos: Block(label, i, len(present)) for i, pos in enumerate(present)}
        for name, position in stack.positions.items():
            blocks[name] = block[position]
        firsts = {stage: first for (stage, _), first in reversed(block.items())}
        for name, stage in stack.samplers.items():
            blocks[name] = firsts.get(stage)
    return blocks


def _refuse_gaps(stack: Stack, present: Sequence[tuple[int, int]]) -> None:
    stages: dict[int, list[int]] = {}
    for stage, index in present:
        stages.setdefault(stage, []).append(index)
    step = 2 if stack.staged and stack.path.rpartition(".")[2] == "features" else 1
    first = min(stages)
    starts_well = first <= 1
    if list(stages) != list(range(first, first + step * len(stages), step)) or not starts_well:
        raise DepthError(
            f"gaps in the stages of {stack.template}: found {list(stages)}; "
            "pass allow_gaps=True to rank those present"
        )
    for stage, indices in stages.items():
        if indices != list(range(len(indices))):
            missing = sorted(set(range(max(indices) + 1)) - set(indices))
            where = f"stage {stage} of {stack.template}" if stack.staged else stack.template
            raise DepthError(
                f"gaps in the block indices of {where}: missing {missing[:10]}; "
                "pass allow_gaps=True to rank those present"
            )


def _labels(stacks: Sequence[Stack]) -> list[str]:
    """Call towers image, text, encoder, decoder where the path says so; else by their path."""
    paths = [stack.path or "blocks" for stack in stacks]
    if len(stacks) == 1:
        return paths
    labels = []
    for path in paths:
        lower = path.lower()
        if any(word in lower for word in _IMAGE):
            labels.append("image")
        elif any(word in lower for word in _TEXT):
            labels.append("text")
        else:
            parts = [part for part in ("encoder", "decoder") if part in lower.split(".")]
            labels.append(parts[-1] if parts else path)
    if labels.count("image") == 1 and "text" not in labels:  # open_clip's text tower has no prefix
        labels = [
            "text" if path == "transformer.resblocks" else label
            for path, label in zip(paths, labels, strict=True)
        ]
    return [
        label if labels.count(label) == 1 else path
        for label, path in zip(labels, paths, strict=True)
    ]
