"""ReLU to Softplus, in modules and in functional calls: a ReLU network has no Hessian to regularise."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.relu, F.relu, torch.relu_, F.relu_)
_METHODS = ("relu", "relu_")
_KINKED_CALLS: tuple[Any, ...] = (
    *(F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.threshold, F.prelu, F.rrelu),
    *(torch.clamp, torch.clamp_min, torch.abs, operator.abs, "clamp", "clamp_min", "abs"),
)
_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
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
    Branches of its Python code are then fixed as they are in the present mode, functional dropout among them.
    Where tracing fails, the calls stay and the report, and a warning, say so. torch's own transformer layers
    keep their activation as an attribute, which is replaced.

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
        if isinstance(module, _TRANSFORMERS) and module.activation in _FUNCTIONS:
            module.activation = functools.partial(F.softplus, beta=beta)
            module.activation_relu_or_gelu = (
                0  # keeps the fused kernel, which knows ReLU alone, away
            )
            done.modules.append(f"{name}.activation" if name else "activation")
        for child_name, child in module._modules.items():
            if child is None:
                continue
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.ReLU):
                setattr(module, child_name, _softplus(beta))
                done.modules.append(path)
            elif isinstance(child, _KINKED):
                done.untouched[path] = f"{type(child).__name__} is piecewise linear, but no ReLU"
    softened = _calls(model, beta, done) if functional else model
    return (softened, done) if report else softened


def _softplus(beta: float) -> nn.Softplus:
    return nn.Softplus(beta)


def _mentions_relu(model: nn.Module) -> list[str]:
    """Return the classes whose forward code calls relu as a function: worth tracing, or worth a warning."""
    found = set()
    for module in model.modules():
        kind = type(module)
        code = getattr(kind.forward, "__code__", None)
        if kind.__module__.startswith("torch.nn.") or code is None:
            continue
        names = set(code.co_names)
        submodule_only = hasattr(module, "relu") and not names & {"F", "torch", "functional"}
        if names & {"relu", "relu_"} and not submodule_only:
            found.add(kind.__name__)
    return sorted(found)


def _writes(node: fx.Node) -> bool:
    """Tell whether a call of ReLU overwrites its argument."""
    if node.target in (torch.relu_, F.relu_, "relu_"):
        return True
    inplace = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False)
    return bool(inplace)


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
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if isinstance(node.type, str):  # a graph with unevaluated annotations cannot be pickled
            node.type = None
        function = node.op == "call_function" and node.target in _FUNCTIONS
        if function or (node.op == "call_method" and node.target in _METHODS):
            report.calls.append(node.name)
            argument = node.args[0] if node.args else node.kwargs["input"]
            with graph.graph.inserting_before(node):
                smooth = graph.graph.call_function(F.softplus, (argument, beta))
            if _writes(node):  # whoever reads the argument later reads the result

                def later(user: fx.Node, place: int = order[node]) -> bool:
                    return order.get(user, -1) > place

                argument.replace_all_uses_with(smooth, later)
            node.replace_all_uses_with(smooth)
            graph.graph.erase_node(node)
        elif node.op in ("call_function", "call_method") and node.target in _KINKED_CALLS:
            what = node.target if isinstance(node.target, str) else node.target.__name__
            report.untouched[node.name] = f"{what} is piecewise linear, but no ReLU"
    if not report.calls:
        return model
    graph.recompile()
    return graph
