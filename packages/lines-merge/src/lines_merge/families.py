"""Which integer in a parameter name counts depth: the known architectures and a structural fallback.

A *stack* is a container (the path before an integer) whose members are the blocks. A *staged* stack has
two levels, stage and block, and its blocks are counted through all stages in order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import AmbiguousDepthError, DepthError

# Components that wrappers (DDP, torch.compile, FSDP, activation checkpointing) insert anywhere.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# `layer3.0.` (ResNet) and `encoder_layer_7.` (torchvision ViT) hide the integer inside a component.
_RESNET_STAGE = re.compile(r"(?<![^.])layer([1-9])(?=\.\d+\.)")
_TORCHVISION_VIT = re.compile(r"(?<![^.])encoder_layer_(\d{1,9})(?=\.)")
_INTEGER = re.compile(r"(?<![^.])(\d{1,9})(?=\.)")  # more digits count no blocks

HINT = (
    "Name the blocks yourself, e.g. depth=DepthMap.from_patterns(['model.layers.{i}.']), "
    "or pass family= to DepthMap.from_names."
)

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "open_clip": ("visual.transformer.resblocks.{i}.", "transformer.resblocks.{i}."),
    "hf_clip": ("vision_model.encoder.layers.{i}.", "text_model.encoder.layers.{i}."),
    "timm_vit": ("blocks.{i}.",),
    "bert": ("encoder.layer.{i}.",),
    "torchvision_vit": ("encoder.layers.encoder_layer_{i}.",),
    "t5": ("encoder.block.{i}.", "decoder.block.{i}."),
    "bart": ("encoder.layers.{i}.", "decoder.layers.{i}."),
    "llama": ("layers.{i}.",),
    "gpt2": ("h.{i}.",),
    "gpt_neox": ("gpt_neox.layers.{i}.",),
    "mamba": ("backbone.layers.{i}.",),
    "convnext": ("stages.{s}.blocks.{i}.", "stages.{s}.layers.{i}.", "features.{s}.{i}."),
    "resnet": ("layer{s}.{i}.", "encoder.stages.{s}.layers.{i}."),
    "swin": ("layers.{s}.blocks.{i}.", "features.{s}.{i}."),
    "mixer": ("blocks.{i}.",),
}
# The last component of a container that is known to hold blocks, one level or two.
_FLAT = {"resblocks", "blocks", "layers", "layer", "block", "h", "encoder_layer_"}
_NESTED_IN_STAGE = {"blocks", "layers", ""}


@dataclass
class Stack:
    """One tower: the container's path and, for each parameter name, its (stage, block) position."""

    path: str
    positions: dict[str, tuple[int, int]]
    samplers: dict[str, int] = field(default_factory=dict)  # name -> stage that it feeds
    staged: bool = False
    known: bool = True
    modules: bool = True  # whether the blocks have sub-modules, or weight and bias only
    doubtful: bool = False  # holds lists of different lengths: stages, or parallel branches?

    @property
    def template(self) -> str:
        """The pattern that would select this stack."""
        return f"{self.path}." * bool(self.path) + ("{s}...{i}." if self.staged else "{i}.")


def strip_wrappers(name: str) -> str:
    """Remove what DDP, FSDP, torch.compile, checkpointing and PEFT put into a parameter name.

    >>> strip_wrappers("_orig_mod.module.blocks.0._fsdp_wrapped_module.norm.weight")
    'blocks.0.norm.weight'
    """
    if "mod" in name:  # all wrappers have it, and most names have no wrapper
        name = _WRAPPERS.sub("", name)
    return name.removeprefix("base_model.model.")


@dataclass
class Container:
    """Names grouped by the path before an integer."""

    path: str
    entries: dict[int, dict[str, str]]  # index -> {name: rest of the path below the index}

    @property
    def last(self) -> str:
        """The last component of the path."""
        return self.path.rpartition(".")[2]


def _virtual(name: str) -> str:
    """Write hidden integers as components of their own."""
    name = strip_wrappers(name)
    if "encoder_layer_" in name:
        return _TORCHVISION_VIT.sub(r"encoder_layer_.\1", name)
    if "layer" in name and "layers." not in name:
        return _RESNET_STAGE.sub(r"layer#.\1", name)
    return name


def _containers(paths: Mapping[str, str], skip: int = 0) -> list[Container]:
    """Group names by the path before their integer number `skip` (0 is the outermost)."""
    found: dict[str, Container] = {}
    for name, path in paths.items():
        match = _INTEGER.search(path)
        for _ in range(skip):
            match = match and _INTEGER.search(path, match.end())
        if match is None:
            continue
        start, end = match.span()
        prefix = path[: start - 1] if start else ""
        container = found.get(prefix)
        if container is None:
            container = found[prefix] = Container(prefix, {})
        container.entries.setdefault(int(match[1]), {})[name] = path[end + 1 :]
    return list(found.values())


def _nested(rest: str) -> tuple[str, int] | None:
    """Split `blocks.7.norm.weight` into ("blocks", 7); None without an integer near the front."""
    head, _, tail = rest.partition(".")
    if _INTEGER.match(f"{head}."):
        return ("", int(head)) if tail else None
    index = tail.partition(".")[0]
    return (head, int(index)) if _INTEGER.match(f"{index}.") and "." in tail else None


def _has_modules(container: Container) -> bool:
    """Blocks have sub-modules; the linear layers of a small Sequential have weight and bias only."""
    return any("." in rest for rests in container.entries.values() for rest in rests.values())


def stage_of_samplers(container: Container, samplers: Mapping[str, int]) -> dict[str, int]:
    """Map each down-sampling tensor to the stage that it feeds.

    A stage that opens with its down-sampling has none in the first stage (timm); one that closes with it
    has none in the last (Hugging Face Swin), so that it feeds the next stage.
    """
    stages = sorted(container.entries)
    present = set(samplers.values())
    closes = bool(present) and stages[0] in present and stages[-1] not in present
    return {name: stage + closes for name, stage in samplers.items()}


def _as_staged(container: Container) -> Stack | None:
    """Read the container as a list of stages if every entry holds one list of blocks."""
    if container.last == "features":
        return _as_features(container)
    if container.last not in _FLAT | {"stages", "layer#"}:
        return None
    # MoE experts and T5's inner `layer.{j}` are lists, too: below a flat container few are blocks
    inner = _NESTED_IN_STAGE
    if container.last not in {"stages", "layer#"}:
        inner = {"blocks"} if container.last == "layers" else {""}
        if len(container.entries) > 8:
            return None
    positions: dict[str, tuple[int, int]] = {}
    samplers: dict[str, int] = {}
    for stage, rests in container.entries.items():
        blocks = 0
        for name, rest in rests.items():
            nested = _nested(rest)
            if nested is not None and nested[0] in inner:
                positions[name] = (stage, nested[1])
                blocks += 1
            else:
                samplers[name] = stage
        if not blocks:
            return None
    path = container.path.replace("layer#", "layer")
    return Stack(path, positions, stage_of_samplers(container, samplers), staged=True)


def _as_features(container: Container) -> Stack | None:
    """Torchvision's ConvNeXt and Swin: `features.{odd}.{i}` are blocks, even entries down-sample."""
    positions: dict[str, tuple[int, int]] = {}
    samplers: dict[str, int] = {}
    last = max(container.entries)
    for stage, rests in container.entries.items():
        for name, rest in rests.items():
            nested = _nested(rest)
            inside = nested is not None and rest.count(".") >= 2 - rest.endswith("layer_scale")
            if stage % 2 and inside and nested is not None:
                positions[name] = (stage, nested[1])
            elif stage % 2 or inside:
                return None  # EfficientNet and others: blocks in even entries, too
            elif stage and stage < last:
                samplers[name] = stage + 1
    return Stack(container.path, positions, samplers, staged=True) if positions else None


def _as_flat(container: Container, *, known: bool) -> Stack:
    positions = {name: (0, index) for index, rests in container.entries.items() for name in rests}
    path = container.path
    if container.last == "encoder_layer_":
        path = path.removesuffix(".encoder_layer_") + ".encoder_layer_"
    return Stack(path, positions, known=known, modules=_has_modules(container))


def _alike(container: Container) -> bool:
    """Whether most entries have the same parameters below them, lists inside counted once."""
    shapes = Counter(
        frozenset(_INTEGER.sub("#", rest) for rest in rests.values())
        for rests in container.entries.values()
    )
    return shapes.most_common(1)[0][1] * 2 > len(container.entries)


def _contiguous(indices: Iterable[int]) -> bool:
    present = set(indices)
    return present == set(range(len(present)))


def _generic_stage_list(container: Container) -> Stack | None:
    """An unknown container of a few unequal entries, each dominated by one list, is a stage list."""
    if len(container.entries) > 8 or not _contiguous(container.entries):
        return None
    positions: dict[str, tuple[int, int]] = {}
    samplers: dict[str, int] = {}
    lists: set[str] = set()
    lengths: set[int] = set()
    for stage, rests in container.entries.items():
        nested = {name: _nested(rest) for name, rest in rests.items()}
        heads = Counter(pair[0] for pair in nested.values() if pair)
        if not heads:
            return None
        head, count = heads.most_common(1)[0]
        if count * 2 <= len(rests):
            return None
        lists.add(head)
        blocks = {pair[1] for pair in nested.values() if pair and pair[0] == head}
        lengths.add(len(blocks))
        for name, pair in nested.items():
            if pair and pair[0] == head:
                positions[name] = (stage, pair[1])
            else:
                samplers[name] = stage
    if len(lists) != 1 or len(lengths) == 1:
        return None
    return Stack(
        container.path,
        positions,
        stage_of_samplers(container, samplers),
        staged=True,
        known=False,
    )


def _share(stack: Stack, sizes: Mapping[str, int] | None) -> int:
    return sum(sizes[name] if sizes else 1 for name in stack.positions)


def _explain(stacks: Sequence[Stack], sizes: Mapping[str, int] | None) -> str:
    rows = [
        f"  {stack.template}  ({len(stack.positions)} tensors"
        + (f", {_share(stack, sizes):,} parameters)" if sizes else ")")
        for stack in stacks
    ]
    return "\n".join(rows) if rows else "  (no integer component in any name)"


def detect(names: Iterable[str], sizes: Mapping[str, int] | None = None) -> list[Stack]:
    """Find the towers of a model among its parameter names.

    Args:
        names: parameter names.
        sizes: number of elements of each, if known; decides between unknown containers.

    Returns:
        The stacks, in order of first appearance.

    Raises:
        DepthError: nothing looks like a stack of blocks.
        AmbiguousDepthError: several readings are equally good.
    """
    known, other, rejected = classify(names, use_known=True)
    if known:
        _refuse_rivals(known, other, sizes)
        return known
    return fallback(other, rejected, sizes)


def classify(
    names: Iterable[str], *, use_known: bool
) -> tuple[list[Stack], list[Stack], list[Stack]]:
    """Sort the outermost containers into known stacks, possible stacks and mere lists.

    A list whose entries differ (an `nn.Sequential` around the model) is looked into, level by level.
    """
    paths = {name: _virtual(name) for name in names}
    known: list[Stack] = []
    other: list[Stack] = []
    rejected: list[Stack] = []
    for level in range(4):
        descend: dict[str, str] = {}
        for container in _containers(paths, level):
            staged = _as_staged(container) if use_known else None
            flat = use_known and container.last in _FLAT and _has_modules(container)
            listed = _generic_stage_list(container)
            if staged is not None:
                known.append(staged)
            elif flat and _single_level(container):
                known.append(_as_flat(container, known=True))
            elif listed is not None:
                other.append(listed)
            elif not _single_level(container):
                other.append(_as_flat(container, known=False))
                other[-1].doubtful = True
            elif len(container.entries) >= 2 and _alike(container):
                other.append(_as_flat(container, known=False))
            else:
                rejected.append(_as_flat(container, known=False))
                for rests in container.entries.values():
                    descend.update({name: paths[name] for name in rests})
        paths = descend
    return known, other, rejected


def _single_level(container: Container) -> bool:
    """Whether the entries are blocks rather than lists of different lengths: stages in disguise."""
    if not 2 <= len(container.entries) <= 12:
        return True
    lengths: dict[str, dict[int, set[int]]] = {}
    for index, rests in container.entries.items():
        for rest in rests.values():
            nested = _nested(rest)
            if nested is not None and (nested[0] in _FLAT or not nested[0]):
                lengths.setdefault(nested[0], {}).setdefault(index, set()).add(nested[1])
    for table in lengths.values():
        if len({len(table.get(index, ())) for index in container.entries}) > 1:
            return False
    return True


def _refuse_rivals(
    known: Sequence[Stack], other: Sequence[Stack], sizes: Mapping[str, int] | None
) -> None:
    """Raise if an unknown container of real blocks is comparable to what was recognised."""
    total = sum(_share(stack, sizes) for stack in known)
    rivals = [
        stack
        for stack in other
        if (10 if stack.doubtful else 2) * _share(stack, sizes) >= total and stack.modules
    ]
    if rivals:
        raise AmbiguousDepthError(
            "besides the blocks that were recognised, other containers hold as many parameters; "
            f"candidates:\n{_explain([*known, *rivals], sizes)}\n{HINT}"
        )


def fallback(
    other: Sequence[Stack], rejected: Sequence[Stack], sizes: Mapping[str, int] | None
) -> list[Stack]:
    """Choose the container with the largest share; equal ones elsewhere in the model are towers."""
    if not other:
        raise DepthError(
            "no stack of blocks found in the parameter names; candidates:\n"
            f"{_explain(rejected, sizes)}\n{HINT}"
        )
    ranked = sorted(other, key=lambda stack: -_share(stack, sizes))
    parent, _, last = ranked[0].path.rpartition(".")
    towers, rivals = [], []
    # numbered lists of blocks (`serial_blocks1` to `serial_blocks4`) are one stack in parts, which may
    # be what the model is about though it is smaller: a quarter of the largest makes it a rival
    parts: dict[str, list[int]] = {}
    for stack in ranked:
        parts.setdefault(stack.path.rstrip("0123456789"), []).append(_share(stack, sizes))
    for stack in ranked:
        shares = parts[stack.path.rstrip("0123456789")]
        rival_at = 4 if len(shares) > 1 and stack.modules else 2
        stack_parent, _, stack_last = stack.path.rpartition(".")
        if stack is ranked[0] or (stack_last == last and stack_parent != parent):
            towers.append(stack)
        elif (
            rival_at * sum(shares) >= _share(ranked[0], sizes)
            or stack.doubtful
            or _numbered_siblings(stack.path, ranked[0].path)
        ):
            rivals.append(stack)
    if rivals or any(stack.doubtful for stack in towers):
        raise AmbiguousDepthError(
            "several containers could be the stack of blocks; candidates:\n"
            f"{_explain([*towers, *rivals], sizes)}\n{HINT}"
        )
    return [stack for stack in other if stack in towers]


def _numbered_siblings(one: str, two: str) -> bool:
    """Whether two paths differ in a trailing number only: `stage1` and `stage2` are one stack in parts."""
    return one != two and one.rstrip("0123456789") == two.rstrip("0123456789")
