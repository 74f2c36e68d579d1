"""Experiments, one file per claim; each returns a JSON-ready dict with all seeds and their mean."""

from hypermixer.experiments.registry import experiment_names, run_experiment

__all__ = ["experiment_names", "run_experiment"]
