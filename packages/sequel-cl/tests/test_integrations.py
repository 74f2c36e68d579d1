"""Penalties in Lightning's and Hugging Face's loops do what they do in a plain one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sequel
from sequel.integrations.steps import Steps
from sequel.testing import tiny_data

CLIP = 0.5  # small enough to bind in the first steps
KINDS: dict[str, Any] = {
    "ewc": lambda m: sequel.torch.EWC(m, lam=2.0),
    "online": lambda m: sequel.torch.EWC(m, lam=2.0, mode="online", gamma=0.9),
    "mas": lambda m: sequel.torch.MAS(m, lam=0.1),
    "si": lambda m: sequel.torch.SI(m, lam=2.0),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 6))


def tasks() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two tasks of six batches; the second permutes the pixels."""
    x, y, _, _ = tiny_data(48)
    x, y = torch.tensor(x, dtype=torch.float32).flatten(1), torch.tensor(y)
    out = []
    for order in (torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(1))):
        out.append([(x[i : i + 8, order], y[i : i + 8]) for i in range(0, 48, 8)])
    return out


def by_hand(net: nn.Module, kind: str, apply: str, clip_after: bool) -> Any:
    """The plain loop: two tasks, SGD with momentum, clipping after or before the penalty."""
    penalty = KINDS[kind](net)
    for number, batches in enumerate(tasks()):
        opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.5)
        for x, y in batches:
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            if not clip_after:
                nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            if kind == "si":
                penalty.before_step()
            if apply == "grad":
                penalty.add_grad_()
            if clip_after:
                nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            opt.step()
            if apply == "prox":
                penalty.prox_(0.1)
            if kind == "si":
                penalty.after_step()
        penalty.consolidate() if kind == "si" else penalty.consolidate(batches)
        assert number == 1 or sum(float(v.sum()) for v in penalty.omega.get().values()) > 0
    return penalty


def assert_same(net: nn.Module, penalty: Any, net2: nn.Module, penalty2: Any) -> None:
    for a, b in ((net, net2), (penalty, penalty2)):
        for name, value in a.state_dict().items():
            torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------- lightning
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


def module_of(pl: Any, net: nn.Module, manual: bool = False) -> Any:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if manual:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.5)

    return Module()


def loader(batches: Any) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None)


def trainer_of(pl: Any, callback: Any, folder: Path, **options: Any) -> Any:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
        default_root_dir=folder, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and its hardware
@pytest.mark.parametrize(
    ("kind", "apply"), [*((k, "grad") for k in KINDS), ("ewc", "prox"), ("si", "prox")]
)
def test_lightning_trains_as_the_plain_loop_does(kind: str, apply: str, tmp_path: Path) -> None:
    pl = lightning()
    from sequel.integrations.lightning import PenaltyCallback

    expected = network()
    other = by_hand(expected, kind, apply, clip_after=True)
    net = network()
    module, penalty = module_of(pl, net), KINDS[kind](net)
    for batches in tasks():
        callback = PenaltyCallback(penalty, apply=apply)
        trainer_of(pl, callback, tmp_path, gradient_clip_val=CLIP).fit(module, loader(batches))
    assert_same(net, penalty, expected, other)


@pytest.mark.filterwarnings("ignore")
def test_lightning_manual_optimisation_and_accumulation(tmp_path: Path) -> None:
    pl = lightning()
    from sequel.integrations.lightning import PenaltyCallback

    nets = []
    for manual in (False, True):
        net = network()
        module, penalty = module_of(pl, net, manual), KINDS["si"](net)
        for batches in tasks():
            trainer_of(pl, PenaltyCallback(penalty), tmp_path).fit(module, loader(batches))
        nets.append((net, penalty))
    assert_same(*nets[0], *nets[1])

    net = network()  # two half batches make the gradient of a whole one
    module, penalty = module_of(pl, net), KINDS["si"](net)
    for batches in tasks():
        halves = [(x[i : i + 4], y[i : i + 4]) for x, y in batches for i in (0, 4)]
        callback = PenaltyCallback(penalty)
        trainer_of(pl, callback, tmp_path, accumulate_grad_batches=2).fit(module, loader(halves))
    assert_same(net, penalty, *nets[0])


@pytest.mark.filterwarnings("ignore")
def test_lightning_checkpoints_hold_the_penalty(tmp_path: Path) -> None:
    pl = lightning()
    from sequel.integrations.lightning import PenaltyCallback

    net = network()
    module, penalty = module_of(pl, net), KINDS["ewc"](net)
    first, second = tasks()
    trainer = trainer_of(pl, PenaltyCallback(penalty), tmp_path)
    trainer.fit(module, loader(first))
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    fresh = network()
    loaded = KINDS["ewc"](fresh)
    again = trainer_of(pl, PenaltyCallback(loaded, consolidate=False), tmp_path)
    again.fit(
        module_of(pl, fresh), loader(second), ckpt_path=tmp_path / "one.ckpt", weights_only=False
    )
    assert_same(net, penalty, fresh, loaded)


def test_a_step_that_the_loss_scaler_skips_leaves_no_trace(tmp_path: Path) -> None:
    lightning()
    from sequel.integrations.lightning import PenaltyCallback

    net = network()
    penalty, opt = KINDS["si"](net), torch.optim.SGD(net.parameters(), 0.1)
    x, y = tasks()[0][0]
    nn.functional.cross_entropy(net(x), y).backward()
    next(net.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
    callback = PenaltyCallback(penalty)
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    callback.on_before_optimizer_step(scaled, None, opt)
    callback.on_train_batch_end()
    assert not any(p.any() for p in penalty.path.get().values())
    steps = Steps(penalty)
    steps.before(opt)
    steps.after(skipped=True)
    assert not any(p.any() for p in penalty.path.get().values())


# ----------------------------------------------------------------- hugging face
class Words(torch.utils.data.Dataset[Any]):
    """Sequences of nine tokens, the last of them padding in every third; the label is the first token's class."""

    def __init__(self, task: int) -> None:
        made = torch.Generator().manual_seed(task)
        self.ids = torch.randint(3, 30, (24, 9), generator=made)
        self.mask = torch.ones(24, 9, dtype=torch.long)
        self.mask[::3, 7:] = 0
        self.y = (self.ids[:, 0] + task) % 3

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.y[i]}


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def hf_trainer(model: Any, data: Any, callback: Any, folder: Path, **options: Any) -> Any:
    import transformers

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=6, num_train_epochs=1, max_grad_norm=CLIP,
        report_to=[], disable_tqdm=True, use_cpu=True, **{"save_strategy": "no", **options},
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    return Trainer(
        model=model, args=args, train_dataset=data, callbacks=[callback], optimizers=(opt, constant)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "apply"), [("ewc", "grad"), ("si", "grad"), ("mas", "prox")])
def test_hugging_faces_trainer_trains_as_the_plain_loop_does(
    kind: str, apply: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from sequel.integrations.hf import FILE, PenaltyCallback

    expected = bert()
    other = KINDS[kind](expected)
    for task in range(2):
        opt = torch.optim.SGD(expected.parameters(), 0.1, momentum=0.5)
        data = Words(task)
        for at in range(0, 24, 6):
            opt.zero_grad()
            part = slice(at, at + 6)
            out = expected(input_ids=data.ids[part], attention_mask=data.mask[part])
            nn.functional.cross_entropy(out.logits, data.y[part]).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), CLIP)
            if kind == "si":
                other.before_step()
            if apply == "grad":
                other.add_grad_()
            opt.step()
            if apply == "prox":
                other.prox_(0.1)
            if kind == "si":
                other.after_step()
        if kind == "si":
            other.consolidate()
            continue
        each: Any = [(data.ids[i : i + 1], data.mask[i : i + 1], data.y[i]) for i in range(24)]
        found = {n: torch.zeros_like(p) for n, p in expected.named_parameters()}
        expected.eval()
        for ids, mask, label in each:  # one sample at a time, as the definition says
            expected.zero_grad()
            logits = expected(input_ids=ids, attention_mask=mask).logits
            value = logits.pow(2).sum() if kind == "mas" else -logits.log_softmax(-1)[0, label]
            value.backward()
            for n, p in expected.named_parameters():
                found[n] += (p.grad.abs() if kind == "mas" else p.grad.pow(2)) / 24
        expected.train()
        now = {n: p.detach().clone() for n, p in expected.named_parameters()}
        if kind == "ewc":
            from sequel.algorithms.quadratic import merge
            from sequel.ops.torch import TorchOps

            other._store(merge(TorchOps(), other._state(), found, now))
        else:
            other._store(
                {
                    "omega": {n: other._state()["omega"][n] + v for n, v in found.items()},
                    "anchor": now,
                }
            )

    model = bert()
    penalty = KINDS[kind](model)
    for task in range(2):
        callback = PenaltyCallback(penalty, apply=apply)
        folder = tmp_path / str(task)
        hf_trainer(
            model, Words(task), callback, folder, save_strategy="steps", save_steps=3
        ).train()
        saved = folder / "checkpoint-3" / FILE
        assert saved.exists()
        if task == 1:
            fresh = KINDS[kind](bert())
            PenaltyCallback(fresh).load(folder / "checkpoint-3")
            assert any(v.any() for v in fresh.omega.get().values())
    for name, value in penalty.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, dict(expected.named_parameters())[name], rtol=1e-4, atol=1e-6)


def test_hugging_faces_fp16_needs_the_trainers_clipping() -> None:
    pytest.importorskip("transformers")
    from sequel.integrations.hf import PenaltyCallback

    callback = PenaltyCallback(KINDS["ewc"](network()))
    args = SimpleNamespace(fp16=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
        callback.on_train_begin(args, None, None, model=network())


# ------------------------------------------------------------------------ input
def test_bad_use_is_refused() -> None:
    net = network()
    with pytest.raises(TypeError, match=r"penalty must be sequel\.torch"):
        Steps(net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="apply"):
        Steps(KINDS["ewc"](net), apply="loss")
    steps = Steps(KINDS["ewc"](net))
    with pytest.raises(ValueError, match="holds 2 of the penalty's 4 parameters"):
        steps.before(torch.optim.SGD(net[1].parameters(), 0.1))  # type: ignore[index]
    with pytest.raises(ValueError, match="loader must be given"):
        steps.consolidate(None, None)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)  # another network's: nothing to do
    steps.before(other)
    steps.after()


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("hf", ["transformers"], "hf"),
    ],
)
def test_a_missing_library_is_told_with_its_extra(
    module: str, blocked: list[str], extra: str
) -> None:
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"try:\n    import sequel.integrations.{module}\nexcept ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"pip install sequel-cl[{extra}]" in out.stdout
