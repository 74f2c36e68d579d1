"""Putting averages into networks: stacks of one's own, and surgery on existing models."""
