from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
HOWTO = Path(__file__).parents[3] / "docs" / "sequel-cl" / "howto.md"


@pytest.mark.parametrize("page", [README, HOWTO], ids=["readme", "howto"])
def test_every_python_block_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    if not page.exists():
        pytest.skip("the documentation is not in the source distribution")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {number}", "exec", dont_inherit=True), namespace)
