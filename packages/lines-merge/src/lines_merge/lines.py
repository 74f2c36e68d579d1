"""LiNeS: edit one fine-tuned model, or merge several, with factors that grow with depth (Eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .cells import Cell, Entry, Sums, Worker, magnitude_sum
from .depth import DepthMap
from .engine import Engine, one_thread_each
from .families import strip_wrappers
from .merges import Merge, TaskArithmetic, make_merge
from .scaling import Scaling, norm_ratio, prepare, zero_vector
from .schedule import Outside, from_gamma
from .sources import (
    MemorySource,
    RenamedSource,
    Source,
    StateDict,
    TensorSource,
    label_models,
    local_part,
    open_source,
    parse_dtype,
)


class MemorySink:
    """Collects the result as a state dict."""

    def __init__(self, engine: Engine, out: Mapping[str, Tensor] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        for name, entry in engine.entries.items():
            dtype = engine.output_dtype(entry)
            if out is None:
                self.tensors[name] = torch.empty(entry.info.shape, dtype=dtype)
            else:
                self.tensors[name] = _checked_out(name, out, entry, dtype)

    def buffer(self, entry: Entry, start: int, stop: int, worker: Worker) -> Tensor:
        """Return a view of the result."""
        return self.tensors[entry.name].view(-1)[start:stop]

    def flush(self, entry: Entry, start: int, stop: int, values: Tensor) -> None:
        """Nothing to do: the buffer was the result."""


def _checked_out(name: str, out: Mapping[str, Tensor], entry: Entry, dtype: torch.dtype) -> Tensor:
    tensor = out.get(name)
    if tensor is None or tensor.shape != entry.info.shape or tensor.dtype != dtype:
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        raise ValueError(f"out[{name!r}] must be {entry.info.shape}, {dtype}; got {found}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"out[{name!r}] must be contiguous and on the CPU")
    return tensor.detach()


def run_in_memory(
    base: TensorSource,
    models: Mapping[str, TensorSource],
    method: Merge,
    scaling: Scaling,
    *,
    out: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    **engine_arguments: Any,
) -> dict[str, Tensor]:
    """Merge into a state dict with the order, the ties and the integer tensors of the base."""
    engine = Engine(base, models, **engine_arguments)
    with one_thread_each():
        plan = prepare(engine, method, scaling)
        sink = MemorySink(engine, out)
        if out is not None:
            engine.check_all()
        plan.write([sink], [scaling.factors(engine.sizes(), plan.alpha)])
    tensors = sink.tensors
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    elif isinstance(base, MemorySource) and out is None:
        tensors = {name: tensor.to(base.device_of(name)) for name, tensor in tensors.items()}
    return {name: tensors[engine.aliases.get(name, name)] for name in base.tensors}


def edit(
    base: Source,
    finetuned: Source,
    gamma: float | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    depth: DepthMap | str = "auto",
    schedule: str = "linear",
    outside: Outside = "alpha",
    towers: str = "separate",
    dtype: torch.dtype | str | None = None,
    buffers: str = "scale",
    strict: bool = True,
    vocab: str | None = None,
    allow_nonfinite: bool = False,
    allow_gaps: bool = False,
    out: StateDict | None = None,
) -> dict[str, Tensor]:
    r"""Scale the update of a fine-tuned model by depth (LiNeS, Eq. 1).

    Returns :math:`\theta_0 + \lambda^{(l)} (\theta - \theta_0)` with
    :math:`\lambda^{(l)} = \alpha + \beta (l-1)/(L-1)` in block l of L, and :math:`\alpha` outside the blocks. The paper
    restores general ability with :math:`\alpha = \gamma, \beta = 1 - \gamma`: the last block stays as it is, the
    first goes back towards the base. Arithmetic is in float32 (float64 if an input is), rounded once.

    Args:
        base: the pre-trained weights: state dict, module or path.
        finetuned: the fine-tuned weights.
        gamma: in [0, 1]; 1 returns the fine-tuned weights, bit for bit.
        alpha: instead of gamma, the factor of the first block.
        beta: instead of gamma, the increase to the last block. Negative factors are allowed.
        depth: a `DepthMap`, "auto", or the name of a family.
        schedule: "linear", or "reverse", the paper's control experiment.
        outside: see `scales`.
        towers: see `scales`.
        dtype: of the result; default: each tensor's dtype in the base.
        buffers: batch-norm statistics, "scale", "base" or "finetuned". After an edit, consider
            re-estimating them with `torch.optim.swa_utils.update_bn`.
        strict: whether missing and extra tensors are errors.
        vocab: "base" accepts embeddings with another number of rows and keeps the base's.
        allow_nonfinite: let NaN and infinity pass.
        allow_gaps: accept missing block indices.
        out: tensors to write into (may be those of `finetuned`). Values are checked first, in a pass of
            its own, so that an error leaves them as they were.

    Raises:
        TypeError: gamma together with alpha or beta; neither; unsupported dtypes.
        ValueError: gamma outside [0, 1]; a factor that is not finite; shapes, depth or values (see
            `errors`).
        KeyError: different tensors.

    Example:
        >>> base = {f"blocks.{i}.fc.weight": torch.zeros(1) for i in range(3)}
        >>> tuned = {name: torch.ones(1) for name in base}
        >>> [value.item() for value in edit(base, tuned, gamma=0.0).values()]
        [0.0, 0.5, 1.0]
    """
    alpha, beta = from_gamma(gamma, alpha, beta)
    scaling = Scaling(
        alpha=alpha,
        beta=beta,
        depth=depth,
        schedule=schedule,
        outside=outside,
        towers=towers,
        buffers=buffers,
        allow_gaps=allow_gaps,
    )
    return run_in_memory(
        open_source(base, "base"),
        {"0": open_source(finetuned, "fine-tuned model")},
        TaskArithmetic(),
        scaling,
        out=out,
        strict=strict,
        vocab=vocab,
        dtype=parse_dtype(dtype),
        allow_nonfinite=allow_nonfinite,
    )


def edit_(
    model: nn.Module, base: Source, gamma: float | None = None, **arguments: Any
) -> nn.Module:
    """Edit a fine-tuned module in place, without a second copy of it; see `edit`.

    All values are checked in a pass before the first one is written: an error leaves the module whole.

    Args:
        model: the fine-tuned module; wrappers (DDP, torch.compile) may stay on.
        base: the pre-trained weights, named as in the module with or without the wrappers' prefixes.
        gamma: see `edit`.
        **arguments: see `edit` (not `out`, `dtype` or `strict`).

    Returns:
        The module.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})
        >>> base = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        >>> depth = DepthMap.from_patterns("blocks.{i}.")
        >>> bool(edit_(model, base, 0.0, depth=depth)["blocks"][0].weight == 0)
        True
    """
    for name in ("out", "dtype", "strict"):
        if name in arguments:
            raise TypeError(f"edit_ takes no {name!r}: it writes into the module's own parameters")
    state = {strip_wrappers(name): value for name, value in model.state_dict().items()}
    live = MemorySource(state, type(model).__name__, shards=True)
    if isinstance(base, Mapping):
        reader: TensorSource = MemorySource(base, "base", shards=True)
    else:
        reader = open_source(base, "base")
    names = {strip_wrappers(name): name for name in reader.tensors}
    # a tied parameter is edited once, under one of its names
    aliases = {a: b for a, b in live.aliases.items() if a in names and b in names}
    renamed = RenamedSource(reader, names, aliases)
    alpha, beta = from_gamma(gamma, arguments.pop("alpha", None), arguments.pop("beta", None))
    rest = {key: arguments.pop(key) for key in ("vocab", "allow_nonfinite") if key in arguments}
    scaling = Scaling(alpha=alpha, beta=beta, **arguments)
    engine = Engine(renamed, {"0": live}, threads=1, **rest)
    plan = prepare(engine, TaskArithmetic(), scaling)
    table = scaling.factors(engine.sizes(), plan.alpha)
    engine.check_all()
    with torch.no_grad():
        plan.write([_InPlaceSink(state)], [table])
    return model


class _InPlaceSink:
    """Writes into live parameters, through a copy of one tensor where they have no flat view."""

    def __init__(self, state: StateDict) -> None:
        self._tensors = {name: local_part(value.detach()) for name, value in state.items()}
        self._copy = ("", torch.empty(0))

    def buffer(self, entry: Entry, start: int, stop: int, worker: Worker) -> Tensor:
        """Return the elements start..stop of the parameter, or of its copy."""
        tensor = self._tensors[entry.name]
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        if self._copy[0] != entry.name:
            self._copy = (entry.name, torch.empty(tensor.numel(), dtype=tensor.dtype))
        return self._copy[1][start:stop]

    def flush(self, entry: Entry, start: int, stop: int, values: Tensor) -> None:
        """Copy a finished tensor back."""
        tensor = self._tensors[entry.name]
        if self._copy[0] == entry.name and stop == tensor.numel():
            tensor.copy_(self._copy[1].view(tensor.shape))
            self._copy = ("", torch.empty(0))


def merge(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    method: str | Merge = "task_arithmetic",
    *,
    alpha: float | Literal["auto"] = "auto",
    beta: float = 0.5,
    lines: bool = True,
    norm: int = 1,
    depth: DepthMap | str = "auto",
    schedule: str = "linear",
    outside: Outside = "alpha",
    towers: str = "separate",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    buffers: str = "scale",
    strict: bool = True,
    vocab: str | None = None,
    allow_nonfinite: bool = False,
    allow_gaps: bool = False,
    **method_arguments: Any,
) -> dict[str, Tensor]:
    r"""Merge fine-tuned models and scale the merged task vector by depth.

    Returns :math:`\theta_0 + \mathrm{LiNeS}(\tau_{MTL}; \alpha, \beta)` with :math:`\tau_{MTL} = g(\tau_1, .., \tau_T)`.

    Args:
        base: the pre-trained weights: state dict, module or path.
        models: the fine-tuned weights; the keys of a mapping seed the random numbers of DARE, positions
            do for a sequence.
        method: "average", "task_arithmetic", "ties", "consensus", "consensus_ties", "magnitude", "dare",
            "dare_ties", a name given to `register_merge`, or a `Merge`.
        alpha: factor of the first block and, by default, of everything outside the blocks; "auto" takes
            Eq. 2, :math:`\alpha = \|\sum_t \tau_t\| / (T \|\tau_{MTL}\|)`, so that the first block is scaled as
            in an average.
        beta: increase from the first block to the last; the paper tunes it on validation data.
        lines: False returns the plain merge :math:`\theta_0 + \alpha \tau_{MTL}` ("auto" stands for 1).
        norm: 1 (the authors' code) or 2.
        depth: see `edit`.
        schedule: see `edit`.
        outside: see `edit`.
        towers: see `edit`.
        device: where to put the result (default: where the base is); the arithmetic takes place on the CPU.
        dtype: see `edit`.
        buffers: see `edit`.
        strict: see `edit`.
        vocab: see `edit`.
        allow_nonfinite: see `edit`.
        allow_gaps: see `edit`.
        **method_arguments: of the method, e.g. `density=0.2` for "ties".

    Raises:
        ZeroTaskVectorError: alpha is "auto" and the merged task vector is zero.
        ValueError: no model, and what `edit` raises.
        TypeError: an argument that the method does not take.

    Example:
        >>> base = {f"blocks.{i}.fc.weight": torch.zeros(1) for i in range(3)}
        >>> models = [{name: torch.full((1,), x) for name in base} for x in (1.0, 3.0)]
        >>> [value.item() for value in merge(base, models, alpha="auto", beta=0.5).values()]
        [2.0, 3.0, 4.0]
    """
    keys, sources = label_models(models)
    scaling = Scaling(
        alpha=alpha,
        beta=beta,
        lines=lines,
        norm=norm,
        depth=depth,
        schedule=schedule,
        outside=outside,
        towers=towers,
        buffers=buffers,
        allow_gaps=allow_gaps,
    )
    readers = [
        open_source(source, f"model {key}") for key, source in zip(keys, sources, strict=True)
    ]
    return run_in_memory(
        open_source(base, "base"),
        dict(zip(keys, readers, strict=True)),
        make_merge(method, **method_arguments),
        scaling,
        device=device,
        strict=strict,
        vocab=vocab,
        dtype=parse_dtype(dtype),
        allow_nonfinite=allow_nonfinite,
    )


def auto_alpha(
    task_vectors: Sequence[Mapping[str, Tensor]], merged: Mapping[str, Tensor], *, norm: int = 1
) -> float:
    r"""Return :math:`\alpha = \|\sum_t \tau_t\| / (T \|\tau_{MTL}\|)` (Eq. 2).

    Args:
        task_vectors: the T task vectors, unweighted, untrimmed and unmasked.
        merged: the merged task vector.
        norm: 1 (the authors' code) or 2.

    Raises:
        ZeroTaskVectorError: the merged task vector is zero.
        ValueError: no task vector, or another norm.

    Example:
        >>> one, two = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
        >>> auto_alpha([one, two], {"w": torch.tensor([1.0, 1.0])})
        0.5
    """
    if not task_vectors:
        raise ValueError("no task vector: pass at least one")
    if norm not in {1, 2}:
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")
    zero = MemorySource({name: torch.zeros_like(value) for name, value in merged.items()})
    rows = {str(t): MemorySource(vector, f"task {t}") for t, vector in enumerate(task_vectors)}
    engine = Engine(zero, {**rows, "merged": MemorySource(merged, "merged")})
    sums = Sums(2)

    def measure(cell: Cell) -> None:
        total = cell.deltas[0].clone()
        for row in cell.deltas[1:-1]:
            total.add_(row)
        merged_sum = magnitude_sum(cell.deltas[-1], norm, cell.scratch(0))
        sums.add(cell.name, magnitude_sum(total, norm, cell.scratch(0)), merged_sum)

    engine.scan(measure)
    total, below = sums.totals()
    if below == 0:
        raise zero_vector()
    return norm_ratio(total, below, len(rows), norm)
