from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import pair
from torch import Tensor, nn

from deepemd import DeepEMD
from deepemd.core.layers import Attention, fourier_features
from deepemd.core.normalize import normalize_pair

SMALL = {"width": 16, "depth": 2, "num_heads": 2, "fourier": 2}
VARIANTS = [
    {},
    {"pattern": "alternate"},
    {"norm": "post"},
    {"tie_qk": True},
    {"fourier": 0},
    {"arch": "geo"},
    {"arch": "geo", "pattern": "alternate", "head": "distance"},
    {"head": "dual"},
]


def network(**changes: object) -> DeepEMD:
    return DeepEMD(3, **{**SMALL, **changes}).double().eval()  # type: ignore[arg-type]


def test_trunk_equals_torch_s_transformer_encoder_with_the_same_weights() -> None:
    ours = network(fourier=0, normalize="none")
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train()
    for block, other in zip(ours.blocks, theirs.layers, strict=True):
        other.self_attn.in_proj_weight.data.copy_(block.attn.qkv.weight)
        other.self_attn.in_proj_bias.data.copy_(block.attn.qkv.bias)
        other.self_attn.out_proj.load_state_dict(block.attn.out.state_dict())
        other.linear1.load_state_dict(block.mlp[0].state_dict())
        other.linear2.load_state_dict(block.mlp[2].state_dict())
        other.norm1.load_state_dict(block.norm1.state_dict())
        other.norm2.load_state_dict(block.norm2.state_dict())
    x, y = pair(2, 7, m=9)
    hx, hy = ours.encode(x, y)
    tokens = torch.cat([ours.embed(x) + ours.origin[0], ours.embed(y) + ours.origin[1]], 1)
    expected = ours.norm(theirs(tokens))
    torch.testing.assert_close(torch.cat([hx, hy], 1), expected, rtol=0, atol=1e-12)
    scores = ours.head.q(hx) @ ours.head.k(hy).transpose(1, 2) / 4
    torch.testing.assert_close(ours(x, y), scores, rtol=0, atol=1e-12)


def test_fourier_features_are_the_written_formula() -> None:
    p = torch.randn(5, 2, dtype=torch.float64)
    found = fourier_features(p, 3)
    assert found.shape == (5, 2 * 7)
    for i in range(5):
        wanted = list(p[i])
        wanted += [torch.sin(2.0**k * torch.pi / 2 * p[i, d]) for d in range(2) for k in range(3)]
        wanted += [torch.cos(2.0**k * torch.pi / 2 * p[i, d]) for d in range(2) for k in range(3)]
        torch.testing.assert_close(found[i], torch.stack(wanted), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mix", ["joint", "self", "cross"])
def test_folded_distance_bias_equals_an_explicit_additive_mask(mix: str) -> None:
    attention = Attention(16, 2, biased=True).double()
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    points = 0.5 * torch.randn(2, 9, 3, dtype=torch.float64)
    split = 4
    q, k, v = attention.qkv(h).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    assert attention.log_tau is not None
    tau = attention.log_tau.exp().view(1, 2, 1, 1)
    logits = q @ k.transpose(2, 3) / 8**0.5
    logits = logits - tau * torch.cdist(points, points).square().unsqueeze(1)
    side = torch.arange(9) < split
    same = side[:, None] == side[None, :]
    allowed = {"joint": torch.ones_like(same), "self": same, "cross": ~same}[mix]
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(2, 9, 16))
    found = attention(h, points, split, mix, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", VARIANTS)
def test_permuting_a_cloud_permutes_rows_or_columns_and_nothing_else(changes: dict) -> None:
    model = network(**changes)
    x, y = pair(2, 6, m=8)
    s = model(x, y)
    rows, columns = torch.randperm(6), torch.randperm(8)
    torch.testing.assert_close(model(x[:, rows], y), s[:, rows], rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x, y[:, columns]), s[:, :, columns], rtol=0, atol=1e-10)


def test_tied_projections_with_swapped_origins_transpose_the_scores() -> None:
    model = network(tie_qk=True)
    x, y = pair(1, 6)
    forward = model(x, y)
    with torch.no_grad():
        model.origin.copy_(model.origin.flip(0).clone())
    torch.testing.assert_close(model(y, x), forward.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", VARIANTS)
def test_padding_values_do_not_matter_and_equal_the_unpadded_call(changes: dict) -> None:
    model = network(**changes)
    x, y = pair(1, 6, m=8)
    expected = model(x, y)
    mask_x = torch.tensor([[True] * 6 + [False] * 3])
    mask_y = torch.tensor([[True] * 8 + [False] * 2])
    results = []
    for value in (0.0, torch.nan, 1e30):
        px = torch.cat([x, torch.full((1, 3, 3), value, dtype=x.dtype)], 1)
        py = torch.cat([y, torch.full((1, 2, 3), value, dtype=x.dtype)], 1)
        results.append(model(px, py, mask_x, mask_y))
    assert results[0].equal(results[1])  # bit for bit
    assert results[0].equal(results[2])
    torch.testing.assert_close(results[0][:, :6, :8], expected, rtol=0, atol=1e-10)
    assert bool((results[0][:, 6:] == -1e9).all())
    assert bool((results[0][:, :, 8:] == -1e9).all())


@pytest.mark.parametrize("changes", [{}, {"head": "dual"}, {"head": "distance"}])
@pytest.mark.parametrize("size", [1, 7, 12])
def test_chunked_scores_equal_the_dense_ones(changes: dict, size: int) -> None:
    model = network(**changes)
    x, y = pair(2, 12)
    dense = model(x, y)
    parts = list(model.scores_chunked(x, y, chunk_size=size))
    assert [rows.stop - rows.start for rows, _ in parts][:-1] == [size] * (len(parts) - 1)
    chunked = torch.cat([s for _, s in parts], 1)
    assert chunked.argmax(2).equal(dense.argmax(2))
    torch.testing.assert_close(chunked.logsumexp(2), dense.logsumexp(2), rtol=0, atol=1e-10)


def test_normalised_pairs_are_centred_and_of_radius_one_and_the_scores_equivariant() -> None:
    x, y = pair(2, 10)
    nx, ny, scale = normalize_pair(x, y)
    both = torch.cat([nx, ny], 1)
    torch.testing.assert_close(both.mean(1), torch.zeros(2, 3, dtype=x.dtype), rtol=0, atol=1e-14)
    torch.testing.assert_close(both.norm(dim=2).amax(1), torch.ones(2, dtype=x.dtype))
    torch.testing.assert_close(nx * scale + torch.cat([x, y], 1).mean(1, keepdim=True), x)
    rms = torch.cat(normalize_pair(x, y, mode="rms")[:2], 1)
    torch.testing.assert_close(
        rms.square().sum(2).mean(1), torch.full((2,), 1 / 3, dtype=x.dtype), rtol=1e-12, atol=0
    )
    model = network()
    torch.testing.assert_close(model(50 * x - 7, 50 * y - 7), model(x, y), rtol=0, atol=1e-9)
    assert not torch.allclose(model(2 * x, 2 * y, normalize="none"), model(x, y, normalize="none"))
    with pytest.raises(ValueError, match="normalize must be one of pair, rms, none"):
        normalize_pair(x, y, mode="cube")


def test_dual_head_gives_potentials_in_the_units_of_the_clouds() -> None:
    model = network(head="dual")
    x, y = pair(2, 5)
    f, g = model.potentials(x, y)
    assert f.shape == g.shape == (2, 5)
    large, _ = model.potentials(10 * x, 10 * y)
    torch.testing.assert_close(large, 10 * f, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="predicts no potentials"):
        network().potentials(x, y)


def test_distance_head_is_positive_scales_and_ignores_padding() -> None:
    model = network(value=True)
    x, y = pair(2, 5)
    d = model.distance(x, y)
    assert bool((d > 0).all())
    torch.testing.assert_close(model.distance(3 * x, 3 * y), 3 * d, rtol=1e-9, atol=0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 5] = False
    padded = torch.cat([x, torch.full((2, 1, 3), torch.nan, dtype=x.dtype)], 1)
    torch.testing.assert_close(model.distance(padded, y, mask), d, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="value=True"):
        network().distance(x, y)


@pytest.mark.parametrize(
    "changes",
    [{"arch": "big"}, {"pattern": "x"}, {"head": "x"}, {"norm": "x"}, {"width": 15}],
)
def test_unknown_variants_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        network(**changes)


def test_points_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"D=3 coordinates, got 2 and 2"):
        network()(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))


def test_state_dict_has_the_documented_keys() -> None:
    keys = set(network(arch="geo", head="dual").state_dict())
    assert {"embed.weight", "embed.bias", "origin", "norm.weight", "head.q.weight"} <= keys
    assert {"head.k.weight", "head.potential.weight", "head.log_scale"} <= keys
    block = {k.removeprefix("blocks.0.") for k in keys if k.startswith("blocks.0.")}
    named = {"norm1", "norm2", "attn.qkv", "attn.out", "mlp.0", "mlp.2"}
    assert block == {f"{n}.{p}" for n in named for p in ("weight", "bias")} | {"attn.log_tau"}


def same(a: DeepEMD, b: DeepEMD, x: Tensor, y: Tensor) -> None:
    assert a(x, y).equal(b(x, y))


def test_copy_pickle_and_state_dict_keep_the_function() -> None:
    model = network()
    x, y = pair(2, 5)
    same(model, copy.deepcopy(model), x, y)
    same(model, pickle.loads(pickle.dumps(model)), x, y)
    other = network()
    other.load_state_dict(model.state_dict())
    same(model, other, x, y)


@pytest.mark.parametrize("changes", [{}, {"arch": "geo", "head": "distance"}])
def test_network_compiles_whole_and_gives_the_same(changes: dict) -> None:
    model = DeepEMD(3, **{**SMALL, **changes}).eval()
    x, y = pair(2, 6, dtype=torch.float32)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), model(x, y), rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(x, y, mask), model(x, y, mask), rtol=0, atol=1e-5)


def test_autocast_computes_the_scores_in_float32() -> None:
    model = DeepEMD(3, **SMALL).eval()
    x, y = pair(2, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x, y)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model(x, y), rtol=0, atol=0.05)  # tokens were in bfloat16


def test_half_precision_weights_still_give_float32_scores() -> None:
    model = DeepEMD(3, **SMALL).to(torch.bfloat16).eval()
    x, y = pair(2, 6, dtype=torch.float32)
    assert model(x, y).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of SDPA on a CPU: a loop
def test_network_is_transparent_to_torch_func() -> None:
    model = network()
    x, y = pair(2, 5)
    together = model(x, y)
    apart = torch.func.vmap(lambda a, b: model(a[None], b[None])[0])(x, y)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())

    def total(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x, y)).sum()

    gradients = torch.func.grad(total)(parameters)
    model.zero_grad()
    model(x, y).sum().backward()
    torch.testing.assert_close(gradients["origin"], model.origin.grad)
