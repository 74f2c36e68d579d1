"""The README's Python blocks run as they stand, in order."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import lcnn


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(script))


def test_conversions_of_the_howto_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "lcnn" / "howto.md").read_text(encoding="utf-8")
    text = text.partition("## Lightning")[0]  # torchvision and timm
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    script = tmp_path / "howto.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    model = runpy.run_path(str(script))["model"]
    assert sum(isinstance(m, lcnn.LipschitzNorm) for m in model.modules()) > 0
