"""Position tables against their closed forms; token information of every kind."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import nn

from hypermixer import HyperMixing
from hypermixer.positions import Sinusoidal, sinusoidal_positions, sinusoidal_table

F64 = torch.float64


@pytest.mark.parametrize("style", ["sinusoidal", "idiap"])
@pytest.mark.parametrize("dim", [4, 64, 512])
def test_tables_equal_the_closed_form(style, dim):
    wanted = torch.stack([oracle.position_row(p, dim, style) for p in (0, 1, 17, 2999)])
    ids = torch.tensor([0, 1, 17, 2999])
    exact = sinusoidal_table(3000, dim, style, dtype=F64)
    torch.testing.assert_close(exact[ids], wanted, rtol=0, atol=1e-11)
    torch.testing.assert_close(sinusoidal_positions(ids, dim, style), wanted, rtol=0, atol=1e-11)
    # float32 factors, each rounded once: 2^-24 times a few
    single = sinusoidal_table(3000, dim, style)
    torch.testing.assert_close(single[ids].double(), wanted, rtol=0, atol=4e-7)
    assert single.dtype == torch.float32


def test_rows_at_position_one_for_four_features():
    one = torch.tensor([1])
    expected = [math.sin(1), math.cos(1), math.sin(1e-2), math.cos(1e-2)]
    got = sinusoidal_positions(one, 4, "sinusoidal")[0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-15)
    # the authors' table is numbered from 1: 0-based position 0 is their row 1
    expected = [math.sin(1), math.cos(1e-2), math.sin(1e-4), math.cos(1e-6)]
    got = sinusoidal_positions(one - 1, 4, "idiap")[0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-15)


def test_odd_widths():
    assert sinusoidal_table(5, 7, "idiap").shape == (5, 7)
    wanted = oracle.position_row(4, 7, "idiap")
    torch.testing.assert_close(sinusoidal_table(5, 7, "idiap", dtype=F64)[4], wanted)


def test_a_table_can_start_anywhere():
    whole = sinusoidal_table(300, 8, dtype=F64)
    part = sinusoidal_table(100, 8, start=200, dtype=F64)
    torch.testing.assert_close(part, whole[200:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["sinusoidal", "idiap"])
def test_the_table_grows_and_is_never_saved(style):
    info = Sinusoidal(8, style)
    assert not info.state_dict()
    for length in (3, 10, 400, 5):
        x = torch.randn(1, length, 8, dtype=F64)
        expected = oracle.inform(x[0], style)
        torch.testing.assert_close(info(x)[0], expected, rtol=0, atol=1e-11)
    assert info.table.shape[0] >= 400


def test_the_table_is_rebuilt_rather_than_rounded_through_another_dtype():
    layer = HyperMixing(8, dtype=F64)
    x = torch.randn(1, 30, 8, dtype=F64)
    expected = layer(x)
    state = layer.state_dict()
    layer.bfloat16()(x.bfloat16())
    layer.double().load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_very_long_tables_are_not_kept():
    info = Sinusoidal(2)
    info(torch.zeros(1, 20_000, 2))
    assert info.table.shape[0] == 0
    kept = Sinusoidal(2, max_length=20_000)
    kept(torch.zeros(1, 5, 2))
    assert kept.table.shape[0] == 20_000
    assert torch.equal(kept(torch.zeros(1, 19_999, 2)), info(torch.zeros(1, 19_999, 2)))


def test_max_length_is_no_limit_for_sinusoids():
    layer = HyperMixing(8, max_length=4)
    assert layer(torch.randn(1, 9, 8)).shape == (1, 9, 8)


def test_learned_positions():
    layer = HyperMixing(8, token_info="learned", max_length=6, dtype=F64)
    x = torch.randn(2, 5, 8, dtype=F64)
    table = layer.token_info.embedding.weight
    direct = HyperMixing(8, token_info=lambda t: t + table[:5], dtype=F64)
    own = {k: v for k, v in layer.state_dict().items() if not k.startswith("token_info")}
    direct.load_state_dict(own)
    assert torch.equal(layer(x), direct(x))
    layer(x).sum().backward()
    assert table.grad[:5].abs().sum() > 0
    layer.chunk_size = 2
    torch.testing.assert_close(layer(x), direct(x), rtol=0, atol=1e-10)
    assert torch.equal(layer(x, position_ids=torch.arange(5)), layer(x))
    assert layer(x[:, :0], position_ids=torch.arange(0)).shape == (2, 0, 8)


def test_learned_positions_have_a_limit():
    layer = HyperMixing(8, token_info="learned", max_length=6)
    with pytest.raises(IndexError, match="position 6 is beyond the learned table of max_length=6"):
        layer(torch.randn(1, 7, 8))
    with pytest.raises(IndexError, match=r"position 9 .* max_length=6"):
        layer(torch.randn(1, 2, 8), position_ids=torch.tensor([0, 9]))


def test_callables_of_tokens_and_of_tokens_with_positions():
    x = torch.randn(1, 5, 8, dtype=F64)
    plain = HyperMixing(8, token_info=None, dtype=F64)
    expected = plain(x)  # values are raw, so doubling x̃ alone changes the result

    class Shift(nn.Module):
        def forward(self, x, position_ids):
            return x + position_ids.unsqueeze(-1)

    for info in (lambda t: 2 * t, Shift(), lambda t, ids: t + ids.unsqueeze(-1)):
        layer = HyperMixing(8, token_info=info, dtype=F64)
        layer.load_state_dict(plain.state_dict())
        assert not torch.allclose(layer(x), expected)
    shifted = HyperMixing(8, token_info=Shift(), dtype=F64)
    shifted.load_state_dict(plain.state_dict())
    zero = torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(shifted(x, position_ids=zero), expected, rtol=0, atol=1e-10)


def test_a_token_information_module_can_be_given_and_shared():
    info = Sinusoidal(8, "idiap")
    assert HyperMixing(8, token_info=info).token_info is info


def test_token_information_goes_into_the_hypernetworks_only():
    x = torch.randn(1, 4, 8, dtype=F64)
    layer = HyperMixing(8, activation="identity", norm=False, dtype=F64)
    w1, w2 = layer.generated_weights(x)
    torch.testing.assert_close(layer(x), w2[:, 0] @ (w1[:, 0].transpose(1, 2) @ x))


def test_unknown_styles():
    with pytest.raises(ValueError, match="style must be 'sinusoidal' or 'idiap', got 'rope'"):
        sinusoidal_table(3, 4, "rope")


def test_learned_positions_before_the_table_are_refused():
    layer = HyperMixing(8, token_info="learned", max_length=4)
    with pytest.raises(IndexError, match="position -1 is before the learned table"):
        layer(torch.zeros(1, 3, 8), position_ids=torch.tensor([-1, 0, 1]))
