"""What one forward pass shows of a model, and the rewriting of a module's own calls by torch.fx."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lcnn.core.penalty import evaluate

__all__ = ["Seen", "has_functional", "observe", "rewrite"]

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


def rewrite(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> tuple[nn.Module, list[str]]:
    """Give every call of an activation in a module's own forward a module of its own.

    Args:
        module: whose forward calls activations as functions, or one activation module several times.
        kinds: activation classes to split.

    Returns:
        An equivalent module of the same class name with the same state dict, and the new children's names.

    Raises:
        Exception: whatever makes it impossible to trace; ``module`` is unchanged then.
    """
    graph = _trace(module)
    root, names, used = module, [], Counter()  # type: ignore[var-annotated]
    additions: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":
            child = root.get_submodule(str(node.target))
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
        while hasattr(root, base) or base in additions:
            base += "_"
        additions[base] = nn.ReLU()
        names.append(base)
        with graph.inserting_before(node):
            new = graph.call_module(base, (node.args[0] if node.args else node.kwargs["input"],))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for name, child in additions.items():
        root.add_module(name, child)
    made = fx.GraphModule(root, graph, type(module).__name__)
    made.train(module.training)
    for name in (n for n, _ in root.named_children() if not hasattr(made, n)):
        made.add_module(name, root.get_submodule(name))  # unused children keep their state
    return made, names
