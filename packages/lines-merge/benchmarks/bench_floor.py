"""merge_files against its floor, a plain loop that copies the same bytes, in one process.

The floor for T models of S bytes is reading (T + 1) S and writing S for every pass. The copy loop does just
that, chunk by chunk through one preallocated buffer. Interleaved, medians, warm and cold page cache.
Then the peak anonymous memory of whole processes as the model grows, under the same `max_memory`; and the
authors' way of merging (all checkpoints flattened to float32 vectors and stacked) for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from checkpoints import SIZES, drop_cache, environment, make_family, measure, weight_files

CHUNK = 8 << 20


def copy_loop(base: Path, models: list[Path], out: Path) -> None:
    """Read every byte of base and models, write the base's bytes; one buffer, no arithmetic."""
    out.mkdir()
    buffer = memoryview(bytearray(CHUNK))
    for file in weight_files(base):
        with open(out / file.name, "wb", buffering=0) as sink:
            for source in [file, *(model / file.name for model in models)]:
                with open(source, "rb", buffering=0) as handle:
                    while size := handle.readinto(buffer):
                        if source == file:
                            sink.write(buffer[:size])
            os.fsync(sink.fileno())


ONE_MERGE = """
import sys, lines_merge as lm
base, out, memory, *models = sys.argv[1:]
lm.merge_files(base, models, out, "{method}", max_memory=memory, alpha=0.4, beta=0.6,
               progress=False{options})
"""

FLATTEN = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
def flat(folder):
    parts = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
    state = {name: value for part in parts for name, value in part.items()}
    return torch.cat([state[name].float().reshape(-1) for name in sorted(state)])
base, *models = sys.argv[1:]
start = flat(base)
vectors = torch.vstack([flat(model) - start for model in models])
merged = vectors.sum(0)
result = (start + 0.4 * merged).to(torch.bfloat16)
torch.save(result, "/dev/null")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="168M", help="for the throughput")
    parser.add_argument("--memory-sizes", nargs="*", default=["168M", "500M"], choices=SIZES)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here for another run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import lines_merge as lm

    work = arguments.work or Path(tempfile.mkdtemp())
    base, models = make_family(work, arguments.size)
    out = work / "out"
    size = sum(file.stat().st_size for file in weight_files(base))
    moved = (len(models) + 2) * size

    def merge(method: str, **options: object) -> Callable[[], object]:
        return lambda: lm.merge_files(
            base, models, out, method, alpha=0.4, beta=0.6, progress=False, **options
        )

    jobs: dict[str, Callable[[], object]] = {
        "copy loop": lambda: copy_loop(base, models, out),
        "task arithmetic": merge("task_arithmetic"),
        "TIES, tensor scope": merge("ties", density=0.2, scope="tensor"),
        "TIES, global scope": merge("ties", density=0.2),
        "consensus": merge("consensus"),
    }
    seconds: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats):
        for cache in ("warm", "cold"):
            for name, job in jobs.items():
                shutil.rmtree(out, ignore_errors=True)
                if cache == "cold":
                    drop_cache(base, *models)
                else:
                    for file in weight_files(base, *models):
                        file.read_bytes()
                start = time.perf_counter()
                job()
                seconds.setdefault(f"{name}, {cache}", []).append(time.perf_counter() - start)
        print(f"round {repeat + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)

    rows = {name: median(values) for name, values in seconds.items()}
    print(f"{size / 1e6:.0f} MB a model, three models; a pass moves {moved / 1e9:.2f} GB")
    print(f"{'':28} {'seconds':>8} {'GB/s':>6} {'of the copy loop':>17}")
    for name, value in rows.items():
        share = rows[f"copy loop, {name.rpartition(', ')[2]}"] / value
        print(f"{name:28} {value:8.2f} {moved / value / 1e9:6.2f} {100 * share:15.0f} %")

    memory: dict[str, float] = {}
    for label in arguments.memory_sizes:
        first, others = make_family(work, label)
        for method, options in (("task_arithmetic", ""), ("ties", ", density=0.2")):
            code = ONE_MERGE.format(method=method, options=options)
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-c", code, str(first), str(out), arguments.max_memory]
            memory[f"{method}, {label}"] = measure([*command, *map(str, others)]).peak_anonymous
        shutil.rmtree(out, ignore_errors=True)
    idle = measure([sys.executable, "-c", "import lines_merge"]).peak_anonymous
    first, others = make_family(work, arguments.memory_sizes[0])
    flat = measure([sys.executable, "-c", FLATTEN, str(first), *map(str, others)])
    print(
        f"peak anonymous memory above the imports ({idle:.0f} MiB), max_memory {arguments.max_memory}"
    )
    for name, value in memory.items():
        print(f"{name:28} {value - idle:8.0f} MiB")
    flat_name = f"flatten and stack, {arguments.memory_sizes[0]}"
    print(f"{flat_name:28} {flat.peak_anonymous - idle:8.0f} MiB, {flat.wall:.1f} s")
    if arguments.json:
        result = {
            "seconds": rows,
            "peak_anonymous_MiB": memory,
            "idle_MiB": idle,
            "flatten": vars(flat),
            "environment": environment(),
        }
        arguments.json.write_text(json.dumps(result, indent=1))
    if arguments.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
