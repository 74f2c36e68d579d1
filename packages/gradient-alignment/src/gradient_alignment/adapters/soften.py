"""ReLU to Softplus, in modules and in functional calls: a ReLU network has no Hessian to regularise."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.relu, F.relu, torch.relu_, F.relu_)
_METHODS = ("relu", "relu_")
_KINKED = (nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardswish)


@dataclass
class SoftenReport:
    """What `soften` did.

    Attributes:
        modules: names of the ReLU modules that were replaced.
        calls: functional calls that were replaced, as "module: code" lines, or graph nodes.
        untouched: piecewise-linear parts that stay, each with the reason.
    """

    modules: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    untouched: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the report as a table."""
        counts = f"{len(self.modules)} modules and {len(self.calls)} calls"
        lines = [f"replaced {counts}, {len(self.untouched)} untouched"]
        lines += [f"  module     {name}" for name in self.modules]
        lines += [f"  call       {name}" for name in self.calls]
        lines += [f"  untouched  {name}: {why}" for name, why in self.untouched.items()]
        return "\n".join(lines)


def soften(
    model: nn.Module, beta: float = 10.0, *, functional: bool = True, report: bool = False
) -> Any:
    r"""Replace every ReLU by Softplus, :math:`\frac1\beta\log(1 + e^{\beta x})`; the module is changed in place.

    Modules are replaced where they stand. A model that also calls `F.relu` or `tensor.relu()` is traced
    by `torch.fx`, and its graph, with the calls replaced, is returned: parameters and their names stay.
    Where tracing fails, the calls stay and the report, and a warning, say so.

    Args:
        model: the network.
        beta: sharpness; 10 is the paper's. The largest difference to ReLU is log(2)/β, at 0.
        functional: whether to look for functional calls.
        report: also return what was changed and what was not.

    Returns:
        the model (a `GraphModule` where functional calls were replaced), with `report` a pair.

    Raises:
        ValueError: beta is not a finite number above 0.

    Example:
        >>> import torch
        >>> net, report = soften(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), report=True)
        >>> net[1], report.modules
        (Softplus(beta=10.0, threshold=20.0), ['1'])
    """
    if not math.isfinite(beta) or beta <= 0:
        raise ValueError(f"beta must be a finite number above 0, got {beta!r}")
    done = SoftenReport()
    if isinstance(model, nn.ReLU):
        softened: nn.Module = _softplus(beta)
        done.modules.append("")
        return (softened, done) if report else softened
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.ReLU) and type(child) is nn.ReLU:
                setattr(module, child_name, _softplus(beta))
                done.modules.append(path)
            elif isinstance(child, _KINKED):
                done.untouched[path] = f"{type(child).__name__} is piecewise linear, but no ReLU"
    softened = _calls(model, beta, done) if functional else model
    return (softened, done) if report else softened


def _softplus(beta: float) -> nn.Softplus:
    return nn.Softplus(beta)


def _smooth(beta: float) -> Callable[[Tensor], Tensor]:
    def softplus(x: Tensor, inplace: bool = False) -> Tensor:
        return F.softplus(x, beta)

    return softplus


def _mentions_relu(model: nn.Module) -> list[str]:
    """Return the classes whose forward code names relu: worth tracing, or worth a warning."""
    found = []
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.startswith("torch.nn."):
            continue
        code = getattr(kind.forward, "__code__", None)
        if code is not None and {"relu", "relu_"} & set(code.co_names):
            found.append(kind.__name__)
    return sorted(found)


def _calls(model: nn.Module, beta: float, report: SoftenReport) -> nn.Module:
    classes = _mentions_relu(model)
    if not classes:
        return model
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # noqa: BLE001 - any Python can stand in a forward method
        for name in classes:
            report.untouched[f"relu in {name}.forward"] = f"torch.fx cannot trace it: {error}"
        warnings.warn(
            f"functional ReLUs in {', '.join(classes)} were not replaced: torch.fx cannot trace the model "
            f"({error})",
            UserWarning,
            stacklevel=4,
        )
        return model
    smooth = _smooth(beta)
    for node in graph.graph.nodes:
        functional = node.op == "call_function" and node.target in _FUNCTIONS
        clamped = node.op in ("call_function", "call_method") and node.target in (
            torch.clamp,
            torch.clamp_min,
            "clamp",
            "clamp_min",
            operator.abs,
        )
        if functional or (node.op == "call_method" and node.target in _METHODS):
            report.calls.append(f"{node.name}")
            argument = node.args[0] if node.args else node.kwargs["input"]
            node.op, node.target = "call_function", smooth
            node.args, node.kwargs = (argument,), {}
        elif clamped:
            report.untouched[str(node.name)] = f"{node.target} has kinks, but is no ReLU"
    if not report.calls:
        return model
    graph.recompile()
    graph.train(model.training)
    return graph
