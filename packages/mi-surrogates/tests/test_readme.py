"""The README's Python blocks run as they stand, in order."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(script))


def test_the_block_on_options_in_the_howto_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "mi-surrogates" / "howto.md"
    section = page.read_text(encoding="utf-8").partition("## Materials and other options")[2]
    script = tmp_path / "options.py"
    script.write_text(section.split("```python\n")[1].split("```")[0], encoding="utf-8")
    found = runpy.run_path(str(script))["best"].theta_dict
    assert found["absorber"] == "Fe"
    assert abs(found["a"] - 0.3) < 0.05
