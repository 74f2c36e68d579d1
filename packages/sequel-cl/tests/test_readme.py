from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
HOWTO = Path(__file__).parents[3] / "docs" / "sequel-cl" / "howto.md"


# "default": Lightning and transformers warn of each other's and torch's names on import.
OTHERS = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    "page", [pytest.param(README, id="readme"), pytest.param(HOWTO, id="howto", marks=OTHERS)]
)
def test_every_python_block_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    if page == HOWTO:
        pytest.importorskip("pytorch_lightning")
        pytest.importorskip("transformers")
    if not page.exists():
        pytest.skip("the documentation is not in the source distribution")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {number}", "exec", dont_inherit=True), namespace)
