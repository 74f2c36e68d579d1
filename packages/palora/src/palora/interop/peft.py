"""Standard LoRA files from task adapters and back, as PEFT, vLLM and diffusers read them.

Files are written and read directly (safetensors and JSON); PEFT itself is not needed.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palora.core import functional as PF
from palora.core.checkpoint import is_adapter_key, read_tensors, write_json, write_tensors
from palora.core.inject import adapted_layers, inject
from palora.core.layers import LayerSpec
from palora.core.preference import PreferenceLike, as_preference, state_of
from palora.core.targets import classify

__all__ = ["from_peft", "to_peft"]

PREFIX = "base_model.model."


def to_peft(
    model: nn.Module,
    dir: str | os.PathLike[str],
    preference: PreferenceLike | None = None,
    *,
    save_base: bool = True,
) -> None:
    """Write the adapters as standard LoRA folders.

    Args:
        model: an injected model whose adapted layers are Linear, Hugging Face Conv1D, Embedding
            or ungrouped convolutions with ``conv="spatial"``.
        dir: the folder.
        preference: None writes one LoRA per task, in sub-folders by task name (``lora_alpha`` = α,
            rank r); a λ writes ONE LoRA of rank T·r that computes exactly W(λ).
        save_base: where the base was trained too, write it as ``base.safetensors`` beside them
            (the LoRA alone does not reproduce the model); False only warns.

    Raises:
        ValueError: a layer has no LoRA form (folded or grouped convolution, MultiheadAttention), or
            λ is one per sample.
        RuntimeError: the model is not injected.
        ImportError: safetensors is not installed.
    """
    state = state_of(model)
    layers = adapted_layers(model)
    for name, layer in layers:
        _check(name, layer)
    folder = Path(dir)
    if state.config["train_base"]:
        if save_base:
            plain = {k: v for k, v in model.state_dict().items() if not is_adapter_key(k)}
            write_tensors(folder / "base.safetensors", plain, {"format": "pt"})
        else:
            warnings.warn(
                "the base was trained (train_base=True) and is not written: these adapters "
                "reproduce the model only on top of its present base weights",
                stacklevel=2,
            )
    if preference is None:
        for t, task in enumerate(state.tasks):
            tensors: dict[str, Tensor] = {}
            for name, layer in layers:
                tensors |= _tensors(name, layer, layer.palora_A[t], layer.palora_B[t])
            ranks = {name: layer._palora_spec.rank for name, layer in layers}
            rslora = state.config["scaling"] == "rslora"
            alphas = {name: _alpha(layer._palora_spec, rslora) for name, layer in layers}
            _write(folder / task, model, layers, tensors, ranks, alphas, rslora)
        return
    lam = as_preference(preference, state.tasks).detach()
    if lam.dim() != 1:
        raise ValueError(f"one LoRA holds one preference, got one per sample: {tuple(lam.shape)}")
    tensors, ranks = {}, {}
    for name, layer in layers:
        spec, A, B = layer._palora_spec, layer.palora_A.detach(), layer.palora_B.detach()
        own = lam.to(B)
        if spec.exponent != 1.0:
            own = own.pow(spec.exponent) / own.pow(spec.exponent).sum()
        up = PF.stack_up(B, own) * spec.scale
        tensors |= _tensors(name, layer, PF.stack_down(A), up)
        ranks[name] = len(lam) * spec.rank
    _write(folder, model, layers, tensors, ranks, ranks, False)


def _alpha(spec: LayerSpec, rslora: bool) -> float:
    """α of one layer, from its scale: LoRA folders may come with an α for each."""
    return float(f"{spec.scale * (spec.rank**0.5 if rslora else spec.rank):.12g}")


def _check(name: str, layer: Any) -> None:
    spec = layer._palora_spec
    if spec.kind == "attention":
        raise ValueError(f"layer {name!r}: nn.MultiheadAttention has no standard LoRA form")
    if spec.kind == "conv" and spec.mode != "spatial":
        raise ValueError(
            f"layer {name!r}: a {spec.mode} convolution adapter is no LoRA; inject with "
            "conv='spatial', or target Linear layers only"
        )
    if spec.kind == "conv" and layer.groups != 1:
        raise ValueError(f"layer {name!r}: PEFT adapts grouped convolutions in another form")


def _tensors(name: str, layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The two tensors under the names and in the shapes that PEFT gives them."""
    spec = layer._palora_spec
    if spec.kind == "embedding":
        return {
            f"{PREFIX}{name}.lora_embedding_A": A,
            f"{PREFIX}{name}.lora_embedding_B": B,
        }
    if spec.kind == "conv":
        A = A.reshape(-1, *layer.weight.shape[1:])
        B = B.reshape(*B.shape, *([1] * len(layer.kernel_size)))
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def _targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The names as a list where PEFT's suffix matching picks just these layers, else a regex."""
    wanted = set(names)
    matched = {
        full
        for full, _ in model.named_modules()
        if any(full == n or full.endswith("." + n) for n in names)
    }
    if matched == wanted:
        return sorted(wanted)
    return "(?:" + "|".join(re.escape(n) for n in names) + ")"


def _write(
    folder: Path,
    model: nn.Module,
    layers: list[tuple[str, Any]],
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rslora: bool,
) -> None:
    names = [name for name, _ in layers]
    rank, alpha = ranks[names[0]], alphas[names[0]]
    # PEFT takes the first pattern that a name ends with: longer names first
    alike = all(ranks[n] == rank and alphas[n] == alpha for n in names)
    odd = [] if alike else sorted(names, key=len, reverse=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(model, names),
        "fan_in_fan_out": all(layer._palora_spec.kind == "conv1d-hf" for _, layer in layers),
        "use_rslora": rslora,
        "rank_pattern": {re.escape(n): ranks[n] for n in odd},
        "alpha_pattern": {re.escape(n): alphas[n] for n in odd},
        "modules_to_save": None,
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def from_peft(
    model: nn.Module,
    dirs: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
    *,
    train_base: bool = False,
) -> nn.Module:
    """Inject a plain model with T LoRA folders as its task adapters, in place.

    Args:
        model: the plain base model.
        dirs: LoRA folders by task name, or a sequence (tasks are named by the folders).
        train_base: see :func:`palora.inject`.

    Returns:
        The same object.

    Raises:
        ValueError: the LoRAs differ in rank, scale or layers; use a form other than plain LoRA; or
            adapt layers that the model does not have.
        RuntimeError: the model is injected already.
    """
    if not isinstance(dirs, Mapping):
        dirs = {Path(d).name: d for d in dirs}
    configs, files = {}, {}
    for task, folder in dirs.items():
        configs[task] = json.loads((Path(folder) / "adapter_config.json").read_text())
        files[task] = read_tensors(Path(folder) / "adapter_model.safetensors")
    first = next(iter(dirs))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        for task, config in configs.items():
            if config.get(key) != configs[first].get(key):
                raise ValueError(
                    f"{key} is {configs[first].get(key)!r} for {first} and {config.get(key)!r} "
                    f"for {task}: the adapters of one layer share rank and scale"
                )
    for task in dirs:
        if files[task].keys() != files[first].keys():
            raise ValueError(f"the LoRAs of {first} and {task} adapt different layers")
        if configs[task].get("use_dora") or configs[task].get("bias", "none") != "none":
            raise ValueError(f"the LoRA of {task} uses DoRA or biases, which palora does not mix")
    pairs: dict[str, dict[str, str]] = {}
    for key in files[first]:
        found = re.fullmatch(
            r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key
        )
        if found is None:
            raise ValueError(f"{key!r} is not a plain LoRA tensor")
        pairs.setdefault(found[1], {})[found[2]] = key
    modules = dict(model.named_modules())
    if lost := [n for n in pairs if n not in modules or classify(modules[n])[0] is None]:
        raise ValueError(f"the model has no layer to take the LoRA of {', '.join(lost)}")
    config = configs[first]
    ranks = {name: files[first][keys["A"]].shape[0] for name, keys in pairs.items()}
    alpha_pattern = config.get("alpha_pattern") or {}
    inject(
        model,
        list(dirs),
        rank={f"(?:{re.escape(name)})": r for name, r in ranks.items()},
        alpha=config["lora_alpha"],
        scaling="rslora" if config.get("use_rslora") else "lora",
        target=lambda name, module: name in pairs,
        conv="spatial",
        train_base=train_base,
    )
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            keys, spec = pairs[name], layer._palora_spec
            for pattern, alpha in alpha_pattern.items():
                if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                    root = spec.rank if not config.get("use_rslora") else spec.rank**0.5
                    spec.scale = alpha / root
                    break
            for t, task in enumerate(dirs):
                A, B = files[task][keys["A"]], files[task][keys["B"]]
                layer.palora_A[t].copy_(A.reshape(layer.palora_A[t].shape))
                layer.palora_B[t].copy_(B.reshape(layer.palora_B[t].shape))
    return model
