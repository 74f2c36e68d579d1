"""Geant4 through `geant4_pybind`: every design in a fresh process, after a check of the data sets.

Geant4's run manager is a singleton and its geometry cannot be rebuilt safely, so that a process simulates
one design and ends. Importing `geant4_pybind` without its data asks on stdin to download them; the check
here comes first.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi_surrogates.errors import Geant4DataMissing, missing

Floats = NDArray[np.floating[Any]]
# data set → (version, variable that Geant4 reads, MD5 of the archive where it is known)
DATA_SETS = {
    "G4EMLOW": ("8.8", "G4LEDATA", "328330009df633f7e9b3a9f445745298"),
    "G4PARTICLEXS": ("4.2", "G4PARTICLEXSDATA", "b63341cc97a472b04ff607b094493174"),
    "G4ENSDFSTATE": ("3.0", "G4ENSDFSTATEDATA", "c500728534ce3e9fb2fefa0112eb3a74"),
    "PhotonEvaporation": ("6.1.2", "G4LEVELGAMMADATA", "d80ba9bdefcf9e23487a26adfa273304"),
}
URL = "https://cern.ch/geant4-data/datasets"


def check_data(environ: Mapping[str, str] = os.environ) -> None:
    """Raise `Geant4DataMissing`, with the commands that help, unless the data sets are there.

    Either `GEANT4_DATA_DIR` names a folder that has them all, or every variable of `DATA_SETS` a folder.

    Example:
        >>> check_data({"GEANT4_DATA_DIR": "/nowhere"})
        Traceback (most recent call last):
            ...
        mi_surrogates.errors.Geant4DataMissing: Geant4's data sets G4EMLOW, G4PARTICLEXS, ...
    """
    root = environ.get("GEANT4_DATA_DIR")
    absent = []
    for name, (version, variable, _) in DATA_SETS.items():
        folders = [Path(root) / f"{name}{version}"] if root else []
        folders += [Path(environ[variable])] if variable in environ else []
        if not any(folder.is_dir() for folder in folders):
            absent.append(name)
    if absent:
        commands = "\n".join(
            f"  curl -L {URL}/{name}.{DATA_SETS[name][0]}.tar.gz | tar -xz -C $GEANT4_DATA_DIR"
            for name in absent
        )
        raise Geant4DataMissing(
            f"Geant4's data sets {', '.join(absent)} were not found. Make a folder, say "
            f"export GEANT4_DATA_DIR=$HOME/geant4-data, and run\n{commands}"
        )


class Geant4Simulator:
    """A simulator `(theta, n, seed) -> (x, y)` around a user's Geant4 set-up.

    Args:
        build: picklable `(g4, theta, n, seed) -> (x, y)`. It gets the module `geant4_pybind` in a fresh
            process whose engine is seeded, builds the detector with one run manager, runs n events and
            returns arrays.
        timeout: seconds for one design.
        module: what is imported in the process.

    Raises:
        MissingExtra: the module is not installed.
        Geant4DataMissing: before the import, if the data sets are not there.
    """

    def __init__(
        self,
        build: Callable[[Any, Floats, int, int], tuple[Any, Any]],
        *,
        timeout: float | None = None,
        module: str = "geant4_pybind",
    ) -> None:
        self.build, self.timeout, self.module = build, timeout, module

    def __call__(self, theta: Floats, n: int, seed: int) -> tuple[Floats, Floats]:
        """Simulate one design in a spawned process.

        Raises:
            RuntimeError: the process raised or died; with its traceback or exit status.
            TimeoutError: it ran for too long and was killed.
        """
        check_data()
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        args = (sender, self.build, self.module, np.array(theta), n, seed)
        process = context.Process(target=_work, args=args)
        process.start()
        sender.close()
        try:
            if not receiver.poll(self.timeout):
                raise TimeoutError(f"Geant4 was killed after {self.timeout:g} s")
            try:
                kind, found = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"the Geant4 process died with status {process.exitcode}"
                ) from None
        finally:
            process.kill()
            process.join()
            receiver.close()
        if kind == "missing":
            raise missing(self.module, "geant4")
        if kind == "error":
            raise RuntimeError(f"Geant4 failed:\n{found}")
        x, y = found
        return np.asarray(x), np.asarray(y)


def _work(
    sender: Any,
    build: Callable[[Any, Floats, int, int], tuple[Any, Any]],
    module: str,
    theta: Floats,
    n: int,
    seed: int,
) -> None:
    """Run in the fresh process: import, seed CLHEP's engine, build, send the events."""
    import importlib

    try:
        g4 = importlib.import_module(module)
    except ImportError:
        sender.send(("missing", None))
        return
    try:
        g4.G4Random.setTheSeed(seed % 2**31)
        sender.send(("events", build(g4, theta, n, seed)))
    except Exception:  # noqa: BLE001 (a simulator may raise anything)
        sender.send(("error", traceback.format_exc()))
