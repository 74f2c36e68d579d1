"""Worked examples on real data, and the networks of the paper's experiments."""
