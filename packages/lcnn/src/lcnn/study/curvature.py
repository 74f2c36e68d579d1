"""Per-sample gradient norm, Hessian norm and normalised curvature with respect to the input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lcnn.core.penalty import cross_entropy, per_sample, refuse_compiled

__all__ = ["CurvatureResult", "curvature", "gradient_stability"]

Fn = Literal["loss", "logit"] | Callable[[Tensor, Any], Tensor]
Method = Literal["power", "lanczos", "exact"]
LIMIT = 4096
EPSILON = 1e-6  # of the normalised curvature, as in the authors' code


@dataclass
class CurvatureResult:
    """One number per sample each, (batch,).

    ``curvature`` is ``hessian_norm / (grad_norm + 1e-6)``; ``residual`` is the distance ||H u - (u.Hu) u|| of the
    last unit vector to an eigenvector (0 for the exact method); ``products`` counts Hessian-vector products.
    """

    grad_norm: Tensor
    hessian_norm: Tensor
    curvature: Tensor
    residual: Tensor
    products: int = 0


def _flat_norm(v: Tensor) -> Tensor:
    norm: Tensor = v.flatten(1).norm(dim=1)
    return norm


def _scaled(v: Tensor, factor: Tensor) -> Tensor:
    return v * factor.view(-1, *[1] * (v.dim() - 1))


def check_eval(model: Any, allow_train: bool) -> None:
    """Raise RuntimeError where nothing can be measured; warn of ReLU."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("inference mode records no gradient: use torch.no_grad(), or neither")
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    busy = [m for m in modules if m.training and isinstance(m, (_BatchNorm, _DropoutNd))]
    if busy and not allow_train:
        raise RuntimeError(
            f"the model is in training mode and has {type(busy[0]).__name__}, so samples depend on each "
            "other: call model.eval() first, or pass allow_train=True"
        )
    if any(isinstance(m, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)) for m in modules):
        warnings.warn(
            "the model has ReLU: its Hessian is zero almost everywhere; convert first",
            UserWarning,
            stacklevel=3,
        )


def _grad(out: Tensor, x: Tensor, seed: Tensor | None = None, **options: bool) -> Tensor | None:
    """One gradient; None where ``out`` does not depend on ``x``."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        out, x, seed, allow_unused=True, **options
    )
    return found[0]


class _Probe:
    """f, its gradient and Hessian-vector products on one batch; one graph for all products."""

    def __init__(self, model: Any, x: Tensor, y: Any, fn: Fn) -> None:
        self.x = x.detach().clone().requires_grad_()
        outputs = model(self.x)
        if callable(fn):
            values = fn(outputs, y)
        elif fn == "loss":
            if y is None:
                raise ValueError("fn='loss' needs y, the labels")
            values = cross_entropy(outputs, y)
        elif fn == "logit":
            index = outputs.argmax(1) if y is None else y
            values = outputs.gather(1, index[:, None])[:, 0]
        else:
            raise ValueError(f"fn must be 'loss', 'logit' or a function, got {fn!r}")
        self.values = per_sample(values, x.shape[0])
        self.g = torch.zeros_like(self.x)
        if values.requires_grad:
            g: Tensor | None = _grad(values.sum(), self.x, create_graph=True)
            self.g = self.g if g is None else g
        self.products = 0

    def hvp(self, u: Tensor) -> Tensor:
        """H u for every sample."""
        self.products += 1
        if not self.g.requires_grad:
            return torch.zeros_like(u)
        w = _grad(self.g, self.x, u, retain_graph=True)
        return torch.zeros_like(u) if w is None else w

    def hessian(self, rows: int) -> Tensor:
        """Return the Hessians, (batch, D, D), ``rows`` basis vectors at a time."""
        batch, size = self.x.shape[0], self.x[0].numel()
        eye = torch.eye(size, dtype=self.x.dtype, device=self.x.device)
        if not self.g.requires_grad:
            return eye.new_zeros(batch, size, size)
        parts = []
        for block in eye.split(rows):
            seeds = block.view(-1, 1, *self.x.shape[1:]).expand(-1, *self.x.shape)
            w = _grad(self.g, self.x, seeds, retain_graph=True, is_grads_batched=True)
            parts.append(seeds.new_zeros(seeds.shape) if w is None else w)
        self.products += size
        return torch.cat(parts).flatten(2).transpose(0, 1)


def _power(probe: _Probe, u: Tensor, iters: int, tol: float | None) -> tuple[Tensor, Tensor]:
    last = torch.zeros(u.shape[0], dtype=u.dtype, device=u.device)
    w = u
    for _ in range(iters):
        w = probe.hvp(u)
        norm = _flat_norm(w)
        if tol is not None and bool((norm - last <= tol * norm).all()):
            last = norm
            break
        last = norm
        safe = norm.clamp_min(torch.finfo(u.dtype).tiny)
        nonzero = (norm > 0).view(-1, *[1] * (u.dim() - 1))
        previous, u = u, torch.where(nonzero, _scaled(w, 1 / safe), u)
    else:
        u = previous
    rayleigh = (u * w).flatten(1).sum(1)
    return last, _flat_norm(w - _scaled(u, rayleigh))


def _lanczos(probe: _Probe, u: Tensor, iters: int, tol: float | None) -> tuple[Tensor, Tensor]:
    """Largest |Ritz value|, with full reorthogonalisation; exact after D products."""
    shape, batch = u.shape, u.shape[0]
    q = u.flatten(1)
    basis = [q]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    top = residual = torch.zeros(batch, dtype=u.dtype, device=u.device)
    for _ in range(min(iters, q.shape[1])):
        w = probe.hvp(q.view(shape)).flatten(1)
        alphas.append((q * w).sum(1))
        stack = torch.stack(basis, 1)  # (batch, k, D)
        for _ in range(2):
            w = w - torch.einsum("bkd,bk->bd", stack, torch.einsum("bkd,bd->bk", stack, w))
        beta = w.norm(dim=1)
        diagonal, off = torch.stack(alphas, 1), torch.stack([*betas, beta], 1)[:, :-1]
        matrix = torch.diag_embed(diagonal)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        values, vectors = torch.linalg.eigh(matrix.nan_to_num())
        index = values.abs().argmax(1, keepdim=True)
        top = torch.where(diagonal.isnan().any(1), torch.nan, values.gather(1, index)[:, 0].abs())
        end = vectors[:, -1].gather(1, index)[:, 0].abs()
        # a vanishing beta has found an invariant subspace: go on from nothing, and add nothing
        done = beta <= 10 * torch.finfo(u.dtype).eps * top.clamp_min(torch.finfo(u.dtype).tiny)
        beta = torch.where(done, 0.0, beta)
        residual = beta * end
        if bool((residual <= (tol or 0.0) * top).all()):
            break
        betas.append(beta)
        q = torch.where(done[:, None], 0.0, w / beta.clamp_min(torch.finfo(u.dtype).tiny)[:, None])
        basis.append(q)
    return top, residual


def _exact(probe: _Probe) -> tuple[Tensor, Tensor]:
    size = probe.x[0].numel()
    if size > LIMIT:
        raise ValueError(f"method='exact' takes inputs of at most {LIMIT} elements, got {size}")
    h = probe.hessian(max(1, min(size, 2**22 // probe.x.numel() or 1)))
    h = (h + h.mT) / 2
    bad = h.isnan().flatten(1).any(1)
    top = torch.linalg.eigvalsh(h.nan_to_num()).abs().amax(1)
    return torch.where(bad, torch.nan, top), torch.zeros_like(top)


def curvature(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Any = None,
    *,
    fn: Fn = "loss",
    method: Method = "power",
    iters: int = 20,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
    allow_train: bool = False,
    allow_low_precision: bool = False,
) -> CurvatureResult:
    """Measure C_f(x) = ||H|| / (||grad|| + 1e-6) for every sample (paper, Section 3).

    Args:
        model: in evaluation mode.
        x: (batch, ...).
        y: labels, (batch,); what ``fn`` needs.
        fn: ``"loss"``: cross-entropy of ``y``; ``"logit"``: the logit of ``y``, of the prediction without it;
            or a function (outputs, y) -> (batch,).
        method: ``"power"``: ||H u|| after ``iters`` products, a lower limit that never falls and that a pair of
            eigenvalues +a, -a does not mislead. ``"lanczos"``: the largest absolute Ritz value, as good with
            far fewer products. ``"exact"``: all of H, for inputs of at most 4,096 elements.
        iters: products at most.
        tol: stop when the relative change (power) or residual (Lanczos) of all samples is below it.
        generator: of the start vectors; default: a fixed seed.
        chunk: samples at a time, to bound memory.
        allow_train: measure in training mode anyway.
        allow_low_precision: keep autocast on; it is switched off otherwise.

    Raises:
        ValueError: for an empty batch, an unknown option, no labels, or a loss that is not per sample.
        RuntimeError: for a model in training mode, or a compiled one, or under inference mode.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, -3.0]))
        >>> r = curvature(lambda x: x @ a, torch.eye(2), fn=lambda out, y: (out * out).sum(1) / 2)
        >>> r.hessian_norm.round(decimals=3)
        tensor([9., 9.])
    """
    if x.shape[0] == 0:
        raise ValueError("x is an empty batch")
    if method not in ("power", "lanczos", "exact"):
        raise ValueError(f"method must be 'power', 'lanczos' or 'exact', got {method!r}")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk!r}")
    refuse_compiled(model, "curvature")
    check_eval(model, allow_train)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    parts = []
    size = x.shape[0] if chunk is None else chunk
    on = allow_low_precision and torch.is_autocast_enabled(x.device.type)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=on):
        for start in range(0, x.shape[0], size):
            xs = x[start : start + size]
            ys = y[start : start + size] if isinstance(y, Tensor) else y
            probe = _Probe(model, xs, ys, fn)
            u = torch.randn(xs.shape, dtype=xs.dtype, device=xs.device, generator=generator)
            u = _scaled(u, 1 / _flat_norm(u))
            if method == "exact":
                top, residual = _exact(probe)
            else:
                top, residual = (_power if method == "power" else _lanczos)(probe, u, iters, tol)
            slope = _flat_norm(probe.g.detach())
            parts.append(
                CurvatureResult(slope, top, top / (slope + EPSILON), residual, probe.products)
            )
    names = [f.name for f in fields(CurvatureResult) if f.name != "products"]
    joined = {name: torch.cat([getattr(p, name).detach() for p in parts]) for name in names}
    return CurvatureResult(**joined, products=sum(p.products for p in parts))


def gradient_stability(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Any,
    radii: list[float],
    *,
    n_samples: int = 8,
    fn: Fn = "loss",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of ||grad f(x + e) - grad f(x)|| / ||grad f(x)|| over random e of each length.

    With C_f <= c along the segments it is at most exp(c ||e||) - 1 (Section 3.2).

    Args:
        model: in evaluation mode.
        x: (batch, ...).
        y: labels.
        radii: lengths of e.
        n_samples: directions for each.
        fn: as in :func:`curvature`.
        generator: of the directions; default: a fixed seed.

    Returns:
        (len(radii), batch).

    Example:
        >>> gradient_stability(nn.Linear(2, 2), torch.zeros(3, 2), torch.tensor([0, 1, 0]), [0.0]).amax().item()
        0.0
    """
    if x.shape[0] == 0:
        raise ValueError("x is an empty batch")
    check_eval(model, False)
    generator = generator or torch.Generator(x.device).manual_seed(0)

    def gradient(points: Tensor) -> Tensor:
        with torch.enable_grad():
            return _Probe(model, points, y, fn).g.detach()

    base = gradient(x)
    scale = _flat_norm(base).clamp_min(torch.finfo(x.dtype).tiny)
    out = torch.zeros(len(radii), x.shape[0], dtype=x.dtype, device=x.device)
    for _ in range(n_samples):
        e = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        e = _scaled(e, 1 / _flat_norm(e))
        for i, radius in enumerate(radii):
            out[i] += _flat_norm(gradient(x + radius * e) - base) / scale / n_samples
    return out
