"""Every kind of bad input is refused with the argument's name, what came and what is allowed."""

from __future__ import annotations

import pytest
import torch

from hypermixer import HyperMixing, HyperMixingAttention, functional, kernels

CONSTRUCTION = [
    ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10 must be divisible by num_heads=4"),
    ({"hidden_dim": 10, "num_heads": 4}, "hidden_dim=10 must be divisible by num_heads=4"),
    ({"hypernet_dim": 6, "num_heads": 4}, "hypernet_dim=6 must be divisible by num_heads=4"),
    ({"embed_dim": 0}, "embed_dim must be a positive int, got 0"),
    ({"hidden_dim": -1}, "hidden_dim must be a positive int, got -1"),
    ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
    ({"hypernet_dim": 0}, "hypernet_dim must be a positive int, got 0"),
    ({"block_size": 0}, "block_size must be a positive int, got 0"),
    ({"chunk_size": 0}, "chunk_size must be a positive int, got 0"),
    ({"chunk_size": 1.5}, "chunk_size must be a positive int, got 1.5"),
    ({"max_length": 0}, "max_length must be a positive int, got 0"),
    ({"head_hidden": "half"}, "head_hidden must be one of 'split', 'full'; got 'half'"),
    ({"length_scale": "max"}, "length_scale must be one of None, 'mean', 'sqrt'; got 'max'"),
    ({"init": "zero"}, "init must be one of 'reference', 'xavier'; got 'zero'"),
    ({"algorithm": "fast"}, "algorithm must be one of 'auto', 'direct', 'factored'; got 'fast'"),
    ({"activation": "sin"}, "activation must be callable or one of .*'gelu'.*; got 'sin'"),
    ({"token_info": "rotary"}, "token_info must be .*'learned'.*; got 'rotary'"),
    ({"token_info": 3}, "token_info must be a name, None or a callable; got 3"),
    ({"token_info": "learned"}, "token_info='learned' needs max_length"),
    ({"embed_dim": 7}, "use 'idiap' or an even embed_dim"),
]


@pytest.mark.parametrize(("options", "message"), CONSTRUCTION, ids=lambda o: str(o))
def test_construction(options, message):
    with pytest.raises(ValueError, match=message):
        HyperMixing(**{"embed_dim": 8, **options})


x = torch.randn(2, 5, 8)
SHAPES = [
    ((torch.randn(2, 5, 6),), {}, "query has 6 features, but embed_dim=8"),
    ((torch.randn(5, 8),), {}, r"query must have shape \(batch, length, embed_dim\), got \(5, 8\)"),
    ((x, torch.randn(2, 5, 6)), {}, "key has 6 features, but embed_dim=8"),
    ((x, x, torch.randn(2, 5, 6)), {}, "value has 6 features, but embed_dim=8"),
    ((x, x, torch.randn(2, 4, 8)), {}, "key and value must have one length, got 5 and 4"),
    ((x, torch.randn(3, 5, 8)), {}, "must have one batch size, got 2, 3 and 3"),
    (
        (x,),
        {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        r"key_padding_mask must have shape \(2, 5\), got \(2, 4\)",
    ),
    (
        (x,),
        {"query_padding_mask": torch.zeros(5, dtype=torch.bool)},
        r"query_padding_mask must have shape \(2, 5\), got \(5,\)",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), SHAPES)
def test_shapes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        HyperMixing(8)(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_masks_of_other_kinds(dtype):
    mask = torch.ones(2, 5).to(dtype)
    allowed = "0 .keep. and -inf" if dtype.is_floating_point else "must be bool or uint8"
    with pytest.raises(TypeError, match=f"key_padding_mask .*{allowed}"):
        HyperMixing(8)(x, key_padding_mask=mask)


def test_integer_tokens():
    with pytest.raises(TypeError, match=r"query must be a floating-point tensor, got torch\.int64"):
        HyperMixing(8)(torch.ones(2, 5, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"key must be a floating-point tensor, got torch\.int32"):
        HyperMixing(8)(x, torch.ones(2, 5, 8, dtype=torch.int32))


def test_tied_mixing_takes_the_same_tensor_only():
    layer = HyperMixing(8, tied=True)
    layer(x, x)
    layer(x, x.view(2, 5, 8))  # one storage, shape and stride
    for key in (x.clone(), torch.randn(2, 5, 8), x[:, :4]):
        with pytest.raises(ValueError, match=r"tied=True .* key must be the query tensor itself"):
            layer(x, key)


def test_causal_mixing_is_self_mixing_with_one_padding():
    layer = HyperMixing(8, causal=True)
    with pytest.raises(ValueError, match="causal mixing is self-mixing"):
        layer(x, x.clone())
    one, other = torch.zeros(2, 2, 5, dtype=torch.bool)
    other[0, 4] = True
    layer(x, key_padding_mask=one, query_padding_mask=one.clone())
    for masks in ((one, other), (None, other)):
        with pytest.raises(ValueError, match="query_padding_mask differs from key_padding_mask"):
            layer(x, key_padding_mask=masks[0], query_padding_mask=masks[1])


def test_steps_need_a_causal_layer_and_one_block():
    layer = HyperMixing(8)
    with pytest.raises(RuntimeError, match="causal=True or block_size"):
        layer.step(x[:, 0], layer.init_state(2))
    causal = HyperMixing(8, block_size=2)
    with pytest.raises(ValueError, match="x has 3 tokens, but a block has block_size=2"):
        causal.step(x[:, :3], causal.init_state(2))


def test_streaming():
    layer = HyperMixing(8)
    state = layer.init_state(2)
    with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
        layer.init_state(0)
    with pytest.raises(ValueError, match="the state holds 2 sequences, but key has 1"):
        layer.write(state, x[:1])
    with pytest.raises(ValueError, match="the state holds 2 sequences, but query has 1"):
        layer.read(state, x[:1])
    with pytest.raises(ValueError, match="needs the position_ids"):
        layer.write(state, x, remove=True)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
        layer.write(state, x, mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="key and value must have one length"):
        layer.write(state, x, x[:, :2])


PACKED = [
    (torch.tensor([0.0, 5.0]), "cu_seqlens must be int32 or int64, got torch.float32"),
    (torch.tensor([0, 2], dtype=torch.int16), "cu_seqlens must be int32 or int64"),
    (torch.tensor([[0, 5]]), "cu_seqlens must be one-dimensional"),
    (torch.tensor([0, 3, 2, 5]), "must start at 0 and never fall"),
    (torch.tensor([1, 5]), "must start at 0 and never fall"),
    (torch.tensor([0, 4]), "must end at the 5 tokens given, got 4"),
]


@pytest.mark.parametrize(("offsets", "message"), PACKED)
def test_cumulative_lengths(offsets, message):
    with pytest.raises(ValueError, match=message):
        HyperMixing(8)(torch.randn(5, 8), cu_seqlens=offsets)


def test_packed_mixing_takes_neither_keys_nor_masks():
    layer, tokens, offsets = HyperMixing(8), torch.randn(5, 8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="give neither key nor value"):
        layer(tokens, tokens.clone(), cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens or padding masks, not both"):
        layer(tokens, key_padding_mask=torch.zeros(1, 5, dtype=torch.bool), cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"query must have shape \(tokens, embed_dim\)"):
        layer(torch.randn(2, 5, 8), cu_seqlens=offsets)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors():
    parts = [torch.randn(3, 8), torch.randn(2, 8)]
    strided = torch.nested.nested_tensor(parts, layout=torch.strided)
    with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
        HyperMixing(8)(strided)
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(ValueError, match="give no mask and no cu_seqlens"):
        HyperMixing(8)(jagged, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))


def test_checkpoint_of_another_number_of_heads():
    state = HyperMixing(8, 16, 4).state_dict()
    with pytest.raises(RuntimeError, match="num_heads=4, but this layer was made with num_heads=2"):
        HyperMixing(8, 16, 2).load_state_dict(state)


def test_attention_masks():
    square = torch.zeros(5, 5, dtype=torch.bool)
    attention = HyperMixingAttention(8, 2, batch_first=True)
    for arguments in ({"attn_mask": square}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="make the layer with causal=True"):
            attention(x, x, x, **arguments)
    causal = HyperMixingAttention(8, 2, batch_first=True, causal=True)
    for mask in (square, square[:4, :4], torch.zeros(5, 5)):
        with pytest.raises(NotImplementedError, match="may only be the causal mask"):
            causal(x, x, x, attn_mask=mask)


def test_kernels():
    with pytest.raises(ValueError, match="name='direct' is built in"):
        kernels.register_kernel("direct", functional.mix_heads)
    g, u = torch.randn(1, 1, 3, 2), torch.randn(1, 4, 2)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        functional.hyper_mix(g, u, g, u, g, algorithm="triton")


def test_position_ids():
    layer = HyperMixing(8)
    for ids in (torch.arange(4), torch.zeros(3, 5, dtype=torch.long)):
        with pytest.raises(
            ValueError, match=r"position_ids must have shape \(5,\) or \(2, 5\), got"
        ):
            layer(x, position_ids=ids)
    with pytest.raises(TypeError, match=r"position_ids must be integers, got torch\.float32"):
        layer(x, position_ids=torch.rand(5))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        layer(x, torch.randn(2, 7, 8), position_ids=(torch.arange(5), torch.arange(5)))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        layer(torch.randn(5, 8), cu_seqlens=torch.tensor([0, 5]), position_ids=torch.arange(4))
    state = layer.init_state(2)
    with pytest.raises(ValueError, match="position_ids must have shape"):
        layer.write(state, x, position_ids=torch.arange(4))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        layer.read(state, x, position_ids=torch.arange(4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": True}, ValueError, "num_heads must be a positive int, got True"),
        ({"norm": 3}, TypeError, "norm must be a bool or a module, got 3"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, error, message):
    with pytest.raises(error, match=message):
        HyperMixing(8, 16, **arguments)


def test_a_mask_that_is_no_tensor():
    with pytest.raises(TypeError, match="key_padding_mask must be a tensor, got list"):
        HyperMixing(8)(torch.zeros(1, 2, 8), key_padding_mask=[[False, True]])
