"""What the factored form is for: no tensor of N·N or N·d' numbers, and the FLOPs of the formulas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hypermixer import HyperMixing
from hypermixer.analysis import layer_cost, measure_memory


def flops(layer, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("n", [17, 50, 300])
@pytest.mark.parametrize(("d", "hidden", "heads"), [(32, 128, 4), (32, 64, 1), (24, 24, 3)])
def test_flops_equal_the_formulas(n, d, hidden, heads):
    x = torch.randn(1, n, d)
    direct = HyperMixing(d, hidden, heads, algorithm="direct")
    factored = HyperMixing(d, hidden, heads, algorithm="factored")
    assert flops(direct, x) == n * (4 * d * d + 8 * d * hidden) // heads
    expected = 8 * n * d * d // heads + 4 * d * d * hidden // heads**2
    assert flops(factored, x) == expected
    assert flops(HyperMixing(d, hidden, heads, algorithm="factored", chunk_size=7), x) == expected


def test_flops_of_the_published_example():
    x = torch.randn(1, 50, 32)
    assert flops(HyperMixing(32, 128, 4, algorithm="direct"), x) == 460_800
    assert flops(HyperMixing(32, 128, 4, algorithm="factored"), x) == 135_168


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"head_hidden": "full"}, {"hypernet_dim": 64}]
)
@pytest.mark.parametrize("algorithm", ["direct", "factored", "auto"])
def test_layer_cost_counts_what_is_done(options, algorithm):
    layer = HyperMixing(32, 64, 4, algorithm=algorithm, **options)
    for n in (3, 10, 200):
        cost = layer_cost(layer, n)
        assert cost.chosen == flops(layer, torch.randn(1, n, 32))
        assert cost.chosen in (cost.direct, cost.factored)
        if algorithm == "auto":
            assert cost.chosen == min(cost.direct, cost.factored)
    assert cost.parameters == sum(p.numel() for p in layer.parameters())


def test_block_causal_flops_equal_the_formula():
    d, hidden, heads, n, block = 32, 64, 2, 48, 12
    layer = HyperMixing(d, hidden, heads, block_size=block, algorithm="factored")
    expected = 8 * n * d * d // heads + (n // block) * 4 * d * d * hidden // heads**2
    assert flops(layer, torch.randn(1, n, d)) == expected


VARIANTS = [
    {},
    {"tied": True},
    {"bias": True},
    {"head_hidden": "full"},
    {"chunk_size": 128},
    {"length_scale": "mean"},
    {"token_info": None},
    {"block_size": 256},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_n_squared_or_n_times_hidden(options, masked):
    n, d, hidden = 1024, 32, 512
    layer = HyperMixing(d, hidden, 4, **options)
    x = torch.randn(1, n, d, requires_grad=True)
    mask = torch.zeros(1, n, dtype=torch.bool) if masked else None
    layer(x, key_padding_mask=mask)  # the position table exists from here on

    use = measure_memory(lambda: layer(x, key_padding_mask=mask).sum().backward())
    assert use.largest_numel <= 2 * n * d
    direct = HyperMixing(d, hidden, 1, algorithm="direct")
    direct(x)
    assert measure_memory(lambda: direct(x)).largest_numel == n * hidden  # the probe sees it


def test_strictly_causal_mixing_forms_a_chunk_of_states_at_a_time():
    n, d, hidden = 1024, 32, 512
    layer = HyperMixing(d, hidden, 4, causal=True, chunk_size=8, token_info=None)
    x = torch.randn(1, n, d, requires_grad=True)
    use = measure_memory(lambda: layer(x).sum().backward())
    states = 8 * hidden * d // 4
    boundaries = n // 8 * hidden * d // 4
    assert use.largest_numel <= max(states, boundaries, 2 * n * d)


def test_packed_and_streaming_mixing_form_no_such_tensor_either():
    n, d, hidden = 1024, 32, 512
    layer = HyperMixing(d, hidden, 4, token_info=None)
    x = torch.randn(n, d)
    offsets = torch.tensor([0, 100, 400, n])
    assert measure_memory(lambda: layer(x, cu_seqlens=offsets)).largest_numel <= 2 * n * d
    state = layer.init_state(1)
    use = measure_memory(lambda: layer.read(layer.write(state, x[None]), x[None]))
    assert use.largest_numel <= 2 * n * d


def growth(n: int, **options) -> float:
    """Peak bytes of a training step that n more tokens cost, per token and feature and byte."""
    layer = HyperMixing(64, 128, 4, **{"token_info": None, **options})
    peaks = []
    for length in (n, 2 * n):
        x = torch.randn(1, length, 64, requires_grad=True)
        layer(x)  # the position table exists from here on
        peaks.append(measure_memory(lambda x=x: layer(x).sum().backward()).peak_bytes)
    return (peaks[1] - peaks[0]) / (n * 64 * 4)


def test_memory_of_training_is_linear_in_the_length_and_flat_in_the_hidden_width():
    # two pre-activations, two G, the norm's input and output
    assert growth(1024) <= 6.05
    # two pre-activations, two G, Y by heads and the output while one becomes the other
    assert growth(1024, norm=False) <= 6.05
    # positions add x̃
    assert growth(1024, token_info="idiap") <= 7.05
    # the output and the input's gradient
    assert growth(1024, chunk_size=64) <= 2.5


def test_memory_is_flat_in_the_hidden_width():
    x = torch.randn(1, 2048, 64, requires_grad=True)
    peaks = []
    for hidden in (128, 512):
        layer = HyperMixing(64, hidden, 4, token_info=None)
        peaks.append(measure_memory(lambda layer=layer: layer(x).sum().backward()).peak_bytes)
    assert peaks[1] <= 1.15 * peaks[0]


def test_positions_are_not_built_row_by_row():
    from hypermixer.positions import sinusoidal_table

    operations = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        sinusoidal_table(3000, 512)
    assert len(operations) < 60
