"""Simulators that worker processes and other interpreters can import."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the suite shares its cores with worker processes
