"""Other people's models and files: replacing attention in a model, reading public checkpoints."""

from hypermixer.adapters.checkpoints import convert_checkpoint, from_reference
from hypermixer.adapters.surgery import Report, convert

__all__ = ["Report", "convert", "convert_checkpoint", "from_reference"]
