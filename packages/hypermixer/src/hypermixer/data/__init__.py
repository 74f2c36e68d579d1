"""Data of the experiments: generated, from installed packages, or read from ``data_dir``."""

from hypermixer.data.digits import load_digits
from hypermixer.data.listops import make_listops
from hypermixer.data.shapes import ShapeScenes, make_shapes
from hypermixer.data.text import TextData, load_text
from hypermixer.data.topics import PairData, make_topic_pairs

__all__ = [
    "PairData",
    "ShapeScenes",
    "TextData",
    "load_digits",
    "load_text",
    "make_listops",
    "make_shapes",
    "make_topic_pairs",
]
