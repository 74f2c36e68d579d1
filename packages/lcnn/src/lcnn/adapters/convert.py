"""One call that makes a network a low-curvature network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcnn.adapters.calibrate import calibrate_calls
from lcnn.adapters.report import Entry, Report
from lcnn.adapters.tracing import Seen, has_functional, observe, other_callers, rewrite
from lcnn.core.activation import CenteredSoftplus, positive
from lcnn.core.norm import KINDS, LipschitzNorm, from_batchnorm, is_fused_act
from lcnn.core.parametrize import (
    CONVS,
    check_free,
    computes_as,
    conv_spectral_norm,
    is_normalized,
    linear_spectral_norm,
    pickles,
)

__all__ = ["convert"]

ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
NOTES: dict[type, str] = {
    nn.ReLU6: "no upper cut at 6 any more",
    nn.LeakyReLU: "no negative slope any more",
    nn.SiLU: "monotone now",
    nn.GELU: "monotone now",
}
UNTOUCHED = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
OTHERS = (
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardswish,
    nn.PReLU,
    nn.Mish,
)


@dataclass
class _Options:
    activation: str
    norm: str
    conv: str
    linear: str
    beta: float
    lipschitz: float
    share: str
    activations: tuple[type[nn.Module], ...]
    include: Callable[[str, nn.Module], bool]
    stats: Any
    n_power_iterations: int


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def convert(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | None = None,
    *,
    activation: Literal["centered_softplus", "keep"] = "centered_softplus",
    norm: Literal["lipschitz", "keep"] = "lipschitz",
    conv: Literal["operator", "reshape", "none"] = "operator",
    linear: Literal["head", "all", "none"] = "head",
    beta_init: float = 5.0,
    lipschitz_init: float = 10.0,
    share_beta: Literal["module", "channel", "model"] = "module",
    stats: Literal["running", "batch"] = "running",
    activations: tuple[type[nn.Module], ...] = ACTIVATIONS,
    n_power_iterations: int = 1,
    calibrate: bool = False,
    include: Callable[[str, nn.Module], bool] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Return a low-curvature form of ``model``; ``.lcnn_report`` says what was and was not converted.

    Activations become :class:`CenteredSoftplus`, batch norms their Lipschitz form, convolutions and the
    classifier get a spectral norm. Calls of ``F.relu``, and one activation module called twice, get
    modules of their own through ``torch.fx``, locally: only the ``forward`` that makes the calls is replaced,
    by a subclass. Convolutions and linear layers with a ``forward`` of their own (weight standardisation,
    padding at run time) stay, with an entry. A second conversion changes nothing.

    Args:
        model: any network.
        example_input: one batch (or a tuple of arguments) as the model sees it; shows the convolutions' sizes.
        activation: ``"keep"`` leaves activations.
        norm: ``"keep"`` leaves batch norms.
        conv: ``"operator"``: the true operator norm; ``"reshape"``: torch's matrix norm, the paper's ablation.
        linear: ``"head"``: the last linear layer; ``"all"``; ``"none"``.
        beta_init: initial beta.
        lipschitz_init: initial Gamma.
        share_beta: one beta for each ``"module"``, ``"channel"`` (needs the example) or the ``"model"``.
        stats: of :class:`LipschitzNorm`.
        activations: classes to replace; add ``nn.SiLU``, ``nn.GELU`` to have them converted too.
        n_power_iterations: per training forward.
        calibrate: re-estimate running statistics and Gammas on the example input, see
            :func:`lcnn.calibrate`; for networks that were trained before.
        include: (qualified name, module) -> whether to convert it. Default: all.
        inplace: convert ``model`` itself instead of a deep copy (a bare activation or norm is still replaced).

    Raises:
        ValueError: for an unknown option, or an example that is missing where it is needed.
        TypeError: for lazy or quantised layers, or weights that are parametrized already.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> made = convert(net, torch.zeros(1, 1, 8, 8))
        >>> [e.new for e in made.lcnn_report.converted]
        ['Conv2d (operator norm)', 'LipschitzBatchNorm2d', 'CenteredSoftplus', 'Linear (spectral norm)']
    """
    _check("activation", activation, ("centered_softplus", "keep"))
    _check("norm", norm, ("lipschitz", "keep"))
    _check("conv", conv, ("operator", "reshape", "none"))
    _check("linear", linear, ("head", "all", "none"))
    _check("share_beta", share_beta, ("module", "channel", "model"))
    positive("beta_init", beta_init)
    positive("lipschitz_init", lipschitz_init)
    if getattr(model, "lcnn_report", None) is not None:
        return model if inplace else copy.deepcopy(model)
    if calibrate and example_input is None:
        raise ValueError("calibrate=True needs example_input, a batch of real data")
    choose = include or (lambda name, module: True)
    options = _Options(
        activation,
        norm,
        conv,
        linear,
        beta_init,
        lipschitz_init,
        share_beta,
        activations,
        choose,
        stats,
        n_power_iterations,
    )
    _check_layers(model, options, example_input is not None)
    model = model if inplace else copy.deepcopy(model)
    report = Report()
    seen = None if example_input is None else observe(model, example_input)
    if activation != "keep":
        _own_modules(model, options, seen, report)
        seen = None if example_input is None else observe(model, example_input)
    model = _Surgeon(model, options, seen, report).run()
    if calibrate:
        example = example_input if isinstance(example_input, tuple) else (example_input,)
        calibrate_calls(model, [example])
    object.__setattr__(model, "lcnn_report", report)
    return model


def _check_layers(model: nn.Module, options: _Options, has_example: bool) -> None:
    """Refuse what cannot be converted before anything is touched."""
    for name, module in model.named_modules():
        if is_normalized(module):
            continue
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            check_free(module, name)  # type: ignore[arg-type]
        if isinstance(module, (*CONVS, nn.Linear)) or "quantized" in type(module).__module__:
            wanted = options.linear if isinstance(module, nn.Linear) else options.conv
            if wanted != "none" and options.include(name, module):
                check_free(module, name)
        needs = options.conv == "operator" and computes_as(module, CONVS)
        if needs and options.include(name, module) and not has_example:
            raise ValueError(
                f"{name} is a convolution, whose operator norm depends on its input's size: pass "
                "example_input, or choose conv='reshape' or conv='none'"
            )
    if options.share == "channel" and not has_example:
        raise ValueError("share_beta='channel' needs the channel counts: pass example_input")


def _own_modules(model: nn.Module, options: _Options, seen: Seen | None, report: Report) -> None:
    """Rewrite every module whose own forward hides activations; deepest first."""
    twice = {m for m, n in (seen.calls if seen else {}).items() if n > 1}
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        shared = [
            child
            for child in module.children()
            if child in twice and isinstance(child, options.activations)
        ]
        simple = type(module).__module__.startswith("torch.nn.modules")
        hidden = module in seen.functional if seen else not simple and has_functional(module)
        if simple or not (shared or hidden) or not options.include(name, module):
            continue
        kind = type(module).__name__
        try:
            rewrite(module, options.activations)
        except Exception as error:  # noqa: BLE001 - whatever the forward does with a proxy
            reason = "; ".join(str(error).splitlines()[:1])
            what = "calls ReLU as a function" if hidden else "calls one activation several times"
            note = f"{what} and cannot be traced ({reason})"
            report.entries.append(Entry(name, kind, kind, note))
            warnings.warn(f"{name or 'the model'} ({kind}) {note}", UserWarning, stacklevel=4)
            continue
        for method in other_callers(module) if hidden else ():
            note = "calls ReLU as a function, and is changed only where forward calls it"
            report.entries.append(Entry(f"{name}.{method}".lstrip("."), kind, kind, note))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class _Surgeon:
    """Replaces layers one by one, in order, and writes the report."""

    def __init__(self, model: nn.Module, options: _Options, seen: Seen | None, report: Report):
        self.model, self.options, self.seen, self.report = model, options, seen, report
        self.common: CenteredSoftplus | None = None
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if seen is not None:
            linears = [m for m in seen.order if isinstance(m, nn.Linear)]
        self.head = linears[-1] if linears else None
        self.made: dict[nn.Module, nn.Module] = {}

    def note(self, name: str, old: nn.Module, new: str, note: str = "") -> None:
        self.report.entries.append(Entry(name, type(old).__name__, new, note))

    def leave(self, name: str, module: nn.Module, note: str) -> None:
        self.note(name, module, type(module).__name__, note)

    def run(self) -> nn.Module:
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if "parametrizations" in name.split("."):
                continue
            if module in self.made:  # one object under several names
                _set(self.model, name, self.made[module])
                self.leave(name, self.made[module], "shared with an earlier name, counted once")
                continue
            made = self.layer(name, module)
            if made is not None and made is not module:
                self.made[module] = made
                if name:
                    _set(self.model, name, made)
                else:  # the model is one layer
                    self.model = made
        return self.model

    def layer(self, name: str, module: nn.Module) -> nn.Module | None:
        options = self.options
        if isinstance(module, (CenteredSoftplus, LipschitzNorm)) or is_normalized(module):
            return None
        if not options.include(name, module):
            if isinstance(module, (*CONVS, *options.activations, nn.Linear, _BatchNorm)):
                self.leave(name, module, "excluded by include")
            return None
        if isinstance(module, options.activations) and options.activation != "keep":
            return self.activation(name, module)
        if isinstance(module, _BatchNorm) and options.norm != "keep":
            return self.batchnorm(name, module)
        if isinstance(module, CONVS) and options.conv != "none":
            return self.convolution(name, module)
        if isinstance(module, nn.Linear) and options.linear != "none":
            return self.linear(name, module)
        if isinstance(module, UNTOUCHED):
            self.leave(name, module, "its slope depends on the data; unbounded")
        elif isinstance(module, POOLS):
            self.leave(name, module, "slope at most 1 without overlap, but not smooth")
        elif isinstance(module, OTHERS):
            self.leave(name, module, "add its class to activations= to convert it")
        elif isinstance(module, nn.MultiheadAttention):
            self.leave(name, module, "attention is not Lipschitz; outside the method")
        return None

    def activation(self, name: str, module: nn.Module) -> nn.Module:
        options, note = self.options, NOTES.get(type(module), "")
        count, axis = 1, 1
        if options.share == "channel" and self.seen is not None:
            if module not in self.seen.inputs:
                return self.unreached(name, module)
            shape = self.seen.inputs[module].shape
            count = shape[axis]
        made = CenteredSoftplus(options.beta, num_parameters=count)
        like = next(self.model.parameters(), None)
        if like is not None and like.is_floating_point():
            made.to(device=like.device, dtype=_at_least_single(like.dtype))
        if options.share == "model":
            self.common = self.common or made
            made.log_beta = self.common.log_beta
            note = "; ".join(filter(None, [note, "one beta for the model"]))
        if self.seen is not None and self.seen.calls[module] > 1:
            note = "; ".join(filter(None, [note, "called several times, one beta, counted once"]))
        self.note(name, module, "CenteredSoftplus", note)
        return made.train(module.training)

    def batchnorm(self, name: str, module: nn.Module) -> nn.Module | None:
        if not (type(module) in KINDS or is_fused_act(module)):
            self.leave(name, module, "an unknown kind of batch norm")
            return None
        made = from_batchnorm(module, self.options.lipschitz, stats=self.options.stats)
        self.note(name, module, type(made).__name__)
        return made

    def unreached(self, name: str, module: nn.Module) -> nn.Module:
        note = "never reached by the example forward"
        self.leave(name, module, note)
        warnings.warn(f"{name} ({type(module).__name__}) was {note}", UserWarning, stacklevel=6)
        return module

    def convolution(self, name: str, module: nn.Module) -> nn.Module:
        kind = type(module).__name__
        if self.options.conv == "reshape" and computes_as(module, CONVS):
            count = self.options.n_power_iterations
            dim = 1 if "Transpose" in kind else 0
            made: Any = torch.nn.utils.parametrizations.spectral_norm(
                module, n_power_iterations=count, dim=dim
            )
            self.report.entries.append(Entry(name, kind, f"{kind} (reshaped norm)"))
            return pickles(made)
        if not computes_as(module, CONVS):
            self.leave(name, module, "a forward of its own: what norm it has is not known")
            return module
        assert self.seen is not None
        if module not in self.seen.inputs:
            return self.unreached(name, module)
        size = self.seen.inputs[module].shape[2:]
        module = conv_spectral_norm(
            module, tuple(size), n_power_iterations=self.options.n_power_iterations
        )
        note = "several sizes seen; the last one counts" if self.seen.calls[module] > 1 else ""
        self.report.entries.append(Entry(name, kind, f"{kind} (operator norm)", note))
        return module

    def linear(self, name: str, module: nn.Module) -> nn.Module | None:
        if self.options.linear == "head" and module is not self.head:
            self.leave(name, module, "not the head; linear='all' normalises it")
            return None
        if not computes_as(module, (nn.Linear,)):
            self.leave(name, module, "a forward of its own: what norm it has is not known")
            return None
        linear_spectral_norm(module)
        self.report.entries.append(Entry(name, "Linear", "Linear (spectral norm)"))
        return module


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
