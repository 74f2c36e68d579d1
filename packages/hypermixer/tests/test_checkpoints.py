"""Public checkpoint layouts load, and give what the public implementations compute."""

from __future__ import annotations

import oracle
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from hypermixer import HyperMixing, from_reference
from hypermixer.adapters.checkpoints import convert_checkpoint, layer_sizes, load_tensors

F64 = torch.float64


def reference_state(heads=2, d=8, k=8, h=None, *, bias=False, tied=False, norm=True, style="idiap"):
    """A state dict as the public implementations save it."""
    f, h = d // heads, h or d // heads
    state = {}
    for i in (1, 2):
        if tied and i == 2:
            state.update({n.replace("w1", "w2"): t for n, t in state.items() if "w1" in n})
            continue
        prefix = f"hyper.w{i}_gen."
        state[prefix + "fc1_weights"] = torch.randn(heads, h, f, dtype=F64)
        state[prefix + "fc2_weights"] = torch.randn(heads, k, h, dtype=F64)
        if bias:
            state[prefix + "fc1_biases"] = torch.randn(heads, h, dtype=F64)
            state[prefix + "fc2_biases"] = torch.randn(heads, k, dtype=F64)
    if norm:
        state["layer_norm.weight"] = torch.randn(d, dtype=F64)
        state["layer_norm.bias"] = torch.randn(d, dtype=F64)
    table = "token_information.pe" if style == "idiap" else "positional_encoding.pe"
    state[table] = torch.zeros(1, 30, d)
    return state


def ours(state):
    """The same tensors under our names, written out here a second time."""
    names = {}
    for name, tensor in state.items():
        if name.endswith(".pe"):
            continue
        name = name.replace("hyper.w1_gen", "w1").replace("hyper.w2_gen", "w2")
        name = name.replace("weights", "weight").replace("biases", "bias")
        names[name.replace("layer_norm", "norm")] = tensor
    return names


@pytest.mark.parametrize("style", ["idiap", "speechbrain"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_from_reference_reads_every_option_off_the_tensors(style, bias, tied, norm):
    state = reference_state(bias=bias, tied=tied, norm=norm, style=style, h=3, k=5)
    layer = from_reference(state, num_heads=2, style=style)
    assert (layer.num_heads, layer.embed_dim, layer.hidden_dim, layer.hypernet_dim) == (2, 8, 10, 6)
    assert (layer.bias, layer.tied, layer.norm is not None) == (bias, tied, norm)
    x = torch.randn(6, 8, dtype=F64)
    position = "sinusoidal" if style == "speechbrain" else "idiap"
    expected = oracle.mix(ours(state), x, style=position)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_the_load_hook_accepts_reference_names(tied):
    state = reference_state(tied=tied, bias=True)
    layer = HyperMixing(8, 16, 2, tied=tied, bias=True, token_info="idiap", dtype=F64)
    model = torch.nn.ModuleDict({"mixer": layer})
    prefixed = {f"mixer.{name}": tensor for name, tensor in state.items()}
    result = model.load_state_dict(prefixed)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, ours(state)[name])
    assert len(prefixed) == len(state)  # the caller's dictionary is left as it was


def test_a_tied_layer_refuses_two_different_hypernetworks():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*w2\.fc1_weight"):
        HyperMixing(8, 16, 2, tied=True, dtype=F64).load_state_dict(reference_state())


def test_nested_layers_by_prefix():
    state = {f"encoder.0.mha_layer.{n}": t for n, t in reference_state().items()}
    layer = from_reference(state, prefix="encoder.0.mha_layer.", chunk_size=3)
    assert layer.chunk_size == 3


def test_wrong_heads_style_or_names():
    state = reference_state()
    with pytest.raises(ValueError, match="num_heads=4, but the checkpoint has 2 heads"):
        from_reference(state, num_heads=4)
    with pytest.raises(ValueError, match="style must be one of 'idiap', 'speechbrain'"):
        from_reference(state, style="keras")
    with pytest.raises(KeyError, match=r"layer\.hyper\.w1_gen\.fc1_weights"):
        from_reference(state, prefix="layer.")


def test_state_dict_round_trip_and_key_names():
    layer = HyperMixing(8, 16, 2, bias=True)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {
        "w1.fc1_weight": (2, 4, 4),
        "w1.fc1_bias": (2, 4),
        "w1.fc2_weight": (2, 8, 4),
        "w1.fc2_bias": (2, 8),
        "w2.fc1_weight": (2, 4, 4),
        "w2.fc1_bias": (2, 4),
        "w2.fc2_weight": (2, 8, 4),
        "w2.fc2_bias": (2, 8),
        "norm.weight": (8,),
        "norm.bias": (8,),
    }
    other = HyperMixing(8, 16, 2, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 5, 8)
    assert torch.equal(other(x), layer(x))
    tied = HyperMixing(8, tied=True).state_dict()
    assert not [name for name in tied if name.startswith("w2")]


def test_safetensors_with_tied_weights(tmp_path):
    layer, other = HyperMixing(8, tied=True), HyperMixing(8, tied=True)
    save_model(layer, tmp_path / "layer.safetensors")
    load_model(other, tmp_path / "layer.safetensors")
    x = torch.randn(1, 5, 8)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("target", ["new.safetensors", "new.pt"])
@pytest.mark.parametrize("source", ["old.safetensors", "old.pt", "wrapped.pt"])
def test_convert_checkpoint(tmp_path, source, target):
    state = {f"a.{n}": t.clone() for n, t in reference_state(tied=True).items()}
    state |= {f"b.{n}": t for n, t in reference_state(heads=4).items()}
    state["head.weight"] = torch.randn(3, 3)
    path = tmp_path / source
    if source.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in source else state, path)
    assert convert_checkpoint(path, tmp_path / target) == {"layers": {"a": 2, "b": 4}}
    new = load_tensors(tmp_path / target)
    assert torch.equal(new["head.weight"], state["head.weight"])
    assert torch.equal(new["b.w2.fc2_weight"], state["b.hyper.w2_gen.fc2_weights"])
    assert not [n for n in new if n.startswith("a.w2") or n.endswith(".pe")]
    assert not list(tmp_path.glob("*.tmp"))
    assert layer_sizes(tmp_path / target)["b"]["num_heads"] == 4
    assert layer_sizes(path)["a"]["tied"]
    if target.endswith("safetensors"):
        assert set(load_file(tmp_path / target)) == set(new)


def test_files_that_hold_nothing_of_use(tmp_path):
    empty = tmp_path / "empty.pt"
    torch.save({"x": torch.ones(1)}, empty)
    with pytest.raises(ValueError, match=r"has no parameters such as hyper\.w1_gen"):
        convert_checkpoint(empty, tmp_path / "out.pt")
    with pytest.raises(ValueError, match="has no HyperMixing parameters"):
        layer_sizes(empty)
    assert not (tmp_path / "out.pt").exists()
    numbers = tmp_path / "numbers.pt"
    torch.save([1, 2], numbers)
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_tensors(numbers)
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(ValueError, match=name):
            load_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "missing.pt")
