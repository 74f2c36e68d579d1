"""LLaMA-shaped random checkpoints on disk, and what the benchmarks measure of a process."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA."""

    hidden: int
    layers: int
    intermediate: int
    vocab: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by their Hugging Face names."""
        h, m = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            block = f"model.layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{block}self_attn.{name}.weight"] = (h, h)
            for name, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
                shapes[f"{block}mlp.{name}_proj.weight"] = shape
            for name in ("input", "post_attention"):
                shapes[f"{block}{name}_layernorm.weight"] = (h,)
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(torch.Size(shape).numel() for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """Return the model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "168M": Shape(hidden=1024, layers=8, intermediate=2816),
    "500M": Shape(hidden=1536, layers=14, intermediate=4224),
    "1B": Shape(hidden=2048, layers=17, intermediate=5632),
}


def write_checkpoint(folder: Path, shape: Shape, seed: int, *, base: int, shards: int = 2) -> None:
    """Write base noise of seed `base` plus a small update of seed `seed`, bfloat16, in shards."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    shapes = list(shape.tensors().items())
    weight_map, total = {}, 0
    cut = -(-len(shapes) // shards)
    for number in range(shards):
        part = {}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        for index, (name, size) in enumerate(shapes[number * cut : (number + 1) * cut]):
            key = number * cut + index
            values = (
                torch.randn(size, generator=torch.Generator().manual_seed(base * 9973 + key)) * 0.02
            )
            if seed != base:
                noise = torch.randn(
                    size, generator=torch.Generator().manual_seed(seed * 7919 + key)
                )
                values += 0.002 * noise
            part[name] = values.to(torch.bfloat16)
            weight_map[name] = file
            total += part[name].numel() * 2
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_family(work: Path, size: str, models: int = 3) -> tuple[Path, list[Path]]:
    """Return the folders of a base and of its fine-tuned models, written if they are not there."""
    folders = [work / size / name for name in ("base", *(f"ft{i}" for i in range(models)))]
    for seed, folder in enumerate(folders):
        write_checkpoint(folder, SIZES[size], seed, base=0)
    return folders[0], folders[1:]


def weight_files(*folders: Path) -> list[Path]:
    """Return the safetensors files of some checkpoints."""
    return sorted(file for folder in folders for file in folder.glob("*.safetensors"))


def drop_cache(*folders: Path) -> None:
    """Ask the kernel to forget the files' pages, so that the next read comes from the disk."""
    for file in weight_files(*folders):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Usage:
    """What a finished process took."""

    wall: float
    cpu: float
    peak_anonymous: float  # MiB; file pages in the page cache are not a process's own


def measure(command: list[str], env: dict[str, str] | None = None) -> Usage:
    """Run a command; poll its anonymous memory every 10 ms."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    peak = 0

    def poll() -> None:
        nonlocal peak
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                return
            for line in status.splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.01)

    watcher = threading.Thread(target=poll)
    watcher.start()
    _, errors = process.communicate()
    wall = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(wall, cpu, peak / 1024)


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def environment(*peers: str) -> dict[str, str]:
    """Say where the numbers were made."""
    versions = {name: metadata.version(name) for name in ("torch", "safetensors", "numpy", *peers)}
    return {
        "python": platform.python_version(),
        **versions,
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "command": " ".join(sys.argv),
    }
