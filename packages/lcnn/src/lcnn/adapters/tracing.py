"""What one forward pass shows of a model, and the rewriting of a module's own calls by torch.fx."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lcnn.core.penalty import evaluate

__all__ = ["Seen", "has_functional", "observe", "other_callers", "rewrite"]

FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.relu_, Tensor.relu, Tensor.relu_, F.relu6}
METHODS = {"relu", "relu_"}


@dataclass
class Seen:
    """What the example forward pass went through."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    order: list[nn.Module] = field(default_factory=list)
    functional: set[nn.Module] = field(default_factory=set)


class _Watch(TorchFunctionMode):
    """Note which module calls an activation as a function."""

    def __init__(self, seen: Seen, stack: list[nn.Module]) -> None:
        super().__init__()
        self.seen, self.stack = seen, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUNCTIONS and self.stack:
            owner = self.stack[-1]
            if not type(owner).__module__.startswith("torch.nn.modules"):
                self.seen.functional.add(owner)
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, example: Any) -> Seen:
    """Run ``model`` once in evaluation mode, without gradient and without touching statistics."""
    seen = Seen()
    stack: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        stack.append(module)
        seen.calls[module] += 1
        seen.order.append(module)
        if args and isinstance(args[0], Tensor):
            seen.inputs[module] = args[0]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack.pop()
        seen.outputs[module] = output

    handles = [
        h
        for m in model.modules()
        for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))
    ]
    try:
        with _Watch(seen, stack):
            evaluate(model, *(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Shallow(fx.Tracer):
    """Trace a module's own forward; every child is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def has_functional(module: nn.Module) -> bool:
    """Tell from the source whether a module's own forward calls an activation as a function."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return "relu(" in source or "relu_(" in source


def _trace(module: nn.Module) -> fx.Graph:
    """Trace in both modes, and refuse a forward that branches on them."""
    graphs = []
    mode = module.training
    try:
        for module.training in (True, False):
            graphs.append(_Shallow().trace(module))
    finally:
        module.training = mode
    codes = [graph.python_code("self").src for graph in graphs]
    if codes[0] != codes[1]:
        raise TypeError("its forward depends on self.training")
    return graphs[0]


def rewrite(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Give every call of an activation in a module's own forward a module of its own, in place.

    The module gets a subclass of its class with another ``forward``; attributes, methods, hooks and the
    state dict stay.

    Args:
        module: whose forward calls activations as functions, or one activation module several times.
        kinds: activation classes to split.

    Returns:
        The new children's names.

    Raises:
        Exception: whatever makes it impossible to trace; ``module`` is unchanged then.
    """
    graph = _trace(module)
    names: list[str] = []
    used: Counter[int] = Counter()
    plan: dict[int, str] = {}
    for index, node in enumerate(graph.nodes):
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            used[id(child)] += 1
            if used[id(child)] == 1 or not isinstance(child, kinds):
                continue
            base = f"{str(node.target).replace('.', '_')}_{used[id(child)]}"
        elif (node.op == "call_function" and node.target in FUNCTIONS) or (
            node.op == "call_method" and node.target in METHODS
        ):
            base = f"relu_{sum(n.startswith('relu') for n in names) + 1}"
        else:
            continue
        while hasattr(module, base) or base in names:
            base += "_"
        plan[index] = base
        names.append(base)
    if plan:
        for name in names:
            module.add_module(name, nn.ReLU())
        _adopt(module, graph, plan)
    return names


def _adopt(module: nn.Module, graph: fx.Graph, plan: dict[int, str]) -> None:
    """Let ``module`` call a child where ``graph`` has the nodes of ``plan``; all else of it stays."""
    for index, node in enumerate(list(graph.nodes)):
        if index not in plan:
            continue
        with graph.inserting_before(node):
            value = node.args[0] if node.args else node.kwargs["input"]
            new = graph.call_module(plan[index], (value,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    kind = type(module)
    members = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce,
        "_lcnn_plan": plan,
        "forward": type(fx.GraphModule(module, graph)).forward,
    }
    module.__class__ = type(kind.__name__, (kind,), members)


def _reduce(module: Any, protocol: int) -> Any:
    """Pickle a rewritten module as one of its own class, and the plan to rewrite it again."""
    return _revive, (type(module).__mro__[1], dict(module.__dict__), module._lcnn_plan)


def _revive(kind: type[nn.Module], state: dict[str, Any], plan: dict[int, str]) -> nn.Module:
    module = kind.__new__(kind)
    module.__dict__.update(state)
    _adopt(module, _trace(module), plan)
    return module


def other_callers(module: nn.Module) -> list[str]:
    """Name the methods beside ``forward`` whose source calls an activation as a function."""
    found = set()
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for name, member in vars(kind).items():
            if name != "forward" and inspect.isfunction(member):
                try:
                    source = inspect.getsource(member)
                except (OSError, TypeError):
                    continue
                if re.search(r"\b(F|functional|torch)\.relu|\.relu_?\(\)", source):
                    found.add(name)
    return sorted(found)
