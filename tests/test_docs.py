"""The examples of README and docs/ run as they stand, and what these pages point to exists."""

import re
from pathlib import Path

import pytest

from lowrank_optim import PROJECTORS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = "https://github.com/lowrank-optim/lowrank-optim/blob/main/"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
"""All of them: notes are a record and have no examples, which is tested too."""
FENCE = re.compile(
    r"^(?P<before>[^\n]*)\n(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^ *```$", re.M | re.S
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->$")
"""On the line before an example that cannot run: say why."""
ALLOWED_NOT_RUN = 0
"""Raise it only with an example that no machine of ours could run."""


def fences(page: Path) -> list[re.Match[str]]:
    return list(FENCE.finditer("\n" + page.read_text(encoding="utf-8")))


def examples(page: Path) -> list[str]:
    """The Python of a page that is run."""
    found = [x for x in fences(page) if x["info"] == "python"]
    return [x["body"] for x in found if not NOT_RUN.search(x["before"])]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=name_of)
def test_examples_run(page: Path) -> None:
    """One namespace a page, top to bottom; the asserts in them are the test."""
    before = set(PROJECTORS)
    try:
        exec(
            compile("\n".join(examples(page)), str(page), "exec", dont_inherit=True),
            {"__name__": "__main__"},
        )
    finally:
        for name in set(PROJECTORS) - before:
            del PROJECTORS[name]


def test_every_example_is_run_or_says_why_not() -> None:
    """Another spelling of the language, or an indent, would take one out of the test unseen."""
    skipped = []
    for page in PAGES:
        found = fences(page)
        marks = page.read_text(encoding="utf-8").count("```")
        assert marks == 2 * len(found), f"{name_of(page)}: a fence that is not read"
        for fence in found:
            assert fence["info"] in ("python", "sh", "text"), f"{name_of(page)}: {fence['info']}"
            assert not fence["indent"], f"{name_of(page)}: an indented fence"
            if NOT_RUN.search(fence["before"]):
                skipped.append((name_of(page), fence["body"]))
    assert len(skipped) <= ALLOWED_NOT_RUN, skipped
    assert not any(examples(page) for page in (DOCS / "notes").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs call its headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Of README under the repository's address, since a package index shows it alone."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        local = target.removeprefix(SITE)
        if local == target and re.match(r"https?://", target):
            continue
        assert page != ROOT / "README.md" or local != target, f"{target} is relative"
        path, _, anchor = local.removesuffix("?raw=true").partition("#")
        base = page.parent if local == target else ROOT
        found = (base / path).resolve() if path else page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_site() -> None:
    nav = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(nav) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_pages_that_code_names_exist() -> None:
    files = [
        p for d in ("lowrank_optim", "tests", "benchmarks", "csrc") for p in (ROOT / d).rglob("*")
    ]
    named = {
        found
        for p in files
        if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
        for found in re.findall(r"\bdocs/[\w/]+\.md", p.read_text(encoding="utf-8"))
    }
    assert named and all((ROOT / name).is_file() for name in named), sorted(named)


def test_figures_of_what_fits_are_those_of_readme() -> None:
    """README's are recomputed by tests/test_memory.py; the first page repeats some of them."""
    table = (DOCS / "index.md").read_text(encoding="utf-8").split("## What fits")[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## What fits 24 GiB")[1]
    shown = re.findall(r"\| (\d+\.\d\d) \|", table.split("\n## ")[0])
    assert len(shown) == 4
    assert all(re.search(rf"\| \**{re.escape(x)}\** ", readme) for x in shown), shown
