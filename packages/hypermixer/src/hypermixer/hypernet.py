"""The hypernetwork: one small MLP per head that generates a row of mixing weights for each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hypermixer.functional import Activation, generate

GAIN = math.sqrt(2.0)
INITS = ("reference", "xavier")


def project_heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply one linear map per head to its slice of the features, all heads in one product.

    Args:
        x: (B, N, H·f).
        weight: (H, o, f).
        bias: (H, o) or None.

    Returns:
        (H, B, N, o), head-major.
    """
    batch, length, _ = x.shape
    heads, out, width = weight.shape
    flat = x.reshape(batch * length, heads, width).transpose(0, 1)
    turned = weight.transpose(1, 2)
    y = torch.bmm(flat, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), flat, turned)
    return y.view(heads, batch, length, out)


def init_bound(shape: tuple[int, ...], init: str) -> float:
    """Return a of the uniform distribution U(−a, a) that a stacked parameter starts from.

    "reference" is what the authors' code does: xavier_uniform_ with gain √2 on the stacked tensor
    (H, out, in), whose fans torch counts as out·in and H·in, hence a = √2·√(6 / (in·(out + H))); for
    a bias (H, out), a = √2·√(6 / (out + H)). "xavier" is Xavier-uniform of each head's matrix,
    a = √2·√(6 / (in + out)), and zero for biases.
    """
    if init == "xavier":
        return GAIN * math.sqrt(6.0 / (shape[1] + shape[2])) if len(shape) == 3 else 0.0
    fan = shape[1] + shape[0]
    return GAIN * math.sqrt(6.0 / (fan * shape[2] if len(shape) == 3 else fan))


class Hypernet(nn.Module):
    """MLP(x̃) = U σ(F x̃ + a) + c for every head, x̃ (B, N, d) → W (B, H, N, k).

    Args:
        num_heads: H.
        width: f, features that a head sees.
        hidden: h, hidden units of a head.
        out: k, generated weights of a token in a head.
        bias: whether a and c exist.
        activation: σ.
        init: "reference" or "xavier"; see :func:`init_bound`.
        device: of the parameters.
        dtype: of the parameters.
    """

    fc1_bias: nn.Parameter | None
    fc2_bias: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        width: int,
        hidden: int,
        out: int,
        *,
        bias: bool,
        activation: Activation,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.fc1_weight = parameter(num_heads, hidden, width)
        self.fc2_weight = parameter(num_heads, out, hidden)
        self.register_parameter("fc1_bias", parameter(num_heads, hidden) if bias else None)
        self.register_parameter("fc2_bias", parameter(num_heads, out) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                bound = init_bound(tuple(parameter.shape), self.init)
                parameter.uniform_(-bound, bound)

    def hidden(self, x: Tensor) -> Tensor:
        """Return G = σ(F x̃ + a) (H, B, N, h), head-major."""
        return self.activation(project_heads(x, self.fc1_weight, self.fc1_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return the generated weights W (B, H, N, k)."""
        return generate(self.hidden(x), self.fc2_weight, self.fc2_bias).transpose(0, 1)
