"""The code in the pages that speak of several packages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize("page", ["README.md", "docs/combining.md"])
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:  # later blocks of a page use what earlier ones made
        exec(compile(block, page, "exec"), namespace)  # noqa: S102
