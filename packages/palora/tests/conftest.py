from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def _mend_torchvision() -> torch.library.Library | None:
    """Declare two operators that the public index's torchvision wants at import beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_LIB = _mend_torchvision()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every adapter random values, so that λ matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("palora_A", "palora_B"):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * values)
    return model


def naive_weight(layer: nn.Module, lam: Tensor) -> Tensor:
    """W + s Σ λ_t B_t A_t by a loop over the tasks, in float64 and by index where reshaped."""
    spec = layer._palora_spec
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    total = weight.detach().double().clone()
    for t in range(len(lam)):
        A, B = layer.palora_A[t].detach().double(), layer.palora_B[t].detach().double()
        if spec.mode == "split":
            r, e = spec.rank, spec.cols
            delta = torch.cat([B[i * e : (i + 1) * e] @ A[i * r : (i + 1) * r] for i in range(3)])
        else:
            delta = B @ A
        if spec.transposed:
            delta = delta.t()
        total = total + spec.scale * float(lam[t]) * delta.reshape(weight.shape)
    return total


def close(a: Tensor, b: Tensor, rtol: float = 1e-12) -> None:
    """Equal to ``rtol`` of the largest entry: what rounding of a sum of such terms allows."""
    scale = max(float(b.detach().abs().max()), 1e-300) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * max(scale, 1.0))
