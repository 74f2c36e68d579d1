"""Networks that exist once for each of G groups, and are trained as one: no Python loop over designs.

Inputs are (M, B, d): M designs, B events each. With G = 1 all designs share a network (amortised); with
G = M every design has its own, in one batched matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "elu": F.elu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by name.

    Example:
        >>> activation("tanh")(torch.zeros(1)).item()
        0.0
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


BROAD = 1e-4  # weight of the broad component in a decoder's mixture


class BatchedMLP(nn.Module):
    """G multilayer perceptrons over several inputs that are concatenated.

    Args:
        inputs: sizes of the inputs; each has its own block of the first layer's weights.
        hidden: sizes of the hidden layers.
        out: size of the output.
        groups: G.
        act: name of the activation.
        final: whether the output is activated, too.
        norm: batch normalisation after each hidden layer's product, as `torch.nn.BatchNorm1d`'s.
        generator: source of the initial weights, uniform in ±1/√fan_in as torch.nn.Linear's.

    Example:
        >>> net = BatchedMLP([2, 3], [8], 1, groups=4)
        >>> net(torch.zeros(4, 10, 2), torch.zeros(4, 1, 3)).shape
        torch.Size([4, 10, 1])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        hidden: Sequence[int],
        out: int,
        *,
        groups: int = 1,
        act: str = "leaky_relu",
        final: bool = False,
        norm: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.groups, self.act, self.final = groups, act, final
        activation(act)
        sizes = [*hidden, out]
        fan_ins = [sum(inputs), *hidden]

        def draw(fan_in: int, *shape: int) -> nn.Parameter:
            values = torch.rand(groups, *shape, generator=generator, dtype=dtype)
            return nn.Parameter((2 * values - 1) / math.sqrt(fan_in))

        self.first = nn.ParameterList([draw(fan_ins[0], size, sizes[0]) for size in inputs])
        self.weights = nn.ParameterList(
            [draw(a, a, b) for a, b in zip(fan_ins[1:], sizes[1:], strict=True)]
        )
        self.biases = nn.ParameterList([draw(a, 1, b) for a, b in zip(fan_ins, sizes, strict=True)])
        self.norms = nn.ModuleList(
            [nn.BatchNorm1d(groups * size, dtype=dtype) for size in hidden] if norm else []
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs (M, B or 1, d_i) to (M, B, out); M is a multiple of the groups."""
        act = ACTIVATIONS[self.act]
        designs = inputs[0].shape[0]
        h: Tensor | None = None
        for part, weight in zip(inputs, self.first, strict=True):
            flat = part.reshape(self.groups, -1, part.shape[-1])
            term = torch.bmm(flat, weight).reshape(designs, part.shape[1], -1)
            h = term if h is None else h + term
        assert h is not None
        rows = h.shape[1]
        h = h.reshape(self.groups, -1, h.shape[-1]) + self.biases[0]
        for i, (weight, bias) in enumerate(zip(self.weights, list(self.biases)[1:], strict=True)):
            h = torch.baddbmm(bias, act(self._normed(h, i)), weight)
        h = act(h) if self.final else h
        return h.reshape(designs, rows, -1)

    def _normed(self, h: Tensor, layer: int) -> Tensor:
        """Normalise (G, rows, H) over the rows."""
        if len(self.norms) == 0:
            return h
        groups, rows, size = h.shape
        flat = self.norms[layer](h.transpose(0, 1).reshape(rows, groups * size))
        out: Tensor = flat.reshape(rows, groups, size).transpose(0, 1)
        return out

    @torch.no_grad()
    def change_input(self, index: int, scale: Tensor, shift: Tensor) -> None:
        """Make the network take u where it took scale * u + shift, as the same function.

        Example:
            >>> net = BatchedMLP([1], [4], 1, dtype=torch.float64)
            >>> before = net(torch.full((1, 1, 1), 7.0, dtype=torch.float64))
            >>> net.change_input(0, torch.tensor([2.0]), torch.tensor([3.0]))
            >>> torch.allclose(net(torch.full((1, 1, 1), 2.0, dtype=torch.float64)), before)
            True
        """
        weight = self.first[index]
        shift, scale = shift.to(weight), scale.to(weight)
        self.biases[0] += (shift[:, None] * weight).sum(1, keepdim=True)
        weight *= scale[:, None]

    @torch.no_grad()
    def change_output(self, scale: Tensor, shift: Tensor) -> None:
        """Make the network return scale * f + shift where it returned f.

        Example:
            >>> net = BatchedMLP([1], [4], 1)
            >>> before = net(torch.ones(1, 1, 1))
            >>> net.change_output(torch.tensor(2.0), torch.tensor(1.0))
            >>> torch.allclose(net(torch.ones(1, 1, 1)), 2 * before + 1)
            True
        """
        self.biases[-1].mul_(scale).add_(shift)
        if len(self.weights) > 0:
            self.weights[-1].mul_(scale)


class JointCritic(nn.Module):
    """T(x, y[, θ]) as one perceptron over the concatenation.

    Example:
        >>> JointCritic(1, 3, 6)(torch.zeros(5, 8, 1), torch.zeros(5, 8, 3), torch.zeros(5, 6)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        dim_theta: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
        groups: int = 1,
        output_activation: str | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = [dim_x, dim_y, *([dim_theta] if dim_theta else [])]
        self.net = BatchedMLP(sizes, hidden, 1, groups=groups, generator=generator, dtype=dtype)
        self.output_activation = output_activation
        if output_activation is not None:
            activation(output_activation)

    def forward(self, x: Tensor, y: Tensor, theta: Tensor | None = None) -> Tensor:
        """Return the scores (M, B) of pairs x (M, B, dx), y (M, B, dy), designs theta (M, F)."""
        parts = (x, y) if theta is None else (x, y, theta[:, None])
        scores: Tensor = self.net(*parts).squeeze(-1)
        if self.output_activation is not None:
            scores = ACTIVATIONS[self.output_activation](scores)
        return scores

    def change_theta(self, scale: Tensor, shift: Tensor) -> None:
        """Re-express the input θ (see `BatchedMLP.change_input`)."""
        if len(self.net.first) == 3:
            self.net.change_input(2, scale, shift)


class PaperCritic(nn.Module):
    """The authors' critic: encoders of x and y (32, 32, 128), of θ (10, 10, 32), and a head of 200.

    `output_activation="tanh"` is the released code; it caps every Donsker–Varadhan estimate at 2 nats.

    Example:
        >>> PaperCritic(1, 3)(torch.zeros(5, 8, 1), torch.zeros(5, 8, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        dim_theta: int = 0,
        *,
        groups: int = 1,
        output_activation: str | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()

        def encoder(size: int, hidden: Sequence[int], out: int) -> BatchedMLP:
            return BatchedMLP(
                [size], hidden, out, groups=groups, final=True, generator=generator, dtype=dtype
            )

        self.encode_x = encoder(dim_x, (32, 32), 128)
        self.encode_y = encoder(dim_y, (32, 32), 128)
        self.encode_theta = encoder(dim_theta, (10, 10), 32) if dim_theta else None
        sizes = [128, 128, *([32] if dim_theta else [])]
        self.head = BatchedMLP(sizes, (200,), 1, groups=groups, generator=generator, dtype=dtype)
        self.output_activation = output_activation
        if output_activation is not None:
            activation(output_activation)

    def forward(self, x: Tensor, y: Tensor, theta: Tensor | None = None) -> Tensor:
        """Return the scores (M, B) of pairs x (M, B, dx), y (M, B, dy), designs theta (M, F)."""
        parts = [self.encode_x(x), self.encode_y(y)]
        if self.encode_theta is not None and theta is not None:
            parts.append(self.encode_theta(theta[:, None]))
        scores: Tensor = self.head(*parts).squeeze(-1)
        if self.output_activation is not None:
            scores = ACTIVATIONS[self.output_activation](scores)
        return scores

    def change_theta(self, scale: Tensor, shift: Tensor) -> None:
        """Re-express the input θ (see `BatchedMLP.change_input`)."""
        if self.encode_theta is not None:
            self.encode_theta.change_input(0, scale, shift)


class Decoder(nn.Module):
    """q(x | y, θ): a mixture of Gaussians with diagonal covariance, or a categorical distribution.

    Args:
        components: Gaussians in the mixture, beside a fixed one of width 2 and weight 1e-4.
        classes: where positive, x is one label 0 .. classes−1 and q is categorical.

    Example:
        >>> Decoder(2, 3)(torch.zeros(5, 8, 2), torch.zeros(5, 8, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        dim_theta: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
        groups: int = 1,
        components: int = 1,
        classes: int = 0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = [dim_y, *([dim_theta] if dim_theta else [])]
        self.dim_x, self.components, self.classes = dim_x, components, classes
        out = classes or components * (1 + 2 * dim_x)
        self.net = BatchedMLP(sizes, hidden, out, groups=groups, generator=generator, dtype=dtype)
        # the linear part of the mean, so that the network only learns the rest
        self.linear = BatchedMLP(
            sizes, (), classes or dim_x, groups=groups, generator=generator, dtype=dtype
        )

    def forward(self, x: Tensor, y: Tensor, theta: Tensor | None = None) -> Tensor:
        """Return log q (M, B) of x (M, B, dx) given y (M, B, dy) and theta (M, F)."""
        parts = (y,) if theta is None else (y, theta[:, None])
        raw, linear = self.net(*parts), self.linear(*parts)
        if self.classes:
            return torch.log_softmax(raw + linear, -1).gather(-1, x.long()).squeeze(-1)
        shape = (*raw.shape[:-1], self.components, self.dim_x)
        weight = torch.log_softmax(raw[..., : self.components], -1)
        mean, log_scale = raw[..., self.components :].reshape(*shape[:-1], -1).chunk(2, -1)
        mean = mean + linear[..., None, :]
        log_scale = log_scale.clamp(-9, 5)
        z = (x[..., None, :] - mean) * torch.exp(-log_scale)
        density = -(z.square() / 2 + log_scale + math.log(2 * math.pi) / 2).sum(-1)
        mixture = torch.logsumexp(weight + density, -1)
        # a little of a fixed broad Gaussian: one event in a far tail cannot ruin a held-out mean
        broad = -(x.square() / 8 + math.log(8 * math.pi) / 2).sum(-1)
        return torch.logaddexp(mixture + math.log1p(-BROAD), broad + math.log(BROAD))

    def change_theta(self, scale: Tensor, shift: Tensor) -> None:
        """Re-express the input θ (see `BatchedMLP.change_input`)."""
        for net in (self.net, self.linear):
            if len(net.first) == 2:
                net.change_input(1, scale, shift)


class Reconstruction(nn.Module):
    """x̂ = r(y, θ), a perceptron with a linear shortcut; `gated` is AIDO's network with a gate g(θ) on y.

    Example:
        >>> Reconstruction(1, 3, 6)(torch.zeros(5, 8, 3), torch.zeros(5, 6)).shape
        torch.Size([5, 8, 1])
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        dim_theta: int,
        *,
        hidden: Sequence[int] = (64, 64),
        groups: int = 1,
        gated: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = [dim_y, dim_theta]
        hidden = (100, 100, 100) if gated else hidden
        act = "elu" if gated else "leaky_relu"

        def build(inputs: Sequence[int], hidden: Sequence[int], out: int) -> BatchedMLP:
            return BatchedMLP(
                inputs, hidden, out, groups=groups, act=act, generator=generator, dtype=dtype
            )

        self.gate = build([dim_theta], (100, 100), dim_y) if gated else None
        self.net = build(sizes, hidden, dim_x)
        self.linear = None if gated else build(sizes, (), dim_x)

    def forward(self, y: Tensor, theta: Tensor) -> Tensor:
        """Return x̂ (M, B, dx) from y (M, B, dy) and theta (M, F)."""
        design = theta[:, None]
        if self.gate is not None:
            y = F.relu(self.gate(design)) * y
        out: Tensor = self.net(y, design)
        return out if self.linear is None else out + self.linear(y, design)

    def change_theta(self, scale: Tensor, shift: Tensor) -> None:
        """Re-express the input θ (see `BatchedMLP.change_input`)."""
        self.net.change_input(1, scale, shift)
        if self.linear is not None:
            self.linear.change_input(1, scale, shift)
        if self.gate is not None:
            self.gate.change_input(0, scale, shift)
