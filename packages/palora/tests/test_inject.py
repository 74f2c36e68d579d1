from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
import torch
from conftest import close, fill, naive_weight
from torch import nn

import palora
from palora.examples.models import LeNet


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_modules_parameters_names_hooks_and_optimisers_stay() -> None:
    net = LeNet()
    before = dict(net.named_parameters())
    modules = dict(net.named_modules())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    calls: list[str] = []
    net.encoder[0].register_forward_hook(lambda *a: calls.append("hook"))
    model = palora.inject(net, 2, rank=4)
    assert model is net
    assert all(dict(model.named_parameters())[k] is v for k, v in before.items())
    assert all(dict(model.named_modules())[k] is v for k, v in modules.items())
    assert isinstance(model.encoder[0], nn.Conv2d)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in before.values()}
    with palora.preference(model, [0.5, 0.5]):
        model(torch.zeros(2, 1, 28, 28))
    assert calls == ["hook"]


def test_state_dict_layout() -> None:
    net = LeNet()
    original = set(net.state_dict())
    shapes = {k: tuple(v.shape) for k, v in palora.inject(net, 2, rank=4).state_dict().items()}
    assert shapes["encoder.conv1.weight"] == (10, 1, 5, 5)
    assert shapes["encoder.conv1.palora_A"] == (2, 20, 5)
    assert shapes["encoder.conv1.palora_B"] == (2, 50, 20)
    assert shapes["encoder.fc.palora_A"] == (2, 4, 320)
    assert shapes["encoder.fc.palora_B"] == (2, 50, 4)
    added = set(shapes) - original
    assert original <= set(shapes)
    assert all(k.endswith((".palora_A", ".palora_B")) for k in added)
    assert len(added) == 2 * 7


def test_targets_by_name_suffix_regex_sequence_and_predicate() -> None:
    def names(**kw: Any) -> list[str]:
        return palora.inject(LeNet(), 2, rank=1, **kw)._palora.config["targets"]

    assert names(target="encoder.fc") == ["encoder.fc"]
    assert names(target="fc") == ["encoder.fc"]
    assert names(target=r"encoder\.conv\d") == ["encoder.conv1", "encoder.conv2"]
    assert names(target=["fc", "conv1"]) == ["encoder.conv1", "encoder.fc"]
    assert names(target=lambda n, m: isinstance(m, nn.Conv2d)) == ["encoder.conv1", "encoder.conv2"]
    assert names(exclude=r"heads\..*") == ["encoder.conv1", "encoder.conv2", "encoder.fc"]
    assert len(names()) == 7  # task heads included


def test_rank_by_pattern() -> None:
    model = palora.inject(small(), 2, rank={"2": 1, ".*": 3})
    assert (model[0].palora_A.shape[1], model[2].palora_A.shape[1]) == (3, 1)
    with pytest.raises(ValueError, match="rank gives no value for layer '2'"):
        palora.inject(small(), 2, rank={"0": 1})


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"tasks": 1}, "tasks must be at least 2, got 1"),
        ({"tasks": ["a"]}, "tasks must be at least 2"),
        ({"tasks": "ab"}, "number or a sequence"),
        ({"tasks": True}, "number or a sequence"),
        ({"tasks": ["a", "a"]}, "must differ"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be an integer"),
        ({"rank": True}, "rank must be an integer"),
        ({"rank": {"0": 0}}, "rank must be an integer"),
        ({"target": "nothing"}, "no layer matched target='nothing'.*available: 0, 2"),
        ({"target": "(", "tasks": 2}, "no layer matched"),
        ({"exclude": ".*"}, "no layer matched"),
        ({"scaling": "x"}, "scaling must be one of lora, rslora"),
        ({"conv": "x"}, "conv must be one of"),
        ({"qkv": "x"}, "qkv must be one of"),
        ({"init": "x"}, "init must be one of"),
        ({"path": "x"}, "path must be one of"),
        ({"default": "x"}, "default must be one of uniform"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": 0.1, "path": "weight"}, "dropout acts on the adapters' input"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"layer_temperature": 0.0}, "layer_temperature must be positive"),
    ],
)
def test_bad_arguments(kw: dict[str, Any], message: str) -> None:
    net = small()
    with pytest.raises(ValueError, match=message):
        palora.inject(net, **{"tasks": 2, **kw})
    with pytest.raises(ValueError, match="got NoneType"):
        palora.inject(None, 2)  # type: ignore[arg-type]


def test_double_injection_and_lazy_modules_are_refused() -> None:
    model = palora.inject(small(), 2)
    with pytest.raises(RuntimeError, match="injected already"):
        palora.inject(model, 2)
    with pytest.raises(RuntimeError, match="injected already"):
        palora.inject(nn.Sequential(model), 2)
    with pytest.raises(ValueError, match="run the model once"):
        palora.inject(nn.Sequential(nn.LazyLinear(3)), 2)


def test_wide_ranks_warn_once_naming_the_layers() -> None:
    with pytest.warns(UserWarning, match=r"rank exceeds min\(in, out\) of: 0, 2") as caught:
        palora.inject(small(), 2, rank=8)
    assert len(caught) == 1


def test_unload_gives_the_plain_model_back() -> None:
    net = nn.Sequential(LeNet(), nn.BatchNorm2d(2), nn.Dropout(0.1))
    classes = [type(m) for m in net.modules()]
    keys = list(net.state_dict())
    model = palora.inject(net, 2, rank=2, train_base=False)
    assert not model[0].encoder[0].weight.requires_grad
    plain = palora.unload(model)
    assert plain is net
    assert [type(m) for m in net.modules()] == classes
    assert list(net.state_dict()) == keys
    assert all(p.requires_grad for p in net.parameters())
    assert not any("_palora" in k for m in net.modules() for k in m.__dict__)
    with pytest.raises(RuntimeError, match="not injected"):
        palora.unload(net)
    palora.inject(net, 2, rank=1)


def test_freeze_base_leaves_what_was_frozen_before() -> None:
    net = small()
    net[0].bias.requires_grad_(False)
    model = palora.inject(net, 2, train_base=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "0.palora_A", "0.palora_B", "2.palora_A", "2.palora_B",
    ]  # fmt: skip
    palora.freeze_base(model, False)
    assert not net[0].bias.requires_grad
    assert net[0].weight.requires_grad
    palora.freeze_base(model)
    assert not net[0].weight.requires_grad


def test_a_layer_used_twice_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    model = palora.inject(nn.Sequential(layer, nn.ReLU(), layer), 2, rank=1)
    assert len(palora.report(model).adapted) == 1
    assert sum(k.endswith("palora_A") for k, _ in model.named_parameters()) == 1


def test_layers_that_share_a_weight_share_adapters_and_stay_tied_when_merged() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = fill(palora.inject(nn.Sequential(first, second), 2, rank=1))
    assert model[0].palora_A is model[1].palora_A
    merged = palora.merge(model, [0.3, 0.7])
    assert merged[0].weight is merged[1].weight
    close(merged[0].weight.double(), naive_weight(first, torch.tensor([0.3, 0.7])), 1e-6)


def test_head_tied_to_an_embedding_is_untied_when_merged() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    model = fill(palora.inject(Tied().double(), 2, rank=1))
    assert palora.report(model).adapted[0][0] == "head"
    x = torch.tensor([1, 2])
    with palora.preference(model, [0.3, 0.7]):
        expected = model(x)
    merged = palora.merge(model, [0.3, 0.7])
    close(merged(x), expected)
    assert torch.equal(merged.embed.weight, model.embed.weight)
    both = palora.inject(Tied(), 2, rank=1, target=["embed", "head"])
    assert palora.report(both).skipped == [
        ("head", "Linear", "its weight is tied to an adapted layer of another kind")
    ]


def test_what_cannot_be_adapted_is_reported_with_the_reason() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    class OddAttention(nn.MultiheadAttention):
        def forward(self, *args: Any, **kw: Any) -> Any:
            return super().forward(*args, **kw)

    class IntConv(nn.Conv2d):
        pass

    quantised = IntConv(1, 1, 1)
    quantised._parameters["weight"] = nn.Parameter(torch.ones(1, 1, 1, 1, dtype=torch.int8), False)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    net = nn.ModuleDict(
        {
            "ok": nn.Linear(2, 2), "odd": Odd(2, 2), "up": nn.ConvTranspose2d(2, 2, 2),
            "bag": nn.EmbeddingBag(3, 2), "normed": normed, "attention": OddAttention(4, 2),
            "quantised": quantised, "table": nn.Embedding(3, 2, max_norm=1.0),
            "recurrent": nn.GRU(2, 2),
        }
    )  # fmt: skip
    model = palora.inject(net, 2, rank=1, exclude="out_proj")
    skipped = {name: reason for name, _, reason in palora.report(model).skipped}
    assert [a[0] for a in palora.report(model).adapted] == ["ok"]
    assert "overrides Linear.forward" in skipped["odd"]
    assert "overrides nn.MultiheadAttention.forward" in skipped["attention"]
    assert "transposed" in skipped["up"]
    assert "EmbeddingBag" in skipped["bag"]
    assert "parametrised" in skipped["normed"]
    assert "quantised" in skipped["quantised"]
    assert "max_norm" in skipped["table"]
    assert "recurrent" in skipped["recurrent"]
    assert "left alone: transposed" in str(palora.report(model))
    assert "ok" in str(palora.report(model))


class Packed(nn.Linear):
    """A quantised Linear as libraries make them: an integer weight and a forward of its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.scale = plain.weight.detach().abs().max() / 127
        packed = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def test_quantised_linears_take_the_activation_path_and_refuse_to_merge() -> None:
    packed = Packed(nn.Linear(8, 4))
    base = copy.deepcopy(packed)
    model = fill(palora.inject(nn.Sequential(packed), 2, rank=2))
    x = torch.randn(64, 8)
    lam = torch.tensor([0.3, 0.7])
    layer = model[0]
    delta = sum(0.5 * lam[t] * layer.palora_B[t] @ layer.palora_A[t] for t in range(2))
    with palora.preference(model, lam):
        torch.testing.assert_close(model(x), base(x) + x @ delta.t(), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="quantised weight"):
        palora.merge(model, lam)


def test_pickle_deepcopy_and_torch_save_round_trip(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2))
    model = fill(palora.inject(net, ["a", "b"], rank=1, target="0"))
    palora.set_preference(model, {"a": 0.25, "b": 0.75})
    x = torch.randn(64, 4)
    model.eval()
    with torch.no_grad():
        expected = model[1](model[0](x))  # fills the cache, which copies leave behind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert other[0]._palora is other._palora is not model._palora
        assert torch.equal(other[1](other[0](x)), expected)
        palora.set_preference(other, [1.0, 0.0])
        assert not torch.equal(other[1](other[0](x)), expected)
        assert torch.equal(model[1](model[0](x)), expected)
        palora.merge(other, [0.5, 0.5], inplace=True)
    torch.save(model, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(loaded[1](loaded[0](x)), expected)


def test_deepcopy_with_a_preference_that_has_a_history() -> None:
    model = fill(palora.inject(nn.Linear(4, 4), 2, rank=1))
    logits = torch.zeros(2, requires_grad=True)
    palora.set_preference(model, logits.softmax(0))
    other = copy.deepcopy(model)
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))
    model(x).sum().backward()
    assert logits.grad is not None


def test_meta_models_and_large_models_are_injected_without_copies() -> None:
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(60)))
    weights = [m.weight for m in net]
    start = time.perf_counter()
    model = palora.inject(net, 3, rank=4)
    assert time.perf_counter() - start < 2.0  # a limit of the design: 1e9 parameters, no copy
    assert all(m.weight is w for m, w in zip(model, weights, strict=True))
    assert palora.overhead(model).base > 1e9
    assert model[0].palora_A.is_meta


def test_disable_runs_the_base_alone() -> None:
    plain = LeNet()
    model = fill(palora.inject(copy.deepcopy(plain), 2, rank=1))
    x = torch.randn(2, 1, 28, 28)
    with palora.disable(model):
        for a, b in zip(model(x), plain(x), strict=True):
            assert torch.equal(a, b)
    table = nn.Embedding(5, 3)
    model = fill(palora.inject(copy.deepcopy(table), 2, rank=1, target=lambda n, m: True))
    with palora.disable(model):
        assert torch.equal(model(torch.tensor([1])), table(torch.tensor([1])))


def test_repr_shows_the_adapters() -> None:
    assert "in_features=6, out_features=5, bias=True, tasks=2, rank=4" in repr(
        palora.inject(small(), 2)
    )


def test_adapter_dtype_is_respected() -> None:
    model = palora.inject(nn.Linear(4, 4), 2, adapter_dtype=torch.float64)
    assert model.palora_A.dtype == torch.float64
    fill(model)
    with palora.preference(model, [0.5, 0.5]):
        for rows in (1, 64):
            assert model(torch.ones(rows, 4)).dtype == torch.float32


@pytest.mark.parametrize("index", range(5))
def test_layers_take_their_argument_by_its_own_name(index: int) -> None:
    net = nn.Sequential(
        nn.Linear(3, 3),
        nn.Conv1d(3, 3, 2),
        nn.Embedding(5, 3),
        nn.BatchNorm1d(3),
        nn.Dropout(0.0),
    )
    inputs = [torch.randn(4, 3), torch.randn(4, 3, 5), torch.tensor([1, 2]), torch.randn(4, 3)]
    x = [*inputs, torch.randn(4, 3)][index]
    expected = net[index](input=x)
    model = palora.inject(net, 2, rank=1, target=["0", "1", "2"])
    with palora.preference(model, [0.4, 0.6]):
        found = model[index](input=x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
