"""Recipes: a report's own JSON, and the common YAML of model merging as an import path."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_NORMALIZE = {"linear": True, "task_arithmetic": False, "ties": True, "dare_ties": False}
_IGNORED = {"int8_mask", "rescale"}
_TOP = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name"}


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe file and return the arguments of `merge_files`, `out_dir` aside.

    Args:
        path: `lines_merge.json`, a file of that form, or a YAML with merge_method, base_model, models and
            parameters, for linear, task_arithmetic, ties and dare_ties.

    Raises:
        CheckpointError: the file cannot be read.
        ValueError: it is no recipe, or asks for something that has no counterpart here.
        ImportError: a YAML file without PyYAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    content = _parse(path, text)
    if "merge_method" in content:
        return from_common_yaml(content)
    recipe = content.get("recipe", content)
    if not isinstance(recipe, dict) or not {"base", "models"} <= set(recipe):
        raise ValueError(f"{path}: a recipe has base and models, or merge_method and models")
    if "out_dir" in recipe:
        raise ValueError(f"{path}: out_dir is given with the run, not in the recipe")
    return dict(recipe)


def _parse(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    else:
        try:
            import yaml
        except ImportError as error:
            raise ImportError('YAML recipes need PyYAML: pip install "lines-merge[cli]"') from error
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping")
    return content


def from_common_yaml(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate merge_method / base_model / models / parameters into arguments of `merge_files`.

    Trimming is per tensor there, so `scope="tensor"`; `lambda` becomes alpha of a plain merge, and a
    two-point gradient `lambda: [a, b]` becomes LiNeS with alpha = a, beta = b - a and `outside="depth"`.
    Weights may be gradients over depth.

    Raises:
        ValueError: another method, slices, filters, or values without counterpart.
    """
    method = content["merge_method"]
    if method not in _NORMALIZE:
        raise ValueError(f"merge_method must be one of {', '.join(_NORMALIZE)}, got {method!r}")
    unknown = sorted(set(content) - _TOP)
    if unknown:
        raise ValueError(f"recipe entries without counterpart: {', '.join(unknown)}")
    shared = _table(content.get("parameters"), "parameters")
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise ValueError("the recipe lists no models")
    base = content.get("base_model")
    rows = [(_path(entry), {**shared, **_own(entry)}) for entry in entries]
    if base is None:
        if method != "linear":
            raise ValueError(f"merge_method {method} needs base_model")
        base = rows[0][0]
    base = _path({"model": base})

    normalize = bool(shared.get("normalize", _NORMALIZE[method]))
    weights = [_weight(row.get("weight", 1.0)) for _, row in rows]
    result: dict[str, Any] = {"base": base, **_scaling(shared.get("lambda", 1.0))}
    if content.get("out_dtype") or content.get("dtype"):
        result["dtype"] = content.get("out_dtype") or content["dtype"]
    kept = [t for t, (path, _) in enumerate(rows) if path != base]
    if method in {"linear", "task_arithmetic"}:
        if normalize:
            # the base is one of the models of an average; it has no task vector to weigh
            counted = range(len(rows)) if method == "linear" else kept
            weights = _normalized(weights, counted)
        elif method == "linear" and abs(sum(_plain(weights)) - 1) > 1e-6:
            raise ValueError("linear with normalize: false needs weights that sum to 1")
        result["method"] = "task_arithmetic"
    else:
        densities = {row.get("density", 1.0) for t, (_, row) in enumerate(rows) if t in kept}
        if len(densities) != 1 or not isinstance(next(iter(densities)), (int, float)):
            raise ValueError("all models must have the same density, a number")
        density = float(densities.pop())
        result["method"] = method
        result["scope"] = "tensor"
        result["merge"] = "mean" if normalize else "sum"
        if method == "ties":
            result["density"] = density
        else:
            if shared.get("rescale", True) is not True:
                raise ValueError("dare_ties rescales; rescale: false has no counterpart")
            result["p"] = 1 - density
    if not kept:
        raise ValueError("the recipe lists no model besides the base")
    result["models"] = [rows[t][0] for t in kept]
    result["weights"] = [weights[t] for t in kept]
    known = {"weight", "density", "normalize", "lambda", *_IGNORED}
    for _, row in rows:
        if set(row) - known:
            raise ValueError(f"parameters without counterpart: {sorted(set(row) - known)}")
    return result


def _table(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return dict(value or {})


def _own(entry: Any) -> dict[str, Any]:
    parameters = entry.get("parameters") if isinstance(entry, Mapping) else None
    return _table(parameters, "parameters of a model")


def _path(entry: Any) -> str:
    model = entry.get("model") if isinstance(entry, Mapping) else entry
    if isinstance(model, Mapping):
        model = model.get("path")
    if not isinstance(model, str):
        raise ValueError(f"a model must be given by its path, got {entry!r}")
    return model


def _weight(value: Any) -> float | list[float]:
    """Return a number or a gradient over depth."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
        return [float(v) for v in value]
    raise ValueError(f"a weight must be a number or a list of numbers, got {value!r}")


def _plain(weights: Sequence[float | list[float]]) -> list[float]:
    if any(isinstance(weight, list) for weight in weights):
        raise ValueError("gradient weights need normalize: false")
    return [weight for weight in weights if not isinstance(weight, list)]


def _normalized(
    weights: Sequence[float | list[float]], counted: Sequence[int]
) -> list[float | list[float]]:
    plain = _plain(weights)
    total = sum(plain[t] for t in counted)
    if total == 0:
        raise ValueError("weights that sum to 0 cannot be normalised")
    return [weight / total for weight in plain]


def _scaling(value: Any) -> dict[str, Any]:
    """Translate lambda: a number, or a two-point gradient over depth."""
    gradient = _weight(value)
    if not isinstance(gradient, list):
        return {"lines": False, "alpha": gradient}
    if len(gradient) != 2:
        raise ValueError(f"a gradient of lambda must have two points, got {gradient}")
    low, high = gradient
    return {"lines": True, "alpha": low, "beta": high - low, "outside": "depth"}
