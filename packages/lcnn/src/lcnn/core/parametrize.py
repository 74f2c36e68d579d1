"""Spectral normalisation of convolutions by their true operator norm, as a parametrization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from lcnn.core.activation import in_backward, positive
from lcnn.core.operator import ConvMap, start_vector, unit

__all__ = ["ConvSpectralNorm", "conv_spectral_norm", "linear_spectral_norm"]

CONVS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class ConvSpectralNorm(nn.Module):
    """W -> W target / sigma(W), sigma from one power step per training forward (Section 4.3).

    In evaluation without gradients the result is kept until the weight, a buffer or the mode changes. Writes
    through ``weight.data`` are not seen: call ``train()`` or ``eval()`` after them.
    """

    _u: Tensor
    _v: Tensor
    _sigma: Tensor

    def __init__(
        self,
        weight: Tensor,
        conv: ConvMap,
        *,
        n_power_iterations: int = 1,
        init_iterations: int = 15,
        target: float = 1.0,
        mode: Literal["normalize", "clip"] = "normalize",
        eps: float = 1e-12,
    ) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__()
        self.conv = conv
        self.n_power_iterations = n_power_iterations
        self.target = target
        self.mode = mode
        self.eps = eps
        self._kept: tuple[Tensor, tuple[Any, ...]] | None = None
        source, image = conv.shapes(weight)
        self.register_buffer("_u", start_vector(image, weight.detach()))
        self.register_buffer("_v", start_vector(source, weight.detach()))
        self.register_buffer("_sigma", torch.zeros((), dtype=weight.dtype, device=weight.device))
        self.power_step(weight, init_iterations)

    @torch.no_grad()
    def power_step(self, weight: Tensor, count: int) -> None:
        """Run ``count`` power iterations in place; sigma and both vectors are the buffers."""
        u, v = self._u, self._v
        for _ in range(count):
            v = unit(self.conv.adjoint(weight, u), self.eps)
            u = unit(self.conv.forward(weight, v), self.eps)
        self._u.copy_(u)
        self._v.copy_(v)

    def sigma(self, weight: Tensor) -> Tensor:
        """Return <u, A_W v>, whose gradient is that of the norm with u and v held fixed."""
        u, v = self._u.clone(), self._v.clone()  # a later step must not touch what backward needs
        return (u * self.conv.forward(weight, v)).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the convolution uses."""
        if self._keeps(weight):
            key = self._state(weight)
            if self._kept is None or self._kept[1] != (*key, self._kept[0]._version):
                with torch.inference_mode(False), torch.no_grad():
                    made = self._normalised(weight)
                self._kept = made, (*key, made._version)
            return self._kept[0]
        if self.training and not in_backward():
            with torch.autocast(weight.device.type, enabled=False):
                self.power_step(weight.detach(), self.n_power_iterations)
                with torch.no_grad():
                    self._sigma.copy_(self.sigma(weight))
        return self._normalised(weight)

    def _normalised(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = self.sigma(weight)
            factor = self.target / sigma.clamp_min(self.eps)
            if self.mode == "clip":
                factor = factor.clamp_max(1.0)
            return weight * torch.where(sigma < self.eps, torch.ones_like(factor), factor)

    def _keeps(self, weight: Tensor) -> bool:
        """Tell whether the result of an earlier evaluation may serve."""
        graph = torch.is_grad_enabled() and weight.requires_grad
        if self.training or graph or torch.compiler.is_compiling():
            return False
        plain = type(weight) in (Tensor, nn.Parameter)
        return plain and not (
            weight.is_inference()
            or self._u.is_inference()
            or torch._C._functorch.is_functorch_wrapped_tensor(weight)
        )

    def _state(self, weight: Tensor) -> tuple[Any, ...]:
        tensors = (weight, self._u, self._v)
        return tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)

    def train(self, mode: bool = True) -> ConvSpectralNorm:
        """Set the mode, and forget the kept weight."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> ConvSpectralNorm:
        self._kept = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept weight out of copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Show the sizes that the norm belongs to."""
        return f"size={self.conv.big}, target={self.target:.4g}, mode={self.mode!r}"


def _rebuild(
    kind: type[nn.Module], state: dict[str, Any], name: str, original: Tensor, parts: Any
) -> nn.Module:
    module = kind.__new__(kind)
    module.__dict__.update(state)
    module.register_parameter(name, nn.Parameter(original, original.requires_grad))
    for part in parts:
        parametrize.register_parametrization(module, name, part, unsafe=True)
    return pickles(module)


def _reduce(module: Any, protocol: int) -> Any:
    """Pickle a parametrized layer as the plain one and its parametrizations."""
    state = {**module.__dict__, "_modules": dict(module._modules)}
    parametrizations = state["_modules"].pop("parametrizations")["weight"]
    original = parametrizations.original.detach().requires_grad_(
        parametrizations.original.requires_grad
    )
    kind = type(module).__mro__[1]
    return _rebuild, (kind, state, "weight", original, list(parametrizations))


def pickles(module: nn.Module) -> nn.Module:
    """Let a layer with a parametrized weight be pickled, which torch by itself refuses."""
    kind: Any = type(module)
    kind.__reduce_ex__ = _reduce
    return module


def conv_spectral_norm(
    conv: nn.Module,
    input_size: Sequence[int],
    *,
    n_power_iterations: int = 1,
    init_iterations: int = 15,
    target: float = 1.0,
    mode: Literal["normalize", "clip"] = "normalize",
    eps: float = 1e-12,
) -> nn.Module:
    """Divide a convolution's weight by the norm of the linear map that it is (Section 4.3).

    ``torch.nn.utils.parametrizations.spectral_norm`` divides by the norm of the reshaped weight, which can
    be smaller than the operator's by up to sqrt(kh kw). The gradient flows through the norm.

    Args:
        conv: ``nn.Conv1d/2d/3d`` or ``nn.ConvTranspose1d/2d/3d``, changed in place; any stride, padding,
            padding mode, dilation, groups.
        input_size: spatial size of the layer's input.
        n_power_iterations: per training forward; none in evaluation. Default 1.
        init_iterations: at registration. Default 15.
        target: the norm wanted. Default 1.
        mode: ``"normalize"`` always, or ``"clip"`` only where the norm exceeds ``target``.
        eps: below it a weight counts as zero and stays as it is.

    Returns:
        ``conv``; its weight is ``conv.parametrizations.weight.original`` now.

    Raises:
        TypeError: for another kind of module, or a weight that is already parametrized.
        ValueError: for a size that does not fit or a target that is not positive.

    Example:
        >>> conv = conv_spectral_norm(torch.nn.Conv2d(3, 5, 3, padding=1), (8, 8))
        >>> sorted(name for name, _ in conv.named_buffers())[0]
        'parametrizations.weight.0._sigma'
    """
    if not isinstance(conv, CONVS):
        raise TypeError(f"conv_spectral_norm takes nn.Conv* modules, got {type(conv).__name__}")
    if not computes_as(conv, CONVS):
        raise TypeError(f"{type(conv).__name__} has a forward of its own: its norm is not known")
    if n_power_iterations < 0 or init_iterations < 1:
        raise ValueError(
            "n_power_iterations must be at least 0 and init_iterations at least 1, got "
            f"{n_power_iterations!r} and {init_iterations!r}"
        )
    check_free(conv)
    if mode not in ("normalize", "clip"):
        raise ValueError(f"mode must be 'normalize' or 'clip', got {mode!r}")
    part = ConvSpectralNorm(
        conv.weight,
        ConvMap.of(conv, input_size),
        n_power_iterations=n_power_iterations,
        init_iterations=init_iterations,
        target=positive("target", target),
        mode=mode,
        eps=eps,
    ).train(conv.training)
    parametrize.register_parametrization(conv, "weight", part, unsafe=True)
    return pickles(conv)


def refresh(part: Any, weight: Tensor, count: int) -> None:
    """Iterate a spectral norm, ours or torch's, ``count`` times."""
    if isinstance(part, ConvSpectralNorm):
        part.power_step(weight, count)
    elif hasattr(part, "_power_method"):
        part._power_method(part._reshape_weight_to_matrix(weight), count)


def computes_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Tell whether a layer, perhaps of a subclass, computes what one of torch's own ``kinds`` computes."""
    own: Any = type(module)
    names = ("forward", "_conv_forward")
    return any(
        isinstance(module, kind)
        and all(getattr(own, n, None) is getattr(kind, n, None) for n in names)
        for kind in kinds
    )


def is_normalized(module: nn.Module) -> bool:
    """Tell whether this package has parametrized a layer."""
    return vars(type(module)).get("__reduce_ex__") is _reduce


def check_free(module: nn.Module, name: str = "") -> None:
    """Raise TypeError where the weight is lazy, quantised, or already parametrized."""
    label = f"{name or 'module'} ({type(module).__name__})"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        if module.has_uninitialized_params():
            raise TypeError(f"{label} is lazy: run one forward pass before the conversion")
    elif "quantized" in type(module).__module__:
        raise TypeError(f"{label} is quantised: convert the float model first")
    if parametrize.is_parametrized(module, "weight") or hasattr(module, "weight_g"):
        raise TypeError(
            f"{label} already has a parametrized weight or weight_norm: remove it first"
        )


class MatrixSpectralNorm(_SpectralNorm):
    """torch's own, without a second power step where a checkpointed forward runs again."""

    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        if not in_backward():
            super()._power_method(weight_mat, n_power_iterations)


def linear_spectral_norm(linear: nn.Module) -> nn.Module:
    """Apply torch's own matrix spectral norm, in place, in a form that can be pickled.

    Example:
        >>> layer = linear_spectral_norm(torch.nn.Linear(3, 2)).eval()
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        1.0
    """
    check_free(linear)
    made: Any = spectral_norm(linear)
    made.parametrizations.weight[0].__class__ = MatrixSpectralNorm
    return pickles(made)
