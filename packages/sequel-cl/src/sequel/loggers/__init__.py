"""Loggers: CSV and JSONL always, TensorBoard and Weights & Biases where they are installed.

The names are the same everywhere: ``train/loss``, ``val/acc/task-0`` ..., ``avg/acc``, ``avg/forgetting``.
"""

from sequel.loggers.csv import CSVLogger
from sequel.loggers.remote import TensorBoardLogger, WandbLogger

__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger"]
