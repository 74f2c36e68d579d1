"""The thin layer of array operations over which every algorithm is written once."""

from sequel.ops.base import Array, Ops, Tree

__all__ = ["Array", "Ops", "Tree"]
