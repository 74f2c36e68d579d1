"""A small zoo of networks, the same in both backends; ``sequel.nn.jax`` is imported only on demand."""

from sequel.nn.convert import params_to_jax, params_to_torch, to_jax
from sequel.nn.torch import CNN, MLP

__all__ = ["CNN", "MLP", "params_to_jax", "params_to_torch", "to_jax"]
