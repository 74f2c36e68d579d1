"""Training and evaluation of the network."""

from deepemd.recipes.stream import BatchStream
from deepemd.recipes.train import TrainConfig, train

__all__ = ["BatchStream", "TrainConfig", "train"]
