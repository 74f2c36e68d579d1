"""Print how long each package takes to import over torch, and all of them together.

python tests-integration/import_times.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from conftest import PACKAGES

CODE = """
import time, torch
start = time.perf_counter()
import {modules}
print(time.perf_counter() - start)
"""


def seconds(*modules: str, repeats: int = 3) -> float:
    """Return the median time of importing modules in a fresh interpreter that has torch already."""
    command = [sys.executable, "-c", CODE.format(modules=", ".join(modules))]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)


if __name__ == "__main__":
    for package in PACKAGES:
        print(f"{package.dist:20} {seconds(package.module):6.2f} s over torch")
    print(
        f"{'all together':20} {seconds(*(package.module for package in PACKAGES)):6.2f} s over torch"
    )
