"""The examples of README and docs/ run as they stand."""

import re
from pathlib import Path

import pytest

from lowrank_optim import PROJECTORS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    """One namespace a page, top to bottom; the asserts in them are the test."""
    before = set(PROJECTORS)
    source = "\n".join(BLOCK.findall(page.read_text()))
    try:
        exec(compile(source, str(page), "exec", dont_inherit=True), {"__name__": "__main__"})
    finally:
        for name in set(PROJECTORS) - before:
            del PROJECTORS[name]
