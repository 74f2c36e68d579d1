"""Plug-in objects for a PyTorch loop of your own."""

from sequel.torch.plugins import AGEM, EWC, MAS, SI, Penalty

__all__ = ["AGEM", "EWC", "MAS", "SI", "Penalty"]
