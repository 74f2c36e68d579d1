"""Checkpoint files: reading them safely and merging them out of core."""
