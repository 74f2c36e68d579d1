"""Exact and classical solvers, the ground truth and the baselines of the network.

The public functions take batched clouds as :func:`deepemd.match` does and return its
:class:`~deepemd.EMDOutput`; the modules underneath hold the algorithms.
"""

from deepemd.solvers.public import auction, chamfer, exact, sinkhorn, sliced

__all__ = ["auction", "chamfer", "exact", "sinkhorn", "sliced"]
