"""A provable bound of the input Hessian, composed over the graph of the network."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.norm import LipschitzBatchNormAct2d, LipschitzNorm
from lcnn.core.operator import ConvMap, dense_matrix, frequency_blocks, gram_norm
from lcnn.core.parametrize import CONVS, ConvSpectralNorm, computes_as

__all__ = ["Bound", "hessian_bound"]

Pair = tuple[Any, Any]  # (slope, curvature): numbers or scalar tensors
DENSE = 1024
SMOOTH: dict[type[nn.Module], Pair] = {
    nn.Identity: (1.0, 0.0),
    nn.Flatten: (1.0, 0.0),
    nn.Unflatten: (1.0, 0.0),
    nn.Dropout: (1.0, 0.0),
    nn.Dropout2d: (1.0, 0.0),
    nn.ZeroPad2d: (1.0, 0.0),
    nn.Sigmoid: (0.25, 1 / (6 * math.sqrt(3))),
    nn.Tanh: (1.0, 4 / (3 * math.sqrt(3))),
    nn.SiLU: (1.0999, 0.5),
    nn.GELU: (1.1290, math.sqrt(2 / math.pi)),
}
SHAPES = {
    "view",
    "reshape",
    "flatten",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "permute",
    "transpose",
}
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


@dataclass
class Bound:
    """Suprema over all inputs: ``lipschitz`` of the gradient's norm, ``hessian`` of the Hessian's norm.

    ``per_module`` has the slope and curvature of every layer; ``unbounded`` says which layers make the result
    infinite and why.
    """

    lipschitz: Tensor
    hessian: Tensor
    per_module: dict[str, tuple[float, float]] = field(default_factory=dict)
    unbounded: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (CenteredSoftplus, LipschitzNorm, *SMOOTH, *CONVS, nn.Linear))
        return ours or super().is_leaf_module(m, module_qualified_name)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return norm


def _weight_of(module: Any) -> Tensor:
    """The weight in use, without a power step."""
    if not parametrize.is_parametrized(module, "weight"):
        weight: Tensor = module.weight
        return weight
    parts = module.parametrizations["weight"]
    modes = {part: part.training for part in parts.modules()}
    parts.eval()
    try:
        weight = parts()
    finally:
        for part, mode in modes.items():
            part.training = mode
    return weight


def _linear(module: Any, nominal: bool) -> Any:
    if nominal and parametrize.is_parametrized(module, "weight"):
        part = module.parametrizations["weight"][0]
        return part.target if isinstance(part, ConvSpectralNorm) else 1.0
    weight = _weight_of(module)
    if isinstance(module, nn.Linear):
        return _norm(weight)
    part = module.parametrizations["weight"][0] if hasattr(module, "parametrizations") else None
    if isinstance(part, ConvSpectralNorm):
        return _certified(weight, part.conv)
    if module.padding_mode != "zeros" and not _wraps_once(module):
        return math.inf
    # ||A|| <= sqrt(kh kw) times the norm of the reshaped weight, whatever the size of the input
    norms = _norm(weight.unflatten(0, (module.groups, -1)).flatten(2)).max()
    return math.sqrt(math.prod(module.kernel_size)) * norms


def _wraps_once(module: Any) -> bool:
    """Tell whether circular padding repeats no output."""
    if module.padding_mode != "circular" or isinstance(module.padding, str):
        return bool(module.padding_mode == "circular")
    axes = zip(module.padding, module.dilation, module.kernel_size, strict=True)
    return all(2 * p <= d * (k - 1) for p, d, k in axes)


def _certified(weight: Tensor, conv: ConvMap) -> Any:
    """An upper bound of the operator norm: exact where the matrix is small, by frequencies otherwise."""
    source, image = conv.shapes(weight)
    if min(math.prod(source), math.prod(image)) <= DENSE and math.prod(source) <= 4 * DENSE:
        return _norm(dense_matrix(weight, conv))
    try:
        return gram_norm(frequency_blocks(weight, conv), 1e-3)
    except ValueError:  # a kind of padding that has no such blocks
        return math.inf


def _pool(kernel: Any, stride: Any, dims: int) -> float:
    """sqrt(row sum x column sum) of an average pool: every input is in ceil(k / s) windows an axis."""
    kernels = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
    strides = (
        kernels if stride is None else ((stride,) * dims if isinstance(stride, int) else stride)
    )
    return math.sqrt(math.prod(math.ceil(k / s) / k for k, s in zip(kernels, strides, strict=True)))


def _batchnorm(module: Any) -> Any:
    if module.running_var is None:
        return math.inf
    std = (module.running_var + module.eps).sqrt()
    return (1 / std if module.weight is None else module.weight.abs() / std).max()


def _module(module: nn.Module, nominal: bool) -> Pair | None:
    """Slope and curvature of a leaf; None where nothing is known about it."""
    if isinstance(module, CenteredSoftplus):
        return 1.0, module.beta.max() / 4
    if isinstance(module, LipschitzNorm):
        slope = module.slope() if module.running_var is not None else math.inf
        if isinstance(module, LipschitzBatchNormAct2d):
            inner = _module(module.act, nominal)
            return None if inner is None else _compose((slope, 0.0), inner)
        return slope, 0.0
    if type(module) is nn.Softplus:
        return 1.0, module.beta / 4
    if computes_as(module, (nn.Linear, *CONVS)):
        return _linear(module, nominal), 0.0
    if isinstance(module, KINKED):
        return 1.0, math.inf
    if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        if module.ceil_mode or getattr(module, "divisor_override", None):
            return None
        dims = {nn.AvgPool1d: 1, nn.AvgPool2d: 2}.get(type(module), 3)
        pads: Any = module.padding
        padding = pads if isinstance(pads, int) else max(pads)
        if padding and not module.count_include_pad:
            return None
        return _pool(module.kernel_size, module.stride, dims), 0.0
    if type(module) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
        return (1.0, 0.0) if module.output_size in (1, (1, 1)) else None
    if type(module) is nn.MaxPool2d:
        k, s = module.kernel_size, module.stride
        ks = k if isinstance(k, tuple) else (k, k)
        ss = s if isinstance(s, tuple) else (s, s)
        return math.sqrt(math.prod(math.ceil(a / b) for a, b in zip(ks, ss, strict=True))), math.inf
    if isinstance(module, _BatchNorm) and type(module).__module__.startswith("torch.nn"):
        return _batchnorm(module), 0.0
    return next((pair for kind, pair in SMOOTH.items() if type(module) is kind), None)


def _compose(inner: Pair, outer: Pair) -> Pair:
    """h = h_G l_F^2 + l_G h_F, where 0 times infinity is 0: a constant has no curvature."""

    def times(a: Any, b: Any) -> Any:
        return 0.0 if any(isinstance(v, float) and v == 0 for v in (a, b)) else a * b

    (l_f, h_f), (l_g, h_g) = inner, outer
    return l_g * l_f, times(h_g, l_f * l_f) + times(l_g, h_f)


def _plain_index(index: Any) -> bool:
    """Tell whether an index picks every entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts)


def _call(node: fx.Node, args: list[Any]) -> Pair | None:
    """Slope and curvature up to a function or method call; None where it is unknown."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    found = [a for a in args if isinstance(a, tuple)]
    if name in ("cat", "concat"):
        slope, curve = (sum(p[i] ** 2 for p in found) ** 0.5 for i in range(2))
        return slope, curve
    if name in ("add", "add_", "iadd", "sub"):
        if node.kwargs.get("alpha", 1) != 1:
            return None
        return sum(p[0] for p in found), sum(p[1] for p in found)
    if len(found) != 1:
        return None
    pair: Pair = found[0]
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    if name in ("mul", "mul_", "truediv", "div") and len(numbers) == 1:
        if name in ("truediv", "div") and not isinstance(node.args[0], fx.Node):
            return None
        factor = abs(numbers[0]) if name.startswith("mul") else 1 / abs(numbers[0])
        return factor * pair[0], factor * pair[1]
    if name in SHAPES or name in ("neg", "mean", "dropout"):
        return pair
    if target in (F.relu, torch.relu) or name in ("relu", "relu_"):
        return _compose(pair, (1.0, math.inf))
    if target is F.avg_pool2d:
        kernel = node.args[1] if len(node.args) > 1 else node.kwargs["kernel_size"]
        stride = node.args[2] if len(node.args) > 2 else node.kwargs.get("stride")
        plain = not node.kwargs.keys() - {"input", "kernel_size", "stride"}
        if plain and len(node.args) <= 3:
            return _compose(pair, (_pool(kernel, stride, 2), 0.0))
    return None


def hessian_bound(model: nn.Module, *, with_loss: bool = False, nominal: bool = False) -> Bound:
    """Bound slope and Hessian norm of the network for every input (ours, not the paper's).

    For a block F let l = sup ||J_F|| and h = sup ||D^2F[u, v]|| over unit u, v. A linear map has
    (sigma, 0), the centered softplus (1, beta/4), a Lipschitz batch norm (min(l, Gamma), 0); then
    h(G o F) = h_G l_F^2 + l_G h_F, sums add, concatenations add squares. The network is taken in evaluation
    mode. For one logit the Hessian norm is at most ``hessian``; for its cross-entropy, with ``with_loss``, at
    most l^2/2 + sqrt(2) h.

    Args:
        model: a network that ``torch.fx`` can trace.
        with_loss: bound the cross-entropy of the outputs instead of the outputs.
        nominal: take normalised layers at the norm they are meant to have (cheap and differentiable, for
            training, not provable); otherwise convolutions count with an upper bound of their norm.

    Returns:
        Differentiable scalars, infinite where a layer has a kink or is not known; ``unbounded`` names it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), CenteredSoftplus(4.0))
        >>> with torch.no_grad(): _ = net[0].weight.copy_(2 * torch.eye(2))
        >>> round(hessian_bound(net).hessian.item(), 4)  # (4 / 4) * 2^2
        4.0
    """
    per_module: dict[str, tuple[float, float]] = {}
    unbounded: list[str] = []
    like = next(model.parameters(), torch.zeros(()))
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # noqa: BLE001 - whatever the user's forward does with a proxy
        infinite = like.new_tensor(math.inf)
        return Bound(infinite, infinite, {}, [f"the graph (torch.fx: {error})"])
    values: dict[fx.Node, Any] = {}
    first = True
    for node in graph.nodes:
        args = [_lookup(a, values) for a in (*node.args, *node.kwargs.values())]
        args = [b for a in args for b in (a if isinstance(a, list) else [a])]
        pairs = [a for a in args if isinstance(a, tuple)]
        if node.op == "placeholder":
            values[node], first = ((1.0, 0.0) if first else None), False
        elif node.op == "output":
            last = pairs[0] if len(pairs) == 1 else (math.inf, math.inf)
        elif not pairs or node.target in ("size", "dim", getattr) or node.op == "get_attr":
            values[node] = None
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            own = _module(module, nominal)
            if own is None:
                own = (math.inf, math.inf)
            per_module[str(node.target)] = (_number(own[0]), _number(own[1]))
            if not all(math.isfinite(_number(v)) for v in own):
                unbounded.append(f"{node.target} ({type(module).__name__})")
            values[node] = _compose(pairs[0], own)
        elif node.target is operator.getitem and _plain_index(node.args[1]):
            values[node] = pairs[0]
        else:
            value = _call(node, args)
            before = all(math.isfinite(_number(v)) for pair in pairs for v in pair)
            if before and not (value and all(math.isfinite(_number(v)) for v in value)):
                unbounded.append(f"{node.name} ({node.target})")
            values[node] = (math.inf, math.inf) if value is None else value
    slope, curve = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in last)
    if with_loss:
        slope, curve = math.sqrt(2) * slope, slope.square() / 2 + math.sqrt(2) * curve
    return Bound(slope, curve.nan_to_num(nan=math.inf, posinf=math.inf), per_module, unbounded)


def _lookup(arg: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(arg, fx.Node):
        return values.get(arg)
    if isinstance(arg, (list, tuple)):
        return [_lookup(a, values) for a in arg]
    return None
