"""Real classes of transformers, timm, x-transformers and peft, tiny and with random weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import oracle, randomise, relative
from torch import Tensor, nn

from denseformer import analysis, densify, undensify
from denseformer import hf as dense_hf

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning",  # the older names of HF's checkpointing switches
    "ignore::DeprecationWarning",
)
transformers = pytest.importorskip("transformers")
if not transformers.utils.is_torch_available():
    pytest.skip("this transformers takes no torch as old as this", allow_module_level=True)
TOKENS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=6,
            n_embd=32,
            n_head=2,
            vocab_size=50,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(cls: str = "Llama") -> Any:
    config = getattr(transformers, f"{cls}Config")(
        num_hidden_layers=6, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, vocab_size=50, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return getattr(transformers, f"{cls}ForCausalLM")(config)


def bert() -> Any:
    return transformers.BertModel(
        transformers.BertConfig(
            num_hidden_layers=6,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
    )


def vit() -> Any:
    return transformers.ViTModel(
        transformers.ViTConfig(
            num_hidden_layers=6,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
    )


MODELS: dict[str, Any] = {
    "gpt2": (gpt2, TOKENS),
    "llama": (llama, TOKENS),
    "mistral": (lambda: llama("Mistral"), TOKENS),
    "qwen2": (lambda: llama("Qwen2"), TOKENS),
    "gemma": (lambda: llama("Gemma"), TOKENS),
    "bert": (bert, TOKENS),
    "vit": (vit, IMAGES),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    made, x = MODELS[name]
    model = made().to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def randomised(model: Any, scale: float = 0.2) -> Any:
    randomise(model.dwa, scale)
    return model


def gradients(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    first(model(x, **kwargs)).float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hugging_face_models_are_unchanged_at_the_start(name: str, dtype: torch.dtype) -> None:
    """Outputs in training (dropout on) and evaluation, all gradients, and the state dict's keys."""
    model, x = build(name, dtype)
    keys = set(model.state_dict())

    def everything() -> list[Tensor]:
        found = []
        for train in (True, False):
            model.train(train)
            torch.manual_seed(0)
            found.append(first(model(x)))
        grads = gradients(model, x)
        return [*found, *(g for n, g in sorted(grads.items()) if not n.startswith("dwa."))]

    before = everything()
    for kw in ({}, {"dilation": 4, "period": 5}, {"pattern": "last_k"}, {"pattern": "final"}):
        densify(model, **kw)
        for a, b in zip(everything(), before, strict=True):
            assert torch.equal(a, b)
        assert set(model.state_dict()) - keys == {"dwa.weight", "dwa.geometry"}
        assert model.dwa.weight.dtype == torch.float32
        undensify(model)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hidden_states_are_what_the_next_block_saw(name: str) -> None:
    model, x = build(name)
    randomised(densify(model.eval(), 2))
    inputs: list[Tensor] = []
    stack = model.transformer.h if name == "gpt2" else model.model.layers
    for block in stack:
        block.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 7
    for i in range(6):
        assert torch.equal(states[i], inputs[i])


def test_densified_gpt2_equals_the_loop_over_its_blocks() -> None:
    model, x = build("gpt2")
    model.double().eval()
    densify(model, 2, dtype=torch.float64)
    randomised(model)
    inner = model.transformer
    x0 = inner.wte(x) + inner.wpe(torch.arange(x.shape[1]))
    causal = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def raw(block: Any) -> Any:
        def call(t: Tensor) -> Tensor:
            return first(type(block).forward(block, t, attention_mask=causal))

        return call

    want = model.lm_head(inner.ln_f(oracle(model.dwa, x0, [raw(b) for b in inner.h])))
    assert relative(model(x).logits, want) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model, x = build(name)
    plain = model.eval().generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
    densify(model, 2)
    again = model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(plain, again)
    randomised(model)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(x, **options)
    assert torch.equal(greedy, model.generate(x, use_cache=False, **options))
    assert torch.equal(greedy, model.generate(x, cache_implementation="static", **options))
    beams = model.generate(x, num_beams=3, **options)
    assert torch.equal(beams, model.generate(x, num_beams=3, use_cache=False, **options))
    full = model(greedy, use_cache=False).logits
    cache, pieces = None, []
    for chunk in greedy.split(
        [5, 3, *[1] * (greedy.shape[1] - 8)], dim=1
    ):  # prefill in chunks, then decode
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_hugging_face_checkpointing(name: str) -> None:
    """The library's own, reentrant or not, and checkpoint=True, which also recomputes the mix."""
    model, x = build(name)
    densify(model.train(), 2)
    randomised(model)
    want = gradients(model, x)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for key, grad in gradients(model, x).items():
            torch.testing.assert_close(grad, want[key], rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    state = model.state_dict()
    for checkpoint in (True, "mix"):
        undensify(model)
        densify(model, 2, checkpoint=checkpoint)
        model.load_state_dict(state)
        for key, grad in gradients(model, x).items():
            torch.testing.assert_close(grad, want[key], rtol=1e-4, atol=1e-6)
    undensify(model)
    assert not model.is_gradient_checkpointing


def test_saving_and_loading(tmp_path: Any) -> None:
    model, x = build("gpt2")
    mask = torch.ones(6, 7, dtype=torch.bool).tril(1)
    mask[2] = False
    for n, kw in enumerate(({"dilation": 2}, {"pattern": mask}, {"pattern": "final"})):
        densify(model.eval(), **kw)
        randomised(model)
        dense_hf.save(model, tmp_path / str(n))
        want = model(x).logits
        again = dense_hf.load(transformers.GPT2LMHeadModel, tmp_path / str(n)).eval()
        assert torch.equal(again(x).logits, want)
        undensify(model)
        plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(n)).eval()
        assert torch.equal(plain(x).logits, model(x).logits)
    assert not list(tmp_path.glob("*/*.tmp"))
    with pytest.raises(ValueError, match="not densified"):
        dense_hf.save(model, tmp_path)
    model.config.denseformer = None
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no densified model"):
        dense_hf.load(transformers.GPT2LMHeadModel, tmp_path / "plain")


def test_loading_what_a_trainer_wrote(tmp_path: Any, capfd: Any) -> None:
    """There the averages stand in the model's own file, or in one of its shards."""
    model, x = build("gpt2")
    randomised(densify(model.eval(), 2))
    dense_hf.save(model, tmp_path)  # for the config field
    (tmp_path / "dwa.safetensors").unlink()
    for size in ("50MB", "40KB"):
        for old in tmp_path.glob("model*"):
            old.unlink()
        model.save_pretrained(tmp_path, max_shard_size=size)
        again = dense_hf.load(transformers.GPT2LMHeadModel, tmp_path).eval()
        assert torch.equal(again(x).logits, model(x).logits)
    field = model.config.denseformer
    undensify(model).config.denseformer = field  # the field without the weights
    model.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no weights of averages"):
        dense_hf.load(transformers.GPT2LMHeadModel, tmp_path / "none")
    capfd.readouterr()


def test_trainer_trains_the_averages(tmp_path: Any) -> None:
    model, x = build("gpt2")
    densify(model)
    before = model.dwa.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in x] * 4
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert float((model.dwa.weight.detach() - before).abs().max()) > 1e-3


def test_accelerate_trains_the_averages() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = build("llama")
    densify(model, 2)
    want = gradients(model, x)["dwa.weight"]
    accelerator = accelerate.Accelerator(cpu=True)
    before = model.dwa.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    optimizer.zero_grad()
    accelerator.backward(first(prepared(x)).float().square().mean())
    optimizer.step()
    trained = accelerator.unwrap_model(prepared).dwa.weight.detach()
    torch.testing.assert_close(trained, before - 1e-2 * want, rtol=0, atol=1e-7)


def test_peft_trains_the_averages_beside_adapters() -> None:
    peft = pytest.importorskip("peft")
    model, x = build("llama")
    densify(model, 2)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["dwa"], r=2)
    wrapped = peft.get_peft_model(model, config)
    trainable = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert [n for n in trainable if "dwa" in n] == [
        "base_model.model.dwa.modules_to_save.default.weight"
    ]
    loss = wrapped(input_ids=x, labels=x).loss
    loss.backward()
    active = wrapped.base_model.model.dwa.modules_to_save["default"].weight
    assert active.grad is not None
    assert float(active.grad.abs().max()) > 0


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="older compilers break the graph")
def test_compiled_gpt2_is_one_graph() -> None:
    torch._dynamo.reset()
    model, x = build("gpt2")
    randomised(densify(model.eval(), 4, 5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x, use_cache=False).logits
    torch.testing.assert_close(got, model(x, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_densifying_32_layers_touches_no_weight() -> None:
    config = transformers.LlamaConfig(
        num_hidden_layers=32,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=9,
    )
    model = transformers.LlamaForCausalLM(config)
    pointers = [p.data_ptr() for p in model.parameters()]
    densify(model, 4, 5)
    assert [p.data_ptr() for p in model.parameters()][: len(pointers)] == pointers
    layer = copy.deepcopy(model.model.layers[3])  # by itself it is a plain layer
    assert type(layer) is transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert len(list(layer.modules())) < len(list(model.modules())) / 30


# timm


def timm_vit(dtype: torch.dtype = torch.float32) -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=6,
        num_heads=2,
        num_classes=5,
        drop_path_rate=0.2,
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_timm_vit_is_unchanged_at_the_start(dtype: torch.dtype) -> None:
    model, images = timm_vit(dtype), IMAGES.to(dtype)
    keys = set(model.state_dict())
    for train in (True, False):
        model.train(train)
        torch.manual_seed(0)
        before = model(images)
        densify(model, 2)
        torch.manual_seed(0)
        assert torch.equal(model(images), before)
        assert set(model.state_dict()) - keys == {"dwa.weight", "dwa.geometry"}
        undensify(model)


def test_timm_checkpointing_goes_around_the_averages() -> None:
    model = densify(timm_vit().train(), 1, 2)
    randomised(model)
    want = gradients(model, IMAGES)
    model.set_grad_checkpointing()
    assert not model.grad_checkpointing
    for key, grad in gradients(model, IMAGES).items():
        torch.testing.assert_close(grad, want[key], rtol=1e-4, atol=1e-6)
    model.set_grad_checkpointing(False)
    assert model._dense.checkpoint is False
    undensify(model)
    model.set_grad_checkpointing()
    densify(model, 1, 2)  # taken over where it was on already
    assert model._dense.checkpoint is True
    assert gradients(model, IMAGES)
    model.grad_checkpointing = True  # by hand, past our switch
    with pytest.raises(RuntimeError, match="recomputed a checkpointed region"):
        gradients(model, IMAGES)
    undensify(model)
    assert model.grad_checkpointing


# x-transformers


def x_decoder(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    library = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = library.Decoder(dim=32, depth=6, heads=2, rotary_pos_emb=True, **kwargs)
    return library.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_x_transformers_decoder_is_unchanged_at_the_start(dtype: torch.dtype) -> None:
    model = x_decoder(dtype)
    keys = set(model.state_dict())
    for train in (True, False):
        model.train(train)
        before = model(TOKENS)
        densify(model, 2)
        assert torch.equal(model(TOKENS), before)
        assert model.dwa.depth == 6
        assert set(model.state_dict()) - keys == {"dwa.weight", "dwa.geometry"}
        undensify(model)
        assert torch.equal(model(TOKENS), before)


def test_x_transformers_average_follows_the_feed_forward() -> None:
    model = x_decoder(attn_flash=False).double().eval()
    stack = model.attn_layers
    densify(model, dtype=torch.float64)
    randomised(model)
    got = model(TOKENS)
    cloned = [copy.deepcopy(model)(TOKENS), pickle.loads(pickle.dumps(model))(TOKENS)]
    assert all(torch.equal(c, got) for c in cloned)
    dwa = copy.deepcopy(model.dwa)
    undensify(model)
    x0: list[Tensor] = []
    handle = stack.register_forward_pre_hook(lambda m, a: x0.append(a[0]))
    model(TOKENS)
    handle.remove()
    norm, stack.final_norm = stack.final_norm, nn.Identity()

    def block(n: int) -> Any:
        return lambda x: stack(x, layers_execute_order=(2 * n, 2 * n + 1))

    y = oracle(dwa, x0[0], [block(n) for n in range(6)])
    want = model.to_logits(norm(y))
    assert relative(got, want) < 1e-12


def test_x_transformers_decodes_with_its_cache() -> None:
    model = randomised(densify(x_decoder().eval(), 2))
    full = model(TOKENS)
    _, cache = model(TOKENS[:, :5], return_intermediates=True)
    step = model(TOKENS[:, :6], cache=cache, return_intermediates=True)[0]
    torch.testing.assert_close(step[:, -1], full[:, 5], rtol=1e-4, atol=1e-5)


def test_x_transformers_variants_that_do_not_fit_are_named() -> None:
    library = pytest.importorskip("x_transformers")
    with pytest.raises(ValueError, match="post-norm"):
        densify(x_decoder(pre_norm=False))
    with pytest.raises(ValueError, match="layer_dropout"):
        densify(x_decoder(layer_dropout=0.1))
    with pytest.raises(ValueError, match="checkpoint=True needs blocks"):
        densify(x_decoder(), checkpoint=True)
    two = nn.ModuleList([x_decoder(), x_decoder()])
    with pytest.raises(ValueError, match="2 AttentionLayers"):
        densify(two)
    attention_only = library.x_transformers.AttentionLayers(
        dim=32, depth=2, heads=2, custom_layers=("a", "a")
    )
    with pytest.raises(ValueError, match="no feed-forward"):
        densify(attention_only)


@pytest.mark.parametrize("dense", [False, True])
def test_cosine_follows_the_stream_of_x_transformers(dense: bool) -> None:
    model = x_decoder().eval()
    stack = model.attn_layers
    seen: list[Tensor] = []
    for norm, layer, _ in (stack.layers[n] for n in range(0, len(stack.layers), 2)):
        assert layer is not None
        norm[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    if dense:
        randomised(densify(model))
    model(TOKENS)
    streams, seen[:] = list(seen), []
    want = [torch.cosine_similarity(y, streams[0], dim=-1).mean() for y in streams]
    found = analysis.cosine_to_embedding(model, TOKENS)
    torch.testing.assert_close(found, torch.stack(want))


def test_saving_what_was_given_as_modules_and_float64(tmp_path: Any) -> None:
    model = gpt2().eval()
    densify(model, blocks=list(model.transformer.h)[1:4], dtype=torch.float64)
    with torch.no_grad():
        model.dwa.weight.add_(1e-10)
    dense_hf.save(model, tmp_path)
    loaded = dense_hf.load(transformers.GPT2LMHeadModel, tmp_path)
    assert torch.equal(loaded.dwa.weight, model.dwa.weight)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    undensify(loaded).save_pretrained(tmp_path / "plain")  # says no longer that it is densified
    with pytest.raises(ValueError, match="its config has no 'denseformer'"):
        dense_hf.load(transformers.GPT2LMHeadModel, tmp_path / "plain")


def test_timm_switch_returns_to_what_densify_was_told() -> None:
    model = densify(timm_vit(), checkpoint="mix")
    model.set_grad_checkpointing()
    assert model._dense.checkpoint is True
    model.set_grad_checkpointing(False)
    assert model._dense.checkpoint == "mix"
