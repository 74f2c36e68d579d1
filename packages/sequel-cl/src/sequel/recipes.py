"""Named scenarios, and runs made from a configuration."""

from __future__ import annotations

import importlib.resources
import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

from sequel import _check, nn, scenarios
from sequel import data as datasets
from sequel.algorithms import ALGORITHMS, Algorithm
from sequel.callbacks import Callback, Checkpoint
from sequel.learner import Learner
from sequel.loggers import CSVLogger
from sequel.result import Result
from sequel.scenarios import Dataset, Scenario

__all__ = ["DEFAULTS", "REPRO", "configs", "make_algorithm", "make_scenario", "read", "run"]

KINDS = ("permuted", "rotated", "class", "task", "domain")
DATA = ("digits", "mnist", "fashion", "kmnist", "mnist-test", "cifar10", "cifar100")

DEFAULTS: dict[str, Any] = {
    "scenario": "permuted-digits",
    "tasks": 5,
    "algo": "naive",
    "params": {},
    "backend": "torch",
    "epochs": 3,
    "batch_size": 16,
    "lr": 0.05,
    "momentum": 0.0,
    "lr_decay": 1.0,
    "hidden": [64, 64],
    "dropout": 0.0,
    "step": None,
    "train_size": None,
    "seed": 0,
    "data_dir": None,
    "every_steps": 200,
}


def read(path: Any) -> dict[str, Any]:
    """Return the settings of a TOML file."""
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return found


def configs() -> dict[str, dict[str, Any]]:
    """Return the shipped configurations ``sequel/configs/*.toml`` by name.

    >>> configs()["ewc_rotatedmnist"]["expected"]
    48.5
    """
    files = importlib.resources.files("sequel") / "configs"
    found = (path for path in files.iterdir() if path.name.endswith(".toml"))
    return {path.name[:-5]: read(path) for path in sorted(found, key=lambda path: path.name)}


REPRO = {name: config for name, config in configs().items() if "expected" in config}


def make_dataset(name: str, data_dir: str | None, *, flat: bool) -> Dataset:
    """Return a data set by name."""
    if name == "digits":
        return datasets.digits(images=not flat)
    if name == "mnist-test":
        if data_dir is None:
            raise ValueError("mnist-test needs --data-dir with MNIST's t10k files")
        return datasets.mnist_test(data_dir)
    if name not in DATA:
        raise ValueError(f"unknown data {name!r}; there are {', '.join(DATA)}")
    found: Dataset = getattr(datasets, name)(data_dir)
    return found


def make_scenario(config: dict[str, Any]) -> Scenario:
    """Return the scenario ``kind-data`` of a configuration, e.g. ``"permuted-digits"``."""
    kind, _, name = str(config["scenario"]).partition("-")
    if kind not in KINDS:
        raise ValueError(f"unknown scenario {config['scenario']!r}: kind is one of {KINDS}")
    source = make_dataset(name, config["data_dir"], flat=True)
    if config["train_size"]:
        cut = slice(0, int(config["train_size"]))
        source = Dataset(
            source.x_train[cut], source.y_train[cut], source.x_test, source.y_test,
            source.mean, source.std,
        )  # fmt: skip
    n = int(config["tasks"])
    if kind == "permuted":
        return scenarios.permuted(source, n, seed=int(config["seed"]))
    if kind == "rotated":
        return scenarios.rotated(source, n, step=config["step"])
    make = {
        "class": scenarios.class_incremental,
        "task": scenarios.task_incremental,
        "domain": scenarios.domain_incremental,
    }[kind]
    return make(source, n)


def make_algorithm(name: str, params: dict[str, Any]) -> Algorithm:
    """Return an algorithm by name; values given as text are parsed as JSON where they can be."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; there are {', '.join(sorted(ALGORITHMS))}")
    known = {f.name for f in fields(ALGORITHMS[name])}  # type: ignore[arg-type]
    if set(params) - known:
        raise ValueError(
            f"{name} has no parameter {', '.join(sorted(set(params) - known))}; it has "
            f"{', '.join(sorted(known))}"
        )
    return ALGORITHMS[name](**{key: _value(value) for key, value in params.items()})


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def make_learner(
    config: dict[str, Any], scenario: Scenario, callbacks: tuple[Callback, ...] = ()
) -> Learner:
    """Return the learner of a configuration, with its network and SGD."""
    inputs = int(np.prod(scenario[0].train.x.shape[1:]))
    hidden, dropout, seed = list(config["hidden"]), float(config["dropout"]), int(config["seed"])
    lr, momentum = float(config["lr"]), float(config["momentum"])
    options: dict[str, Any] = {
        "batch_size": int(config["batch_size"]),
        "seed": seed,
        "lr_decay": float(config["lr_decay"]),
        "callbacks": callbacks,
    }
    algorithm = make_algorithm(config["algo"], config["params"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.MLP(inputs, hidden, scenario.n_classes, dropout=dropout)
    _check.one_of("backend", config["backend"], ("torch", "jax"))
    if config["backend"] == "torch":
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
        return Learner(model, optimizer, algorithm, **options)
    import optax

    tx = optax.sgd(lr, momentum=momentum or None)
    return Learner(nn.to_jax(model), tx, algorithm, lr=lr, **options)


def _claim(folder: Path, echo: dict[str, Any]) -> None:
    """Leave ``run.json``; ValueError where the folder is that of a run with other settings."""
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        differ = {k for k in before.keys() | echo.keys() if before.get(k) != echo.get(k)}
        if differ := differ - {"data_dir", "every_steps"}:
            pairs = "; ".join(
                f"{k}: {before.get(k)!r} there, {echo.get(k)!r} here" for k in sorted(differ)
            )
            raise ValueError(
                f"{folder} holds a run with other settings ({pairs}): give another --out, or remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(echo, indent=1) + "\n")


def run(
    config: dict[str, Any],
    out: str | os.PathLike[str] | None = None,
    callbacks: tuple[Any, ...] = (),
) -> Result:
    """Run one configuration; with ``out`` it logs there, leaves ``run.json`` and can be resumed."""
    config = {**DEFAULTS, **config}
    if unknown := sorted(set(config) - set(DEFAULTS) - {"expected"}):
        raise ValueError(f"unknown settings {unknown}; there are {sorted(DEFAULTS)}")
    _check.count("epochs", config["epochs"], 0)
    scenario = make_scenario(config)
    extra: tuple[Any, ...] = tuple(callbacks)
    make_learner(config, scenario)  # before the folder is claimed: it checks the settings
    if out is not None:
        folder = Path(out)
        algorithm = make_algorithm(config["algo"], config["params"])
        echo = {**config, "params": asdict(algorithm)}  # type: ignore[call-overload]
        _claim(folder, json.loads(json.dumps(echo)))
        extra = (CSVLogger(folder), Checkpoint(folder, every_steps=config["every_steps"]), *extra)
    return make_learner(config, scenario, extra).fit(scenario, config["epochs"])
