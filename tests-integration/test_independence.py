"""No package needs another one of this repository."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PACKAGES, Package

# Blocks the imports of the other packages, whose editable installs share this environment, and takes
# the package itself from the wheel.
PROBE = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others!r}:
            raise ImportError(name + " is another package")

sys.meta_path.insert(0, Block())
sys.path.insert(0, {wheel!r})
import {module} as module
assert module.__file__.startswith({wheel!r}), module.__file__
for name in module.__all__:
    getattr(module, name)
"""


def imported_names(file: Path) -> set[str]:
    """Return the top-level names that a source file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_there_are_packages() -> None:
    assert PACKAGES


def test_sources_import_no_other_package(package: Package) -> None:
    others = {other.module for other in PACKAGES} - {package.module}
    found = {
        str(file.relative_to(package.folder)): clash
        for part in ("src", "tests", "examples", "benchmarks")
        for file in (package.folder / part).rglob("*.py")
        if (clash := imported_names(file) & others)
    }
    assert not found


def test_metadata_requires_no_other_package(package: Package) -> None:
    from packaging.requirements import Requirement

    extras = package.project.get("optional-dependencies", {}).values()
    lines = [*package.project["dependencies"], *(line for extra in extras for line in extra)]
    required = {Requirement(line).name.replace("_", "-").lower() for line in lines}
    assert not required & ({other.dist for other in PACKAGES} - {package.dist})


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build every package's wheel and return the files by distribution."""
    built = {}
    for package in PACKAGES:
        out = tmp_path_factory.mktemp(package.dist)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        subprocess.run(command, cwd=package.folder, check=True, capture_output=True)
        (built[package.dist],) = out.glob("*.whl")
    return built


def test_wheel_imports_without_the_other_packages(
    package: Package, wheels: dict[str, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheels[package.dist]) as archive:
        archive.extractall(tmp_path)
    others = sorted({other.module for other in PACKAGES} - {package.module})
    code = PROBE.format(others=others, wheel=str(tmp_path), module=package.module)
    command = [sys.executable, "-W", "error", "-I", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_wheel_holds_the_package_and_nothing_else(
    package: Package, wheels: dict[str, Path]
) -> None:
    names = zipfile.ZipFile(wheels[package.dist]).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {package.module}
    assert f"{package.module}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
