"""Pareto HyperNetworks (PHN): a network from λ to all weights (Navon et al., 2021)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["PHN"]


class PHN(nn.Module):
    """A multi-layer perceptron that writes every parameter of a target model; linear solver.

    Args:
        model: the target, copied; its parameters only give shapes and the initial values.
        tasks: T.
        hidden: width of the hypernetwork; 100 in the original.
    """

    takes_preference = True

    def __init__(self, model: nn.Module, tasks: int, hidden: int = 100) -> None:
        """Build the hypernetwork; its output starts near the target's own initial weights."""
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(tasks, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.heads = nn.ModuleList()
        self.names: list[str] = []
        self.shapes = []
        for name, parameter in model.named_parameters():
            head = nn.Linear(hidden, parameter.numel())
            head.weight.data.mul_(0.1)
            head.bias.data.copy_(parameter.detach().flatten())
            self.heads.append(head)
            self.names.append(name)
            self.shapes.append(parameter.shape)
        self.target = copy.deepcopy(model)
        _drop_parameters(self.target)

    def forward(self, lam: Tensor, *inputs: Any, **kw: Any) -> Any:
        """Generate the weights for λ and run the target with them."""
        first = next(self.trunk.parameters())
        features = self.trunk(lam.to(first))
        weights = {
            name: head(features).view(shape)
            for name, head, shape in zip(self.names, self.heads, self.shapes, strict=True)
        }
        return functional_call(self.target, weights, inputs, kw)


def _drop_parameters(model: nn.Module) -> None:
    """Leave the slots of the generated weights, and the module's own buffers and mode."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach(), persistent=False)
