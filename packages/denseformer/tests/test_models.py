"""DenseStack, recomputation, gains, and surgery on torch.nn and home-made models."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from conftest import oracle, randomise, relative
from torch import Tensor, nn

from denseformer import (
    DWA,
    DenseStack,
    DWAModules,
    GainedResidual,
    SkipsWithGains,
    densify,
    param_groups,
    report,
    skip_block,
    undensify,
)
from denseformer.core import kernels
from denseformer.models.surgery import find_blocks
from denseformer.pipeline import split


class Block(nn.Module):
    """Pre-norm residual block; tuple output on request."""

    def __init__(self, width: int = 8, rest: bool = False) -> None:
        super().__init__()
        self.norm, self.mlp, self.rest = nn.LayerNorm(width), nn.Linear(width, width), rest

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        y = x + scale * self.mlp(self.norm(x)).tanh()
        return (y, "rest") if self.rest else y


class Net(nn.Module):
    """A home-made network with a loop over its blocks."""

    def __init__(self, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, scale: float = 1.0, stop: int | None = None) -> Any:
        x = self.embed(x)
        for block in self.blocks[:stop]:
            x = block(x, scale=scale)
        return self.head(x)


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# DenseStack


def test_stack_equals_the_loop_and_passes_arguments() -> None:
    stack = DenseStack([Block() for _ in range(5)], 2, dtype=torch.float64).double()
    randomise(stack.dwa)
    x = torch.randn(3, 8, dtype=torch.float64)
    want = oracle(stack.dwa, x, [lambda t, b=b: b(t, 0.5) for b in stack])
    assert relative(stack(x, scale=0.5), want) < 1e-13
    assert len(stack) == 5
    assert stack[2] is stack.blocks[2]
    with pytest.raises(ValueError, match="at least one module"):
        DenseStack([])
    with pytest.raises(ValueError, match="checkpoint must be False, True or 'mix', got 'all'"):
        DenseStack([Block()], checkpoint="all")


def test_stack_collects_the_rests_of_tuples() -> None:
    stack = DenseStack([Block(rest=True) for _ in range(3)])
    y, rests = stack(torch.ones(2, 8))
    assert y.shape == (2, 8)
    assert rests == [("rest",)] * 3


def test_one_module_several_times_counts_calls() -> None:
    block = Block().double()
    stack = DenseStack([block] * 4, dtype=torch.float64)
    randomise(stack.dwa)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert relative(stack(x), oracle(stack.dwa, x, [block] * 4)) < 1e-13


@pytest.mark.parametrize("checkpoint", [True, "mix"])
def test_recomputation_gives_the_same_gradients(checkpoint: Any) -> None:
    """Dropout included: the recomputed block draws the same numbers."""
    for k, p in ((1, 1), (2, 2), (4, 5)):
        blocks = [nn.Sequential(Block(), nn.Dropout(0.3)) for _ in range(10)]
        stack = DenseStack(blocks, k, p, dtype=torch.float64).double()
        randomise(stack.dwa, 0.2)
        x = torch.randn(3, 8, dtype=torch.float64)
        torch.manual_seed(1)
        want = grads(stack, x)
        stack.checkpoint = checkpoint
        torch.manual_seed(1)
        for a, b in zip(grads(stack, x), want, strict=True):
            assert relative(a, b) < 1e-12


class Checkpointed(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


class Spy(Block):
    """Keeps weak references to what it was given."""

    def __init__(self, width: int, seen: list[weakref.ref[Tensor]]) -> None:
        super().__init__(width)
        self.seen = seen

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        self.seen.append(weakref.ref(x))
        return super().forward(x, scale)


@pytest.mark.parametrize(
    ("checkpoint", "kept"), [("plain", 12), (False, 12), ("mix", 1), (True, 1)], ids=str
)
def test_recomputation_keeps_no_average(checkpoint: Any, kept: int) -> None:
    """A block's input is Y; after a forward pass only the first one, which is X_0, is still alive.

    The X_i that a checkpointed DenseFormer keeps in place of the Y are as many as a plain checkpointed
    network's block inputs.
    """
    seen: list[weakref.ref[Tensor]] = []
    blocks: list[nn.Module] = [Spy(256, seen) for _ in range(12)]
    if checkpoint == "plain":
        model: nn.Module = Checkpointed(blocks)
    else:
        model = DenseStack(blocks, checkpoint=checkpoint)
    x = torch.randn(4, 256, requires_grad=True)
    y = model(x)
    gc.collect()
    assert sum(ref() is not None for ref in seen) == kept
    y.sum().backward()


# Gains and parameter groups


def test_skips_with_gains_are_the_formula() -> None:
    branches = [nn.Linear(4, 4), nn.Linear(4, 4)]
    stack = SkipsWithGains(branches)
    x = torch.randn(3, 4)
    plain = x + branches[0](x)
    assert torch.equal(stack(x), plain + branches[1](plain))
    with torch.no_grad():
        stack[0].gain.fill_(0.5)
        stack[1].gain.fill_(-2.0)
    half = 0.5 * x + branches[0](x)
    torch.testing.assert_close(stack(x), -2.0 * half + branches[1](half))
    assert GainedResidual(nn.Identity())(x.bfloat16()).dtype == torch.bfloat16


def test_parameter_groups_cover_every_parameter_once() -> None:
    model = nn.ModuleList(
        [DenseStack([Block() for _ in range(3)]), SkipsWithGains([nn.Linear(2, 2)])]
    )
    model.tied = model[0].blocks[0].mlp
    model[1][0].branch.bias.requires_grad_(False)
    groups = param_groups(model, 0.1, lr=1e-3, dwa_lr_mult=3.0)
    by_name = {g["name"]: g for g in groups}
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert by_name["dwa"]["params"] == [model[0].dwa.weight]
    assert (by_name["dwa"]["lr"], by_name["decay"]["lr"]) == (3e-3, 1e-3)
    assert [by_name[n]["weight_decay"] for n in ("decay", "no_decay", "dwa")] == [0.1, 0.0, 0.0]
    assert all(p.ndim >= 2 for p in by_name["decay"]["params"])
    assert {g["name"]: g["weight_decay"] for g in param_groups(model, 0.1, decay_dwa=True)}[
        "dwa"
    ] == 0.1
    with pytest.raises(ValueError, match="dwa_lr_mult needs lr"):
        param_groups(model, 0.1, dwa_lr_mult=2.0)


# Surgery


def test_densified_model_equals_the_loop_and_keeps_its_keys() -> None:
    model = Net().double()
    keys, x = list(model.state_dict()), torch.randn(4, 3, dtype=torch.float64)
    before, before_grads = model(x), grads(model, x)
    assert densify(model, 2, dtype=torch.float64) is model
    assert torch.equal(model(x), before)
    for a, b in zip(grads(model, x), before_grads, strict=False):
        assert torch.equal(a, b)
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert [k for k in model.state_dict() if k not in keys] == ["dwa.weight", "dwa.geometry"]
    randomise(model.dwa)
    raw = [lambda t, b=b: Block.forward(b, t) for b in model.blocks]
    want = model.head(oracle(model.dwa, model.embed(x), raw))
    assert relative(model(x), want) < 1e-13
    undensify(model)
    assert type(model) is Net
    assert {type(b) for b in model.blocks} == {Block}
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("checkpoint", [True, "mix"])
def test_densified_recomputation(checkpoint: Any) -> None:
    model = randomise_model(densify(Net(), 2, dtype=torch.float64).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    want = grads(model, x)
    other = densify(Net(), 2, dtype=torch.float64, checkpoint=checkpoint).double()
    other.load_state_dict(model.state_dict())
    for a, b in zip(grads(other, x), want, strict=True):
        assert relative(a, b) < 1e-12


def randomise_model(model: nn.Module) -> Any:
    dwa = model.dwa
    assert isinstance(dwa, DWA)
    randomise(dwa)
    return model


def test_copies_and_pickles_are_independent_models() -> None:
    model = randomise_model(densify(Net(), 2))
    x = torch.randn(4, 3)
    want = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), want)
        assert type(clone) is type(model)
        with torch.no_grad():
            clone.dwa.weight.zero_()
        assert not torch.equal(clone(x), want)
        assert torch.equal(model(x), want)
        assert type(undensify(clone)) is Net
    made_anew = type(model)()  # the class alone is a plain model
    assert made_anew(x).shape == want.shape
    assert type(densify(made_anew)) is type(model)


def test_a_copy_of_a_part_is_the_plain_part_and_drags_nothing_along() -> None:
    model = randomise_model(densify(Net(), 2))
    x = torch.randn(4, 3)
    want = model(x)
    block, plain = model.blocks[1], Net().blocks[1]
    plain.load_state_dict(block.state_dict())
    size, stream = len(pickle.dumps(plain)), torch.randn(4, 8)
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert type(clone) is type(plain)
        assert vars(clone).keys() == vars(plain).keys()
        assert torch.equal(clone(stream), plain(stream))
    assert len(pickle.dumps(block)) < size + 200 < len(pickle.dumps(model))
    stack = copy.deepcopy(model.blocks)
    assert {type(b) for b in stack} == {type(plain)}
    assert torch.equal(model(x), want)  # the model itself has kept its averages


def test_a_block_that_refers_to_its_model_is_copied_with_a_densified_model() -> None:
    model = randomise_model(densify(Net(), 2))
    model.blocks[2].__dict__["owner"] = model  # not a child: a plain reference back
    x = torch.randn(4, 3)
    want = model(x)
    for clone in (copy.deepcopy(model.blocks[2]), pickle.loads(pickle.dumps(model.blocks[2]))):
        assert clone.owner is not model
        assert clone.owner.blocks[2] is clone
        assert torch.equal(clone.owner(x), want)


def test_copies_of_tied_blocks_keep_their_places() -> None:
    model, x = Net(depth=2), torch.randn(4, 8)
    model = randomise_model(densify(model, blocks=[*model.blocks, *model.blocks]))
    clone = copy.deepcopy(model)
    assert clone.blocks[0] is not model.blocks[0]
    want = run_in_order([*model.blocks] * 2, x)
    assert torch.equal(run_in_order([*clone.blocks] * 2, x), want)
    assert not torch.equal(run_in_order([*undensify(clone).blocks] * 2, x), want)


def run_in_order(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_hooks_run_inside_and_the_average_after() -> None:
    model = randomise_model(densify(Net()))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    inputs: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    model(torch.randn(2, 3))
    x0 = model.embed
    assert x0 is not None
    assert not torch.equal(seen[0], inputs[0])  # X_1 and Y_1


def test_weight_tying_by_an_explicit_sequence() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Block()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.layer(x)
            return x

    model = Tied().double()
    layer = model.layer
    densify(model, blocks=[layer] * 4, dtype=torch.float64)
    randomise_model(model)
    x = torch.randn(2, 8, dtype=torch.float64)
    want = oracle(model.dwa, x, [lambda t: Block.forward(layer, t)] * 4)
    assert relative(model(x), want) < 1e-13
    assert torch.equal(model(x), model(x))
    assert "given as modules" in str(report(model))


def test_a_pass_that_raises_is_abandoned() -> None:
    model = randomise_model(densify(Net()))
    x = torch.randn(2, 3)
    want = model(x)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
        model(torch.randn(2, 5))
    handle = model.blocks[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch.equal(model(x), want)
    with pytest.raises(RuntimeError, match="the run ended after 4 of 6 blocks"):
        model(x, stop=4)
    assert torch.equal(model(x), want)


def test_blocks_out_of_order_are_refused() -> None:
    model = densify(Net())
    with pytest.raises(
        RuntimeError, match=r"block 3 of 6 was called out of order \(no forward pass"
    ):
        model.blocks[2](torch.randn(2, 8))
    model.blocks[0](torch.randn(2, 8))
    with pytest.raises(RuntimeError, match=r"block 3 of 6 .* \(1 blocks were done\)"):
        model.blocks[2](torch.randn(2, 8))
    with pytest.raises(TypeError, match="the first block's input must be a tensor"):
        model.blocks[0](None)


def test_threads_do_not_mix() -> None:
    model = randomise_model(densify(Net()))
    xs = [torch.randn(2, 3) for _ in range(4)]
    want = [model(x) for x in xs]
    barrier, got = threading.Barrier(4), {}

    def work(n: int) -> None:
        handle = model.blocks[2].register_forward_hook(lambda *_: None)
        barrier.wait()
        got[n] = model(xs[n])
        handle.remove()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[n], want[n]) for n in range(4))


def test_nothing_is_held_after_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "STACK", 0)  # by reference, although small
    model = densify(Net())
    refs: list[Any] = []
    handle = model.blocks[1].register_forward_hook(lambda m, a, out: refs.append(weakref.ref(out)))
    y = model(torch.randn(2, 3))
    handle.remove()
    assert refs[0]() is not None
    del y
    gc.collect()
    assert refs[0]() is None


def test_foreign_checkpoint_over_several_blocks_is_refused_and_over_one_works() -> None:
    class Segments(Net):
        def forward(self, x: Tensor, scale: float = 1.0, stop: int | None = None) -> Any:
            x = self.embed(x)
            x = torch.utils.checkpoint.checkpoint_sequential(
                list(self.blocks), 2, x, use_reentrant=False
            )
            return self.head(x)

    model = densify(Segments())
    y = model(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="recomputed a checkpointed region"):
        y.sum().backward()


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="older compilers break the graph")
def test_compiled_surgery_is_one_graph() -> None:
    torch._dynamo.reset()
    model = randomise_model(densify(Net(), 2))
    x = torch.randn(4, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for block in model.blocks:  # regional compilation: the averages stay outside
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x), compiled(x), rtol=1e-5, atol=1e-6)


def test_discovery() -> None:
    assert find_blocks(Net())[0] == "blocks"

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16))

    model = nn.Module()
    model.layers = nn.ModuleList(Experts() for _ in range(3))
    assert find_blocks(model)[0] == "layers"
    with pytest.raises(
        ValueError, match=r"several stacks of equal length.*'encoder\.layers' \(3 x Trans"
    ):
        densify(nn.Transformer(8, 2, 3, 3, 16, batch_first=True))
    with pytest.raises(ValueError, match=r"no stack of equal blocks found.*no ModuleList"):
        densify(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"blocks='head' is no stack.*Candidates: 'blocks' \(6 x Block\)"
    ):
        densify(Net(), blocks="head")
    net = Net()
    with pytest.raises(ValueError, match=r"entries \[1\] are not"):
        densify(net, blocks=[net.blocks[0], torch.sin])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="itself the stack; use DenseStack"):
        densify(nn.Sequential(Block(), Block()))


def test_densifying_twice_is_refused() -> None:
    model = densify(Net())
    with pytest.raises(ValueError, match="this Net is densified already"):
        densify(model)
    outer = nn.ModuleDict({"a": model})
    with pytest.raises(ValueError, match="these blocks are densified already"):
        densify(outer, blocks="a.blocks")
    with pytest.raises(ValueError, match="this Net is not densified"):
        undensify(Net())
    with pytest.raises(ValueError, match="this Net is not densified"):
        report(Net())
    changed = densify(Net())
    changed.blocks[0].__class__ = type("Wrapped", (type(changed.blocks[0]),), {})
    with pytest.raises(ValueError, match="classes were changed after densify"):
        undensify(changed)


def test_set_grad_checkpointing_is_for_models_that_have_it() -> None:
    assert not hasattr(densify(Net()), "set_grad_checkpointing")

    class Own(Net):
        asked: bool | None = None

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.asked = enable

    model = densify(Own())
    model.set_grad_checkpointing(False)  # the model's own, not timm's
    assert model.asked is False


def test_a_block_left_out_is_declared() -> None:
    class Dropping(Net):
        left_out: tuple[int, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            for n, block in enumerate(self.blocks, start=1):
                x = skip_block(self, x) if n in self.left_out else block(x)
            return x

    plain = Dropping()
    depth = len(plain.blocks)
    calls: list[Any] = [copy.deepcopy(b) for b in plain.blocks]
    model = densify(plain, 2)
    randomise_model(model)
    x = torch.randn(2, 3, 8)
    for left_out in ((), (1,), (2, 3), (depth,), tuple(range(1, depth + 1))):
        model.left_out = left_out
        taken = [nn.Identity() if n in left_out else b for n, b in enumerate(calls, start=1)]
        torch.testing.assert_close(model(x), oracle(model.dwa, x, taken), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="not densified"):
        skip_block(Net(), x)


def test_a_blocks_own_pickled_state_is_respected() -> None:
    model = densify(nn.ModuleDict({"stack": nn.Sequential(WithHandle(), WithHandle())}))
    loaded = pickle.loads(pickle.dumps(model))
    assert [b.handle() for b in loaded["stack"]] == [1, 1]
    x = torch.randn(2, 4)
    assert torch.equal(loaded["stack"](x), model["stack"](x))


class WithHandle(nn.Linear):
    """Holds what no pickle can, and leaves it out of its state."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.handle = lambda: 1

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = lambda: 1


def test_named_tuples_stay_named() -> None:
    out = Pair(torch.ones(2), 3)
    y = DWA(2, init_scale=0.5).begin(torch.ones(2))(out)
    assert type(y) is Pair
    assert y.first.tolist() == [1.5, 1.5]
    assert y.second == 3


class Pair(NamedTuple):
    first: Tensor
    second: int


@pytest.mark.parametrize("value", [1, 0, "all", None])
def test_other_values_of_checkpoint_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoint must be False, True or 'mix'"):
        DenseStack([nn.Linear(2, 2)], checkpoint=value)


def test_averages_of_every_kind_are_a_group_of_their_own() -> None:
    for averages in (DWA(4), DWAModules(4), *split(DWA(4), [2])):
        model = nn.ModuleDict({"averages": averages, "head": nn.Linear(2, 2, bias=False)})
        groups = param_groups(model, 0.1, lr=1.0, dwa_lr_mult=3.0)
        found = {g["name"]: (g["params"], g["weight_decay"], g["lr"]) for g in groups}
        assert set(found) == {"decay", "dwa"}
        assert list(map(id, found["dwa"][0])) == list(map(id, averages.parameters()))
        assert found["dwa"][1:] == (0.0, 3.0)


def test_lists_without_modules_are_no_stack() -> None:
    model = Net()
    model.nothing = nn.ModuleList([None] * 40)  # type: ignore[list-item]
    assert find_blocks(model)[0] == "blocks"


# torch.nn


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_encoder_is_unchanged_at_the_start(norm_first: bool, dtype: torch.dtype) -> None:
    """Training and evaluation, with and without gradients, padding and causal masks."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False).to(dtype)
    x = torch.randn(3, 7, 16).to(dtype)
    pad = torch.zeros(3, 7, dtype=torch.bool)
    pad[0, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=dtype)
    cases: list[dict[str, Any]] = [
        {},
        {"src_key_padding_mask": pad},
        {"mask": causal, "is_causal": True},
    ]

    def outputs() -> list[Tensor]:
        found = []
        for train in (True, False):
            encoder.train(train)
            for case in cases:
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        torch.manual_seed(0)
                        found.append(encoder(x, **case))
        return found

    before = outputs()
    densify(encoder, 2)
    for a, b in zip(outputs(), before, strict=True):
        assert torch.equal(a, b)


def test_nested_tensors_are_off_while_densified() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3).eval()
    x, pad = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    reference = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    reference.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        want = reference(x, src_key_padding_mask=pad)
        densify(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=pad), want)
    assert "enable_nested_tensor = False" in str(report(encoder))
    undensify(encoder)
    assert encoder.enable_nested_tensor


def test_torch_decoder_averages_its_own_stream() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 4).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    before = decoder(x, memory)
    densify(decoder, 1, 2)
    assert torch.equal(decoder(x, memory), before)
    randomise_model(decoder)
    blocks = [lambda t, m=m: type(m).forward(m, t, memory) for m in decoder.layers]
    torch.testing.assert_close(
        decoder(x, memory), oracle(decoder.dwa, x, blocks), rtol=1e-5, atol=1e-5
    )
