"""Third-party networks, unmodified: injection, both paths, per sample, merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import fill
from torch import Tensor, nn

import palora
from palora.examples.models import MODELS, SegNet, meta_model

COUNTS = {
    "lenet": (2, 27_450, {1: 30_880, 2: 34_310, 4: 41_170, 8: 54_890}, 54_900),
    "lenet3": (3, 30_510, {1: 36_135, 2: 41_760, 4: 53_010, 8: 75_510}, 91_530),
    "sarcos": (7, 139_015, {1: 160_715, 2: 182_415, 4: 225_815, 8: 312_615}, 973_105),
    "segnet-cityscapes": (2, 25_017_672, {4: 26_064_992}, 50_035_344),
    "segnet-nyuv2": (3, 25_055_185, {4: 26_640_865}, 75_165_555),
    "digits": (2, 4_948, {4: 7_188}, 9_896),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper_to_the_last_unit(name: str) -> None:
    tasks, base, totals, pamal = COUNTS[name]
    assert sum(p.numel() for p in meta_model(name).parameters()) == base
    assert tasks * base == pamal
    for rank, total in totals.items():
        found = palora.overhead(palora.inject(meta_model(name), tasks, rank=rank))
        assert (found.base, found.base + found.adapters) == (base, total)


def test_memory_claim() -> None:
    expected = {
        ("segnet-cityscapes", 2): ([1.047, 2.093, 4.186, 8.373], 23.89, 4.2, 23.8),
        ("segnet-nyuv2", 3): ([1.582, 3.164, 6.329, 12.657], 31.60, 6.3, 31.7),
    }
    for (name, tasks), (percents, exact, rounded, published) in expected.items():
        found = [
            palora.overhead(palora.inject(meta_model(name), tasks, rank=r)) for r in (1, 2, 4, 8)
        ]
        assert [round(100 * f.ratio, 3) for f in found] == percents
        assert round(found[2].vs_pamal, 2) == exact
        # the paper divides by the rounded percentage
        assert round(100 * found[2].ratio, 1) == rounded
        assert round(100 * (tasks - 1) / rounded, 1) == published


def check(
    plain: nn.Module, inputs: tuple[Any, ...], pick: Any, tol: float = 1e-8, **kw: Any
) -> nn.Module:
    """Merged = in context = per sample = tiled, and base keys unchanged."""
    plain = plain.double().eval()
    keys = set(plain.state_dict())
    checkpoint = copy.deepcopy(plain.state_dict())
    expected_base = pick(plain(*inputs))
    model = palora.inject(plain, 2, rank=2, **kw)
    with palora.preference(model, [0.3, 0.7]), torch.no_grad():
        torch.testing.assert_close(pick(model(*inputs)), expected_base, rtol=0, atol=tol)
    assert {k for k in model.state_dict() if "palora" not in k} == keys
    palora.load_base_state_dict(model, checkpoint)
    fill(model)
    lams = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    with torch.no_grad():
        outs = []
        for lam in lams:
            with palora.preference(model, lam):
                outs.append(pick(model(*inputs)))
            merged = palora.merge(model, lam)
            assert set(merged.state_dict()) == keys
            torch.testing.assert_close(outs[-1], pick(merged(*inputs)), rtol=0, atol=tol)
        assert (outs[0] - outs[1]).abs().max() > 1e-6
        with palora.preference(model, lams, allow_expand=True):
            rows = pick(model(*inputs))
        torch.testing.assert_close(rows[0], outs[0][0], rtol=0, atol=tol)
        torch.testing.assert_close(rows[1], outs[1][1], rtol=0, atol=tol)
        tiled = pick(palora.multi(model, lams, *inputs))
        tiled = tiled.flatten(0, 1) if tiled.shape[:2] != (2, 2) else tiled
        torch.testing.assert_close(tiled, torch.stack(outs), rtol=0, atol=tol)
    return model


def first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple | list) else out
    return found


def test_torchvision_resnet() -> None:
    models = pytest.importorskip("torchvision.models")
    model = check(models.resnet18(num_classes=5), (torch.randn(2, 3, 32, 32).double(),), first)
    assert len(palora.report(model).adapted) == 21


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_timm_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    options: dict[str, Any] = {"num_classes": 3}
    if name.startswith("vit"):
        options |= {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    elif name.startswith("swin"):
        options |= {
            "img_size": 64,
            "depths": (2, 2),
            "embed_dim": 16,
            "num_heads": (2, 2),
            "window_size": 4,
        }
    else:
        options |= {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    side = options.get("img_size", 64)
    # the relative-position index is a buffer: every Linear and Conv sees the batch first
    check(timm.create_model(name, **options), (torch.randn(2, 3, side, side).double(),), first)


def test_segnet_runs_with_unpooling() -> None:
    net = SegNet([7, 1])
    model = palora.inject(net, 2, rank=1)
    with torch.no_grad(), palora.preference(model, [0.5, 0.5]):
        seg, depth = model.eval()(torch.zeros(1, 3, 32, 32))
    assert (seg.shape, depth.shape) == ((1, 7, 32, 32), (1, 1, 32, 32))


def test_every_model_of_the_paper_is_listed() -> None:
    assert set(COUNTS) == set(MODELS)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_hugging_face_models(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=8,
        )  # fmt: skip
        net, kw = transformers.BertModel(config), {"exclude": "pooler.dense"}
        pick = lambda out: out.last_hidden_state
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8
        )
        config.use_cache = False
        net, kw = transformers.GPT2Model(config), {}
        pick = lambda out: out.last_hidden_state
    else:
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        net, kw = transformers.LlamaForCausalLM(config), {}
        pick = lambda out: out.logits
    model = check(net, (ids,), pick, 1e-7, **kw)
    kinds = {row[1] for row in palora.report(model).adapted}
    assert kinds == ({"conv1d-hf"} if kind == "gpt2" else {"linear"})


def test_generation_follows_the_preference_and_beams_follow_their_sample() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = palora.inject(transformers.LlamaForCausalLM(config), 2, rank=4, alpha=40.0).eval()
    fill(model)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    lams = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 3):
        singles = []
        for lam in lams:
            with palora.preference(model, lam):
                singles.append(model.generate(ids, num_beams=beams, **options))
        assert not torch.equal(singles[0], singles[1])
        with palora.preference(model, lams, allow_expand=True):
            both = model.generate(ids, num_beams=beams, **options)
        for i in range(2):
            n = min(both.shape[1], singles[i].shape[1])
            assert torch.equal(both[i, :n], singles[i][i, :n])


def test_hf_trainer_trains_the_objective(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from palora.interop.hf import PaloraTrainer, enable_gradient_checkpointing

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = palora.inject(transformers.BertForMaskedLM(config), ["a", "b"], rank=2)
    enable_gradient_checkpointing(model)
    data = [{"input_ids": torch.tensor([i % 20, 3, 4, 5])} for i in range(16)]

    def losses(out: Any, batch: Any) -> list[Tensor]:
        logits = out.logits.flatten(0, 1)
        ids = batch["input_ids"].flatten()
        return [
            nn.functional.cross_entropy(logits, ids),
            nn.functional.cross_entropy(logits, torch.zeros_like(ids)),
        ]

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=12, remove_unused_columns=False, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = PaloraTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data,
        palora_losses=losses, palora_schedule=palora.Schedule(2, num=3),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    rates = {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups}
    assert rates["adapters"] == pytest.approx(2 * rates["base"])
    ids = torch.tensor([[3, 4, 5, 6]])
    model.eval()
    with torch.no_grad():
        scores = []
        for lam in ([1.0, 0.0], [0.0, 1.0]):
            with palora.preference(model, lam):
                scores.append(torch.stack(losses(model(input_ids=ids), {"input_ids": ids})))
    assert scores[0][0] < scores[1][0]
    assert scores[1][1] < scores[0][1]
