"""End to end, command line against command line: lines-merge and mergekit on the same checkpoints.

Both merge three LLaMA-shaped bfloat16 checkpoints into one, interleaved, `--repeats` times, with warm
caches. The task: task arithmetic (sum of the task vectors times 1/3) and TIES (density 0.2, per tensor,
which is mergekit's scope; ours also with the paper's global scope). Wall and CPU time, peak anonymous
memory, and how many entries are the exact result rounded once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from checkpoints import SIZES, Usage, environment, make_family, measure, weight_files
from safetensors import safe_open

RECIPES = {
    "task_arithmetic": """merge_method: task_arithmetic
base_model: {base}
models:
{models}
parameters: {{lambda: 0.3333333333333333, normalize: false}}
dtype: bfloat16
""",
    "ties": """merge_method: ties
base_model: {base}
models:
{models}
parameters: {{density: 0.2, normalize: true, lambda: 0.5}}
dtype: bfloat16
""",
}


def mergekit(recipe: str, base: Path, models: list[Path], out: Path, work: Path) -> list[str]:
    """Return the command line of mergekit, with its lazy loader, which is its fast one."""
    lines = "\n".join(f"  - model: {model}\n    parameters: {{weight: 1.0}}" for model in models)
    file = work / f"{recipe}.yaml"
    file.write_text(RECIPES[recipe].format(base=base, models=lines))
    program = str(Path(sys.executable).with_name("mergekit-yaml"))
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card"]
    return [program, str(file), str(out), *options]


def lines_merge(recipe: str, base: Path, models: list[Path], out: Path, scope: str) -> list[str]:
    """Return the same merge as a command line of this package; LiNeS is off (beta 0)."""
    program = str(Path(sys.executable).with_name("lines-merge"))
    method = ["--method", recipe, "--beta", "0"]
    if recipe == "ties":
        method += ["--density", "0.2", "--scope", scope, "--alpha", "0.5"]
    else:
        method += ["--alpha", "0.3333333333333333"]
    return [program, "merge", str(base), *map(str, models), "-o", str(out), *method, "--quiet"]


def rounded_once(base: Path, models: list[Path], out: Path) -> float:
    """Return the share of entries of a task-arithmetic merge that are the exact value rounded once."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in weight_files(folder):
            with safe_open(file, "pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors

    start, merged, tuned = read(base), read(out), [read(model) for model in models]
    same = total = 0
    for name, value in start.items():
        exact = value.double()
        exact = exact + sum(model[name].double() - exact for model in tuned) * 0.3333333333333333
        same += int((exact.to(torch.bfloat16) == merged[name]).sum())
        total += value.numel()
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="168M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here for another run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    base, models = make_family(work, arguments.size)
    out = work / "out"

    runs: dict[str, list[Usage]] = {}
    exact = {}
    for repeat in range(arguments.repeats):
        for recipe in RECIPES:
            commands = {
                f"{recipe}, mergekit": mergekit(recipe, base, models, out, work),
                f"{recipe}, lines-merge": lines_merge(recipe, base, models, out, "tensor"),
            }
            if recipe == "ties":
                commands["ties (global), lines-merge"] = lines_merge(
                    recipe, base, models, out, "global"
                )
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                runs.setdefault(name, []).append(measure(command))
                print(
                    f"{repeat + 1}: {name}: {runs[name][-1].wall:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                if recipe == "task_arithmetic" and repeat == 0:
                    exact[name] = rounded_once(base, models, out)
    rows = {
        name: {
            "wall_s": median(usage.wall for usage in usages),
            "cpu_s": median(usage.cpu for usage in usages),
            "peak_anonymous_MiB": max(usage.peak_anonymous for usage in usages),
        }
        for name, usages in runs.items()
    }
    millions = SIZES[arguments.size].parameters() / 1e6
    print(f"three models of {millions:.0f} M parameters, bfloat16, medians of {arguments.repeats}")
    print(f"{'':32} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {'rounded once':>13}")
    for name, row in rows.items():
        share = f"{100 * exact[name]:.2f} %" if name in exact else ""
        print(
            f"{name:32} {row['wall_s']:8.2f} {row['cpu_s']:8.2f} "
            f"{row['peak_anonymous_MiB']:9.0f} {share:>13}"
        )
    for recipe, target in (("task_arithmetic", 5), ("ties", 10)):
        ratio = rows[f"{recipe}, mergekit"]["wall_s"] / rows[f"{recipe}, lines-merge"]["wall_s"]
        print(f"{recipe}: {ratio:.1f} times faster than mergekit end to end (target {target})")
    if arguments.json:
        result = {"rows": rows, "rounded_once": exact, "environment": environment("mergekit")}
        arguments.json.write_text(json.dumps(result, indent=1))
    if arguments.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
