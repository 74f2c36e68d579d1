"""What the integration tests know of the repository: its packages, read from the tree."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Package:
    """One distribution of packages/."""

    dist: str
    folder: Path
    project: dict[str, Any]
    source: Path

    @property
    def module(self) -> str:
        return self.source.name


def read_package(pyproject: Path) -> Package:
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    source = table["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"][0]
    folder = pyproject.parent
    return Package(folder.name, folder, table["project"], folder / source)


PACKAGES = [read_package(path) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", PACKAGES, ids=[package.dist for package in PACKAGES])
