"""Plots draw what they are given on the Axes they are given."""

from __future__ import annotations

import sys

import pytest
import torch

from hypermixer.analysis.plots import plot_lengths, plot_pseudo_attention, plot_scene


def test_pseudo_attention_rows_are_normalised():
    ax = plot_pseudo_attention(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), title="map")
    assert ax.images[0].get_array().tolist() == [[0.25, 0.75], [0.0, 0.0]]
    assert ax.get_title() == "map"
    assert plot_pseudo_attention(torch.ones(2, 2), ax) is ax


def test_scene_shows_every_model():
    t = torch.arange(5.0)
    ax = plot_scene(t, t, {"a": t, "b": 2 * t})
    assert [line.get_label() for line in ax.lines] == ["target", "a", "b"]
    assert ax.lines[2].get_ydata().tolist() == [0, 2, 4, 6, 8]


def test_lengths_leave_out_what_was_not_measured():
    rows = [{"length": 8, "a": 1.0, "b": 2.0}, {"length": 16, "a": 2.0}]
    ax = plot_lengths(rows, ["a", "b"])
    assert [list(line.get_xdata()) for line in ax.lines] == [[8, 16], [8]]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hypermixer\[plot\]"'):
        plot_lengths([], [])
