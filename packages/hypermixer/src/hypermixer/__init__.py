"""x"""
from hypermixer.mixing import HyperMixing
from hypermixer.state import MixingState
__version__ = "0.1.0"
__all__ = ["HyperMixing", "MixingState"]
