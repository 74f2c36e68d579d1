"""What the packages say of themselves agrees, in every place where they say it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import PACKAGES, ROOT, Package


def public_names(package: Package) -> dict[str, object]:
    module = importlib.import_module(package.module)
    return {name: getattr(module, name) for name in module.__all__}


def test_versions_agree(package: Package) -> None:
    version = package.project["version"]
    assert importlib.import_module(package.module).__version__ == version
    changelog = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+[^\]\s]*)\]?", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


def test_public_names_have_docstrings(package: Package) -> None:
    callables = {n: o for n, o in public_names(package).items() if callable(o)}
    bare = [name for name, obj in callables.items() if not inspect.getdoc(obj)]
    assert callables
    assert not bare


def test_public_classes_document_their_public_methods(package: Package) -> None:
    bare = [
        f"{name}.{attribute}"
        for name, obj in public_names(package).items()
        if inspect.isclass(obj) and obj.__module__.partition(".")[0] == package.module
        for attribute, member in vars(obj).items()
        if inspect.isfunction(member) and not attribute.startswith("_")
        if not inspect.getdoc(getattr(obj, attribute))
    ]
    assert not bare


def test_a_package_stands_where_readers_look(package: Package) -> None:
    for part in ("README.md", "CHANGELOG.md", "LICENSE", "examples/demo.py", "src", "tests"):
        assert (package.folder / part).exists(), part
    assert (package.source / "py.typed").exists()
    assert (ROOT / "docs" / package.dist / "index.md").exists()
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def readme_table() -> list[tuple[str, str]]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \[`([a-z-]+)`\]\(([^)]+)\)", readme, flags=re.MULTILINE)


def test_readme_table_names_every_package_and_no_other() -> None:
    rows = dict(readme_table())
    assert sorted(rows) == [package.dist for package in PACKAGES]
    assert all((ROOT / link).is_dir() for link in rows.values())


def test_command_names_are_distinct() -> None:
    commands = {p.dist: set(p.project.get("scripts", {})) for p in PACKAGES}
    assert not [pair for pair in combinations(commands, 2) if commands[pair[0]] & commands[pair[1]]]
    for package in PACKAGES:  # sequel-cl's is `sequel`, as its import name is
        assert commands[package.dist] <= {package.dist, package.module}


def test_command_lines_agree_on_exit_statuses(package: Package) -> None:
    """0 for help, which loads no more than the standard library needs; 2 for a verb that there is not."""
    (name,) = package.project["scripts"]
    command = str(Path(sys.executable).parent / name)
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: ")
    wrong = subprocess.run([command, "no-such-verb"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "no-such-verb" in wrong.stderr
    assert not wrong.stdout


def test_command_lines_print_their_version(package: Package) -> None:
    (name,) = package.project["scripts"]
    command = str(Path(sys.executable).parent / name)
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"{name} {package.project['version']}\n"


def test_demos_take_the_same_options(package: Package) -> None:
    text = (package.folder / "examples" / "demo.py").read_text(encoding="utf-8")
    for option in ("--out", "--seed", "--quiet", "--json"):
        assert f'"{option}"' in text, option


ORDERS = [PACKAGES[i:] + PACKAGES[:i] for i in range(len(PACKAGES))] + [PACKAGES[::-1]]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0].dist}-first")
def test_all_packages_import_together_without_a_warning(order: list[Package]) -> None:
    """In every rotation and backwards: each package stands before and after each other one."""
    code = "import " + ", ".join(package.module for package in order)
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
