"""Give a user's own model T low-rank adapters per layer, in place, and take them away again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palora.core.attention import AdaptedAttention
from palora.core.conv import AdaptedConv
from palora.core.layers import (
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedLinear,
    LayerSpec,
    Switched,
    adapted_class,
    reset_adapters,
)
from palora.core.norms import make_ray_aware
from palora.core.preference import PreferenceLike, PreferenceState, as_preference, state_of
from palora.core.targets import (
    DEFAULT_KINDS,
    Selector,
    check_rank,
    classify,
    is_quantised,
    matches,
    rank_of,
)

__all__ = ["InjectionReport", "adapted_layers", "freeze_base", "inject", "report", "unload"]

_MIXINS: dict[str, type] = {
    "linear": AdaptedLinear,
    "conv1d-hf": AdaptedConv1D,
    "conv": AdaptedConv,
    "embedding": AdaptedEmbedding,
    "attention": AdaptedAttention,
    "attention-out": AdaptedAttention,
}


@dataclass
class InjectionReport:
    """What :func:`inject` did: one row per adapted layer, and what it left alone and why.

    Attributes:
        adapted: (name, kind, rank, adapter parameters).
        skipped: (name, class, reason).
    """

    adapted: list[tuple[str, str, int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'layer':<40} {'kind':<10} {'rank':>4} {'parameters':>12}"]
        lines += [f"{n:<40} {k:<10} {r:>4} {p:>12,}" for n, k, r, p in self.adapted]
        lines += [f"{n:<40} {c} left alone: {why}" for n, c, why in self.skipped]
        return "\n".join(lines)


def report(model: nn.Module) -> InjectionReport:
    """Return what :func:`inject` changed in ``model``."""
    found: InjectionReport = state_of(model).report
    return found


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that carry A and B, each once, by the name they were injected under."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Switched) and getattr(module, "palora_A", None) is not None:
            found.append((name, module))
    return found


def _task_names(tasks: Any) -> list[str]:
    if isinstance(tasks, bool) or not isinstance(tasks, int | Sequence) or isinstance(tasks, str):
        raise ValueError(f"tasks must be a number or a sequence of names, got {tasks!r}")
    names = [f"task{i}" for i in range(tasks)] if isinstance(tasks, int) else list(tasks)
    if len(names) < 2:
        raise ValueError(f"tasks must be at least 2, got {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"task names must differ, got {names}")
    return names


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def inject(
    model: nn.Module,
    tasks: int | Sequence[str],
    *,
    rank: int | Mapping[str, int] = 4,
    alpha: float = 1.0,
    scaling: Literal["lora", "rslora"] = "lora",
    target: Selector | None = None,
    exclude: Selector | None = None,
    conv: Literal["folded", "spatial"] = "folded",
    qkv: Literal["fused", "split"] = "fused",
    dropout: float = 0.0,
    train_base: bool = True,
    init: Literal["lora", "gaussian"] = "lora",
    path: Literal["auto", "activation", "weight"] = "auto",
    adapter_dtype: torch.dtype | None = None,
    default: PreferenceLike | Literal["uniform"] | None = None,
    layer_temperature: float | Callable[[str], float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Add T low-rank adapters to every layer of ``model``, in place, and return it.

    Each adapted layer computes with :math:`W(λ) = W + s \sum_t λ_t B_t A_t` (section 2 of the
    paper). Modules, parameters, names and hooks stay what they were; a layer gains the two
    parameters ``palora_A`` and ``palora_B``, and B (A for embeddings) starts at zero, so that the
    model computes what it computed before, for every λ.

    Args:
        model: any module.
        tasks: T ≥ 2, or the names of the tasks.
        rank: r, or a mapping from patterns (as in ``target``) to ranks; the first match counts.
        alpha: α; the default 1 is that of the authors' code.
        scaling: ``"lora"``: s = α/r; ``"rslora"``: s = α/√r.
        target: which layers: a name, dotted suffix or regular expression, a sequence of them, or a
            predicate ``(name, module)``. None: every Linear, Conv, MultiheadAttention and
            Hugging Face Conv1D (embeddings when named).
        exclude: layers to leave alone, in the same forms.
        conv: ``"folded"``: (B_t A_t) of rank r·k reshaped to the kernel; ``"spatial"``: a k×k
            convolution to r channels and a 1×1 convolution back, as in PEFT.
        qkv: whether MultiheadAttention's stacked input projection gets one adapter or three.
        dropout: probability of dropping entries of the adapters' input while training.
        train_base: False freezes every parameter but the adapters.
        init: ``"lora"``: A uniform in ±1/√cols; ``"gaussian"``: A normal with deviation 1/r.
        path: ``"activation"``, ``"weight"`` (form W(λ)), or the cheaper of both for the batch.
        adapter_dtype: default the weight's dtype, float32 for half-precision weights.
        default: preference in evaluation mode when none is set; None raises there.
        layer_temperature: c: a layer mixes by λ^c/Σλ^c. A number is c of the last layer, with 1
            at the first and linear between; a callable maps names to c.
        generator: source of A's random numbers.

    Returns:
        The same object; :func:`report` tells what was changed.

    Raises:
        ValueError: fewer than two tasks, a rank that is not a positive integer, a target that
            matches no layer, an uninitialised (lazy) layer, or a bad option.
        RuntimeError: the model is injected already.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> inject(net, 2, rank=2) is net
        True
        >>> tuple(net[0].palora_A.shape), tuple(net[0].palora_B.shape)
        ((2, 2, 8), (2, 8, 2))
    """
    names = _task_names(tasks)
    check_rank(rank)
    _choice("scaling", scaling, ("lora", "rslora"))
    _choice("conv", conv, ("folded", "spatial"))
    _choice("qkv", qkv, ("fused", "split"))
    _choice("init", init, ("lora", "gaussian"))
    _choice("path", path, ("auto", "activation", "weight"))
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout and path == "weight":
        raise ValueError("dropout acts on the adapters' input: path='weight' has none")
    if any(isinstance(m, Switched) or "_palora" in m.__dict__ for m in model.modules()):
        raise RuntimeError("the model is injected already; palora.unload(model) first")
    preset = None
    if default is not None:
        even = [1 / len(names)] * len(names)
        preset = as_preference(even if isinstance(default, str) else default, names)
        if isinstance(default, str):
            _choice("default", default, ("uniform",))
    found, outcome = _select(model, target, exclude)
    state = PreferenceState(names, preset)
    state.report = outcome
    state.config = {
        "format": 1,
        "tasks": names,
        "rank": rank if isinstance(rank, int) else dict(rank),
        "alpha": alpha,
        "scaling": scaling,
        "conv": conv,
        "qkv": qkv,
        "targets": [name for name, _, _ in found],
        "train_base": train_base,
        "torch": torch.__version__,
    }
    exponents = _exponents([name for name, _, _ in found], layer_temperature)
    wide: list[str] = []
    twins: dict[int, Any] = {}
    for (name, module, kind), exponent in zip(found, exponents, strict=True):
        r = rank_of(rank, name, module)
        spec = _spec(name, module, kind, r, alpha / (r if scaling == "lora" else r**0.5), conv, qkv)
        spec.dropout, spec.exponent = dropout, exponent
        spec.path = "activation" if is_quantised(module) else path
        module.__class__ = adapted_class(_MIXINS[kind], type(module))
        adapted: Any = module
        adapted._palora, adapted._palora_spec = state, spec
        if kind == "attention-out":
            adapted.register_parameter("palora_A", None)
            adapted.register_parameter("palora_B", None)
            continue
        if spec.inner > min(spec.rows, spec.cols):
            wide.append(name)
        owner = weight_of(module)
        if id(owner) in twins:
            adapted.palora_A, adapted.palora_B = twins[id(owner)]
        else:
            _add_adapters(adapted, owner, len(names), adapter_dtype)
            reset_adapters(adapted, init, generator)
            twins[id(owner)] = (adapted.palora_A, adapted.palora_B)
        count = adapted.palora_A.numel() + adapted.palora_B.numel()
        outcome.adapted.append((name, spec.kind, r, count))
    if wide:
        warnings.warn(
            f"rank exceeds min(in, out) of: {', '.join(wide)}; lower ranks say the same",
            stacklevel=2,
        )
    make_ray_aware(model, state)
    _block_fast_paths(model)
    model.__dict__["_palora"] = state
    if not train_base:
        freeze_base(model)
    return model


def _select(
    model: nn.Module, target: Selector | None, exclude: Selector | None
) -> tuple[list[tuple[str, nn.Module, str]], InjectionReport]:
    """The layers to adapt, attention's output projections included, and what was left alone."""
    outcome = InjectionReport()
    found: list[tuple[str, nn.Module, str]] = []
    implied: set[int] = set()
    tied: dict[int, str] = {}
    available: list[str] = []
    attentions: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        kind, reason = classify(module)
        if kind is not None:
            available.append(name)
        named = target is not None and matches(target, name, module)
        wanted = named or id(module) in implied or (target is None and kind in DEFAULT_KINDS)
        if kind is None:
            if reason and (named or target is None):
                outcome.skipped.append((name, type(module).__name__, reason))
            continue
        if kind == "attention":
            attentions[id(module.out_proj)] = (name, module)
        if not wanted or (exclude is not None and matches(exclude, name, module)):
            continue
        if kind == "attention":
            implied.add(id(module.out_proj))
            attentions.pop(id(module.out_proj))
            if not module._qkv_same_embed_dim:
                reason = "separate q, k, v weights (kdim, vdim): only out_proj is adapted"
                outcome.skipped.append((name, type(module).__name__, reason))
                kind = "attention-out"
        elif tied.setdefault(id(weight_of(module)), kind) != kind:
            reason = "its weight is tied to an adapted layer of another kind"
            outcome.skipped.append((name, type(module).__name__, reason))
            continue
        found.append((name, module, kind))
        if id(module) in attentions:  # PyTorch's attention reads out_proj's weight, not its output
            found.append((*attentions[id(module)], "attention-out"))
    if not any(kind != "attention-out" for _, _, kind in found):
        raise ValueError(
            f"no layer matched target={target!r}, exclude={exclude!r}; "
            f"available: {', '.join(available) or 'none'}"
        )
    return found, outcome


def weight_of(module: nn.Module) -> Any:
    """The weight that a layer's adapters act on."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight
    return module.weight


def _spec(
    name: str, module: nn.Module, kind: str, rank: int, scale: float, conv: str, qkv: str
) -> LayerSpec:
    """The matrix view that the adapters of one layer act on."""
    layer: Any = module
    if kind.startswith("attention"):
        e = layer.embed_dim
        inner = 3 * rank if qkv == "split" else rank
        return LayerSpec(name, "attention", 3 * e, e, rank, inner, scale, mode=qkv)
    weight = weight_of(module)
    if kind == "conv":
        out, per_group, *kernel = weight.shape
        area = weight[0, 0].numel()
        if conv == "spatial":
            return LayerSpec(name, kind, out, per_group * area, rank, rank, scale, mode="spatial")
        if len(kernel) == 2 and kernel[0] == kernel[1]:
            k = kernel[0]
            rows, cols = out // layer.groups * k, per_group * layer.groups * k
            return LayerSpec(name, kind, rows, cols, rank, rank * k, scale, mode="folded")
        return LayerSpec(name, kind, out, per_group * area, rank, rank, scale, mode="flat")
    if kind == "linear":
        return LayerSpec(name, kind, layer.out_features, layer.in_features, rank, rank, scale)
    cols, rows = weight.shape
    return LayerSpec(name, kind, rows, cols, rank, rank, scale)


def _add_adapters(layer: Any, owner: Tensor, tasks: int, dtype: torch.dtype | None) -> None:
    spec: LayerSpec = layer._palora_spec
    if dtype is None:
        exact = owner.dtype in (torch.float32, torch.float64)
        dtype = owner.dtype if exact else torch.float32
    make: dict[str, Any] = {"device": owner.device, "dtype": dtype}
    layer.register_parameter(
        "palora_A", nn.Parameter(torch.empty(tasks, spec.inner, spec.cols, **make))
    )
    # three stacked blocks of attention share the r columns of B: block j meets rows j of A
    inner = spec.rank if spec.mode == "split" else spec.inner
    layer.register_parameter("palora_B", nn.Parameter(torch.empty(tasks, spec.rows, inner, **make)))


def _exponents(names: list[str], temperature: float | Callable[[str], float] | None) -> list[float]:
    """The exponent c of λ for each layer, from the first to the last."""
    if temperature is None:
        return [1.0] * len(names)
    if callable(temperature):
        values = [float(temperature(name)) for name in names]
    else:
        steps = max(len(names) - 1, 1)
        values = [1.0 + (temperature - 1.0) * i / steps for i in range(len(names))]
    if any(not 0 < value < float("inf") for value in values):
        raise ValueError(f"layer_temperature must be positive and finite, got {min(values)}")
    return values


# what PyTorch's transformer modules ask, before they read weights past their adapted layers or pack
# a padded batch into a nested tensor that only their fused kernels take
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def _block_fast_paths(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` and its layers on the path that calls their modules."""
    for module in model.modules():
        for kind, (attribute, off) in _FAST_PATHS.items():
            adapted = isinstance(module, kind) and any(
                isinstance(m, Switched) for m in module.modules()
            )
            if adapted and hasattr(module, attribute):
                module.__dict__["_palora_fast_path"] = (attribute, getattr(module, attribute))
                setattr(module, attribute, off)


def strip(model: nn.Module) -> None:
    """Switch every module of ``model`` back and drop all that injection added."""
    for module in list(model.modules()):
        if "_palora_fast_path" in module.__dict__:
            attribute, held = module.__dict__.pop("_palora_fast_path")
            setattr(module, attribute, held)
        if isinstance(module, Switched):
            for key in ("palora_A", "palora_B"):
                module._parameters.pop(key, None)
            module.__class__ = type(module)._palora_original
        for key in ("_palora", "_palora_spec"):
            module.__dict__.pop(key, None)


def unload(model: nn.Module) -> nn.Module:
    """Remove the adapters in place and return the model with its (trained) base weights.

    Raises:
        RuntimeError: the model is not injected.

    Example:
        >>> net = inject(nn.Linear(4, 4), 2)
        >>> type(unload(net)).__name__, list(net.state_dict())
        ('Linear', ['weight', 'bias'])
    """
    state_of(model)
    freeze_base(model, False)
    strip(model)
    return model


def freeze_base(model: nn.Module, flag: bool = True) -> None:
    """Freeze every parameter but the adapters, or (``flag=False``) thaw those frozen so.

    Raises:
        RuntimeError: the model is not injected.
    """
    state = state_of(model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("palora_A", "palora_B"):
            continue
        if flag and parameter.requires_grad:
            parameter.requires_grad_(False)
            state.frozen.append(name)
        elif not flag and name in state.frozen:
            parameter.requires_grad_(True)
    if not flag:
        state.frozen.clear()
    state.config["train_base"] = not flag
