"""Back to plain layers: what the network computes in evaluation, without the method's machinery."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.norm import LipschitzBatchNormAct2d, LipschitzNorm, LipschitzSyncBatchNorm
from lcnn.core.parametrize import refresh

__all__ = ["FixedSoftplus", "load_pretrained", "restore"]


class FixedSoftplus(nn.Module):
    """Centered softplus with a constant beta in two exportable operations: softplus(x) - log(2) / beta.

    Example:
        >>> FixedSoftplus(torch.tensor(2.0))(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    beta: Tensor

    def __init__(self, beta: Tensor) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__()
        self.register_buffer("beta", beta.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise, in the stable form."""
        beta = self.beta.to(x.dtype)
        beta = beta if beta.dim() == 0 else beta.view(-1, *[1] * (x.dim() - 2))
        return x.clamp_min(0) + torch.log1p(torch.expm1(-(x * beta).abs()) * 0.5) / beta


def _plain_norm(norm: LipschitzNorm) -> nn.Module:
    kind: type[Any] = nn.SyncBatchNorm
    if not isinstance(norm, LipschitzSyncBatchNorm):
        kinds: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        kind = next(k for k in kinds if isinstance(norm, k))
    assert norm.running_mean is not None
    made = kind(norm.num_features, norm.eps, norm.momentum).to(norm.running_mean)
    scale = torch.minimum(
        norm.lipschitz * norm._inverse_slope(norm.running_var), norm.lipschitz.new_ones(())
    )
    weight = scale if norm.weight is None else scale * norm.weight
    made.weight.data.copy_(weight.expand(norm.num_features))
    if norm.bias is not None:
        made.bias.data.copy_(norm.bias)
    made.load_state_dict({**made.state_dict(), **_statistics(norm)})
    made = made.train(norm.training)
    if isinstance(norm, LipschitzBatchNormAct2d):
        return nn.Sequential(made, norm.drop, _plain(norm.act)).train(norm.training)
    plain: nn.Module = made
    return plain


def _statistics(norm: LipschitzNorm) -> dict[str, Tensor]:
    found = {n: norm._buffers[n] for n in ("running_mean", "running_var", "num_batches_tracked")}
    return {name: value for name, value in found.items() if value is not None}


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, CenteredSoftplus):
        if module.channel_dim != 1 and module.log_beta.dim():
            return module
        return FixedSoftplus(module.beta)
    return module


def _bake(module: nn.Module) -> None:
    """Replace a parametrized layer's weights by their values.

    torch's own ``remove_parametrizations`` changes the class, which a deep copy shares with its original.
    """
    parts: Any = module.parametrizations
    parts.eval()  # no power step
    values = {name: part().detach().clone() for name, part in parts.items()}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__mro__[1]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Return a plain network with the same outputs in evaluation mode, for deployment and export.

    Batch norms absorb their factor, normalised weights are baked in, and the activations stay centered
    softplus with constant betas in ordinary operations. ``model`` is not changed.

    Args:
        model: a converted network whose batch norms track running statistics.

    Raises:
        ValueError: where a batch norm has no running statistics.

    Example:
        >>> import lcnn
        >>> net = lcnn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.zeros(1, 1, 6, 6))
        >>> [type(layer).__name__ for layer in restore(net)]
        ['Conv2d', 'BatchNorm2d']
    """
    made = copy.deepcopy(model)
    if hasattr(made, "lcnn_report"):
        del made.lcnn_report
    for module in list(made.modules()):
        if hasattr(module, "parametrizations"):
            _bake(module)
    if isinstance(made, LipschitzNorm):
        return _plain_norm(made)
    if isinstance(made, CenteredSoftplus):
        return _plain(made)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LipschitzNorm):
                if child.running_var is None:
                    raise ValueError(f"{name} tracks no running statistics, and cannot be folded")
                setattr(module, name, _plain_norm(child))
            elif isinstance(child, CenteredSoftplus):
                setattr(module, name, _plain(child))
    return made


def load_pretrained(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Load a checkpoint of the *unconverted* network into its converted form.

    ``weight`` goes to ``parametrizations.weight.original``, the method's own entries keep their values, and
    the operator norms are iterated anew. Follow it by :func:`calibrate`.

    Args:
        model: a converted network.
        state_dict: of the network before the conversion.

    Raises:
        RuntimeError: for entries that are missing, left over or of another shape, by torch's own message.

    Example:
        >>> import lcnn
        >>> plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> made = lcnn.convert(plain, torch.zeros(1, 1, 6, 6))
        >>> _ = load_pretrained(made, plain.state_dict())
    """
    own = model.state_dict()
    mapped = {}
    for key, value in state_dict.items():
        parent, _, last = key.rpartition(".")
        target = ".".join(filter(None, [parent, "parametrizations", last, "original"]))
        mapped[target if target in own else key] = value
    extras = ("log_beta", "log_lipschitz", "_u", "_v", "_sigma")
    for key, value in own.items():
        if key.rpartition(".")[2] in extras:
            mapped.setdefault(key, value)
    model.load_state_dict(mapped)
    with torch.no_grad():
        for module in model.modules():
            for part in getattr(module, "parametrizations", {}).values():
                refresh(part[0], part.original, 100)
    return model
