"""Averages in a model that exists already: no module replaced, no key renamed, nothing copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from denseformer.adapters import hf, timm, torch_nn, x_transformers
from denseformer.core.dwa import DWA
from denseformer.models.link import DenseModel, Link, dense_class, original
from denseformer.models.stack import check_checkpoint

Model = TypeVar("Model", bound=nn.Module)


def find_blocks(
    model: nn.Module, blocks: str | Sequence[nn.Module] | None = None
) -> tuple[str | None, list[nn.Module]]:
    """Return the stack's dotted name and its blocks in order.

    Without ``blocks`` it is the longest ``ModuleList`` or ``Sequential`` of two or more modules of one
    class; lists inside the blocks of another candidate (experts, say) do not count.

    Raises:
        ValueError: none, several of equal length, or a name that is no stack; lists the candidates.
    """
    if isinstance(blocks, str):
        names = dict(model.named_modules())
        if blocks not in names or not isinstance(names[blocks], (nn.ModuleList, nn.Sequential)):
            raise ValueError(
                f"blocks={blocks!r} is no stack of this model; {_listing(_candidates(model))}"
            )
        return blocks, list(names[blocks].children())
    if blocks is not None:
        chain = list(blocks)
        inside = set(model.modules())
        bad = [n for n, b in enumerate(chain) if b not in inside]
        if bad or not chain:
            raise ValueError(
                f"blocks must be modules of the model, callable in order; entries {bad} are not"
            )
        return None, chain
    found = _candidates(model)
    longest = max((len(stack) for stack in found.values()), default=0)
    best = [name for name, stack in found.items() if len(stack) == longest]
    if len(best) != 1:
        problem = "no stack of equal blocks found" if not best else "several stacks of equal length"
        raise ValueError(f"{problem}; name one, blocks='...'. {_listing(found)}")
    return best[0], list(found[best[0]].children())


def _candidates(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        if any(name.startswith(outer + "." if outer else "") for outer in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and not kinds & {nn.ModuleList, nn.ModuleDict, type(None)}:
                found[name] = module
    return found


def _listing(found: dict[str, Any]) -> str:
    if not found:
        return "The model has no ModuleList or Sequential of equal modules"
    lines = (f"{name!r} ({len(s)} x {type(s[0]).__name__})" for name, s in found.items())
    return "Candidates: " + ", ".join(lines)


def link_of(model: nn.Module) -> Link:
    """Return the link of a densified model; raise ValueError for another."""
    link = model.__dict__.get("_dense")
    if link is None:
        raise ValueError(f"this {type(model).__name__} is not densified")
    assert isinstance(link, Link)
    return link


def densify(
    model: Model,
    dilation: int = 1,
    period: int = 1,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    checkpoint: bool | str = False,
    **dwa_kwargs: Any,
) -> Model:
    """Add depth-weighted averages to an existing model, in place; return it.

    Every block's class becomes a subclass of itself under the same name, whose call runs the block (hooks
    and checkpointing wrappers included) and then the average. The averages are ``model.dwa``; every other key
    of the state dict stays. The outputs are those of the model before, bit for bit, until α is trained. A copy
    of the model is densified too; a copy of a part of it (a block, a backbone) is the plain part.

    Switching averages on late, as when a trained model is continued, helps less than training with them
    from the start (paper: 18.61 without, 17.87 with, 18.23 when on after a quarter of the training).

    Args:
        model: Hugging Face, timm, torch.nn, x-transformers, or your own.
        dilation, period: see :class:`DWA`; further keyword arguments go there too.
        blocks: dotted name of the stack, or the block modules in the order of their calls (a module may
            appear several times); see :func:`find_blocks` for what is found without.
        checkpoint: ``True``: recompute each block and the mix before it in backward (a Hugging Face model's
            own checkpointing is switched on for that). ``"mix"``: recompute the mix only.

    Raises:
        ValueError: no stack, several of equal length, already densified, or an argument of DWA.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    >>> x = torch.randn(2, 3, 8)
    >>> before = encoder(x)
    >>> bool(torch.equal(densify(encoder, dilation=2)(x), before))
    True
    """
    check_checkpoint(checkpoint)
    if isinstance(getattr(model, "dwa", None), nn.Module) or hasattr(model, "_dense"):
        raise ValueError(f"this {type(model).__name__} is densified already; undensify it first")
    special = x_transformers.find(model) if blocks is None else None
    name, chain = (None, special.blocks) if special else find_blocks(model, blocks)
    if any(hasattr(b, "_dense") for b in chain):
        raise ValueError("these blocks are densified already; undensify their model first")
    root = isinstance(model, (nn.Sequential, nn.ModuleList))
    if root:
        raise ValueError(
            f"this {type(model).__name__} is itself the stack; use DenseStack(model, ...)"
        )
    if special and checkpoint is True:
        raise ValueError("checkpoint=True needs blocks that are modules; x-transformers has none")

    some = next(model.parameters(), None)
    dwa_kwargs.setdefault("device", some.device if some is not None else None)
    dwa = DWA(len(chain), dilation, period, **dwa_kwargs)
    link = Link(model, chain, checkpoint)
    link.name = name
    link.opener = special.opener if special else None
    link.attach()
    model.dwa = dwa
    model.__dict__["_dense"] = link
    model.__class__ = dense_class(DenseModel, type(model))
    for adapter in (torch_nn, timm, hf):
        adapter.prepare(model, link)
    return model


def undensify(model: Model) -> Model:
    """Undo :func:`densify` in place: original classes and keys; the weights of the averages are dropped.

    Raises:
        ValueError: the model is not densified, or something (``fully_shard``) changed its classes since.

    >>> model = nn.Transformer(8, 2, 2, 3, 16, batch_first=True)
    >>> keys = list(model.state_dict())
    >>> list(undensify(densify(model, blocks="encoder.layers")).state_dict()) == keys
    True
    """
    link = link_of(model)
    if any("_dense_original" not in vars(type(m)) for m in [model, *link.swapped]):
        raise ValueError(
            "the classes were changed after densify (fully_shard does): undensify comes first"
        )
    hf.restore(model, link)
    for module, attribute, value in link.undo:
        setattr(module, attribute, value)
    link.detach()
    model.__class__ = original(model)
    del model.__dict__["_dense"]
    del model.dwa
    return model


def skip_block(model: nn.Module, x: Tensor) -> Tensor:
    """Declare, in a densified model's forward pass, that its next block is left out this time (LayerDrop).

    The block then acts as the identity. Call it in the block's place: ``x = skip_block(self, x)``.

    Args:
        model: the model that was densified.
        x: what the block would have taken.

    Returns:
        The input of the block after.

    Raises:
        ValueError: the model is not densified.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = nn.ModuleList(nn.Tanh() for _ in range(3))
    ...
    ...     def forward(self, x):
    ...         for n, block in enumerate(self.blocks):
    ...             x = skip_block(self, x) if n == 1 else block(x)
    ...         return x
    >>> import torch
    >>> x = torch.ones(2)
    >>> bool(torch.equal(densify(Net())(x), x.tanh().tanh()))
    True
    """
    link = link_of(model)
    run = link.current() or link.open(x)
    y = run(x)
    link.set(None if run.depth == link.depth else run)
    assert isinstance(y, Tensor)
    return y


@dataclass(frozen=True)
class Report:
    """What :func:`densify` did to a model; prints as lines."""

    stack: str
    block: str
    geometry: str
    checkpoint: str
    changed: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"stack       {self.stack}",
            f"block       {self.block}",
            f"averages    {self.geometry}",
        ]
        lines += [f"checkpoint  {self.checkpoint}", *(f"changed     {c}" for c in self.changed)]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Describe what was changed in a densified model.

    Raises:
        ValueError: it is not densified.

    >>> model = nn.Transformer(8, 2, 4, 2, 16, batch_first=True)
    >>> print(report(densify(model, blocks="encoder.layers")))
    stack       encoder.layers
    block       4 x TransformerEncoderLayer
    averages    1x1, depth 4, 4 rows, 14 weights
    checkpoint  False
    changed     encoder.enable_nested_tensor = False
    changed     encoder.use_nested_tensor = False
    """
    link = link_of(model)
    names = {id(m): name for name, m in model.named_modules()}
    changed = (f"{names[id(m)]}.{a} = {getattr(m, a)}".lstrip(".") for m, a, _ in link.undo)
    geometry = cast(DWA, link.owner.dwa).spec
    stack = link.name if link.name is not None else "given as modules"
    block = f"{link.depth} x {type(link.blocks[0]).__name__}"
    return Report(stack, block, str(geometry), str(link.checkpoint), tuple(changed))
