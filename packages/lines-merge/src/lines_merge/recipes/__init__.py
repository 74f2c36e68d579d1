"""Experiments of the paper, in kind and in full."""
