"""Saving and loading densified Hugging Face models by their own ``save_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denseformer.core.dwa import DWA
from denseformer.models.surgery import densify

FILE = "dwa.safetensors"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving needs safetensors: pip install 'denseformer[hf]'") from error
    return safetensors


def save(model: Any, folder: str | Path) -> None:
    """Write a densified model: its own files, as ``save_pretrained`` writes them, and ``dwa.safetensors``.

    The geometry stands in ``config.json`` under ``denseformer``. The folder also loads as the plain model.

    Raises:
        ValueError: the model is not densified.
        ImportError: safetensors is missing (extra ``hf``).
    """
    link = getattr(model, "_dense", None)
    if link is None:
        raise ValueError(f"this {type(model).__name__} is not densified")
    dwa: DWA = model.dwa
    spec = dwa.spec
    mask = None
    if spec.mask is not None:
        mask = [list(sources) for sources in spec.mask]
    model.config.denseformer = {
        "dilation": spec.dilation,
        "period": spec.period,
        "pattern": spec.pattern,
        "last_k": spec.last_k,
        "groups": spec.groups,
        "mask": mask,
        "blocks": _names(model, link.blocks) if link.name is None else link.name,
    }
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("dwa.")}
    model.save_pretrained(folder, state_dict=state)
    own = {k: v.detach().cpu().contiguous() for k, v in dwa.state_dict().items()}
    target = Path(folder) / FILE
    temporary = target.with_suffix(".tmp")
    _safetensors().torch.save_file(own, temporary)
    temporary.replace(target)


def _names(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Return the dotted name of each block, in the order of their calls."""
    names = {id(m): name for name, m in model.named_modules()}
    return [names[id(block)] for block in blocks]


def load(cls: Any, folder: str | Path, **kwargs: Any) -> Any:
    """Return the densified model that :func:`save` (or a Trainer) wrote.

    Args:
        cls: a model class with ``from_pretrained``, for example ``GPT2LMHeadModel``.
        folder: where it was written.
        **kwargs: for ``from_pretrained``.

    Raises:
        ValueError: the folder holds no densified model.
    """
    model = cls.from_pretrained(folder, **kwargs)
    config = getattr(model.config, "denseformer", None)
    if config is None:
        raise ValueError(f"{folder} holds no densified model: its config has no 'denseformer'")
    config = dict(config)
    blocks, rows = config.pop("blocks"), config.pop("mask")
    if rows is not None:
        mask = torch.zeros(len(rows), len(rows) + 1, dtype=torch.bool)
        for line, sources in zip(mask, rows, strict=True):
            line[sources] = True
        config["pattern"] = mask
    if isinstance(blocks, list):
        blocks = [model.get_submodule(name) for name in blocks]
    training = model.training
    state = _read(Path(folder))
    dtype = torch.float64 if state["weight"].dtype == torch.float64 else torch.float32
    densify(model, blocks=blocks, dtype=dtype, **config)
    model.dwa.load_state_dict(state)
    return model.train(training)


def _read(folder: Path) -> dict[str, Tensor]:
    """Return the DWA's tensors from its own file or from the model's."""
    library = _safetensors()
    if (folder / FILE).exists():
        return dict(library.torch.load_file(folder / FILE))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = {
            f
            for k, f in json.loads(index.read_text())["weight_map"].items()
            if k.startswith("dwa.")
        }
    found: dict[str, Tensor] = {}
    for name in names:
        if (folder / name).exists():
            with library.safe_open(folder / name, "pt") as source:
                keys = [k for k in source.keys() if k.startswith("dwa.")]  # noqa: SIM118
                found.update({k[4:]: source.get_tensor(k) for k in keys})
    if not found:
        raise ValueError(
            f"{folder} holds no weights of averages ({FILE} or dwa.* in the model's file)"
        )
    return found
