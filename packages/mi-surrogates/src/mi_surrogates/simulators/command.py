"""Any executable as a simulator: the design in a JSON file, the events in a table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi_surrogates.errors import missing

Floats = NDArray[np.floating[Any]]
FORMATS = ("npz", "csv", "parquet", "root")


class CommandSimulator:
    """Run a program for every call and read the events that it writes.

    In the command, `{theta}` is replaced by the path of a JSON file {"theta": {name: value}, "n": events,
    "seed": seed}, `{out}` by the path that the program must write, `{n}` and `{seed}` by the numbers.
    Every call has a folder of its own, which is also the program's working directory.

    Args:
        command: program and arguments; no shell is involved.
        names: of the parameters, in the order of θ.
        output: "npz" (arrays), "csv" (a header line), "parquet" (extra `parquet`) or "root" (a tree of flat
            branches, extra `root`).
        x: the columns, or the array in an npz file, with the true quantities.
        y: the columns, or the array, with the measurements.
        timeout: seconds after which the program, and what it started, is killed.
        env: variables added to the environment.
        tree: name of the tree in a ROOT file.

    Raises:
        ValueError: a command without `{out}`, or an unknown format.

    Example:
        >>> import sys
        >>> code = "import json, sys; d = json.load(open(sys.argv[1])); a = d['theta']['a']; "
        >>> code += "rows = '\\\\n'.join(f'{i},{a * i}' for i in range(d['n'])); "
        >>> code += "open(sys.argv[2], 'w').write('x,y\\\\n' + rows)"
        >>> run = CommandSimulator([sys.executable, "-c", code, "{theta}", "{out}"], ["a"], output="csv")
        >>> run(np.array([2.0]), 3, 0)[1].tolist()
        [[0.0], [2.0], [4.0]]
    """

    def __init__(
        self,
        command: Sequence[str],
        names: Sequence[str],
        *,
        output: str = "npz",
        x: str | Sequence[str] = "x",
        y: str | Sequence[str] = "y",
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        tree: str = "events",
    ) -> None:
        if output not in FORMATS:
            raise ValueError(f"output must be one of {', '.join(FORMATS)}, got {output!r}")
        if isinstance(command, str) or not any("{out}" in part for part in command):
            raise ValueError("command must be a list of arguments, one of them with {out}")
        self.command, self.names, self.output = list(command), list(names), output
        self.x = [x] if isinstance(x, str) else list(x)
        self.y = [y] if isinstance(y, str) else list(y)
        self.timeout, self.env, self.tree = timeout, dict(env or {}), tree

    def __call__(self, theta: Floats, n: int, seed: int) -> tuple[Floats, Floats]:
        """Run the program and return its events.

        Raises:
            RuntimeError: an exit status other than 0, with the end of its output; or no output file.
            TimeoutError: it ran for too long.
        """
        with tempfile.TemporaryDirectory(prefix="mi-surrogates-") as folder:
            design, out = Path(folder) / "theta.json", Path(folder) / f"events.{self.output}"
            values = {name: float(v) for name, v in zip(self.names, theta, strict=True)}
            design.write_text(json.dumps({"theta": values, "n": n, "seed": seed}), encoding="utf-8")
            words = {"{theta}": str(design), "{out}": str(out), "{n}": str(n), "{seed}": str(seed)}
            command = []
            for part in self.command:
                for key, word in words.items():
                    part = part.replace(key, word)
                command.append(part)
            try:
                status, printed = run_group(
                    command, folder, {**os.environ, **self.env}, self.timeout
                )
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"{command[0]} was killed after {self.timeout:g} s") from error
            if status != 0:
                tail = printed[-500:].decode(errors="replace").strip()
                raise RuntimeError(f"{command[0]} ended with status {status}: {tail}")
            if not out.exists():
                raise RuntimeError(f"{command[0]} ended with status 0 but wrote no {out.name}")
            return read_events(out, self.x, self.y, self.tree)


def run_group(
    command: Sequence[str], folder: str, env: Mapping[str, str], timeout: float | None
) -> tuple[int, bytes]:
    """Run a program in a group of its own, which is killed whole if anything goes wrong here.

    A wrapper script that is killed alone would leave its simulation running.

    Returns:
        The exit status, and what the program wrote to stderr, or else to stdout.

    Raises:
        subprocess.TimeoutExpired: it ran for too long.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        if sys.platform == "win32":  # pragma: no cover
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, err or out


def read_events(
    path: Path, x: Sequence[str], y: Sequence[str], tree: str = "events"
) -> tuple[Floats, Floats]:
    """Read the columns x and y (N, d) of a npz, csv, parquet or ROOT file.

    Raises:
        KeyError: a column is not there.
    """
    columns: Mapping[str, Any]
    if path.suffix == ".npz":
        with np.load(path) as data:
            columns = dict(data)
    elif path.suffix == ".csv":
        names = path.read_text(encoding="utf-8").split("\n", 1)[0].strip().split(",")
        table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        columns = {name.strip(): table[:, i] for i, name in enumerate(names)}
    elif path.suffix == ".parquet":
        try:
            import pandas
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise missing("pandas and pyarrow", "parquet") from error
        columns = {str(k): v.to_numpy() for k, v in pandas.read_parquet(path).items()}
    elif path.suffix == ".root":
        try:
            import uproot
        except ImportError as error:
            raise missing("uproot", "root") from error
        with uproot.open(path) as file:
            columns = file[tree].arrays(library="np")
    else:
        raise ValueError(f"the file must be one of {', '.join(FORMATS)}, got {path.name}")
    return _stack(columns, x, path), _stack(columns, y, path)


def _stack(columns: Mapping[str, Any], names: Sequence[str], path: Path) -> Floats:
    parts = []
    for name in names:
        if name not in columns:
            raise KeyError(f"{path.name} has no column {name!r}, only {', '.join(columns)}")
        part = np.asarray(columns[name])
        parts.append(part.reshape(part.shape[0], -1))
    return np.concatenate(parts, 1)
