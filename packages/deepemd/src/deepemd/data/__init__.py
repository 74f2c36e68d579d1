"""Shapes, pairs, exact labels, shards and readers."""

from deepemd.data.files import read_points
from deepemd.data.labels import exact_matching, label
from deepemd.data.pairs import DEFAULT_WEIGHTS, KINDS, PairDataset, PairSpec, labelled, make_pair
from deepemd.data.shapes import PRIMITIVES, Shape, random_rotation, random_shape
from deepemd.data.shards import read_shard, verify_shard, write_shards

__all__ = [
    "DEFAULT_WEIGHTS",
    "KINDS",
    "PRIMITIVES",
    "PairDataset",
    "PairSpec",
    "Shape",
    "exact_matching",
    "label",
    "labelled",
    "make_pair",
    "random_rotation",
    "random_shape",
    "read_points",
    "read_shard",
    "verify_shard",
    "write_shards",
]
