"""The examples of README and docs/ run as they stand, and what these pages point to exists."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_optim
from lowrank_optim import PROJECTORS
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.nn import convert
from lowrank_optim.stores import STORES
from lowrank_optim.transports import TRANSPORTS

ROOT = Path(__file__).parents[2]
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
    code = "\n".join(examples(page))
    if "fully_shard" in code and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    registries: tuple[dict[str, Any], ...] = (PROJECTORS, TRANSPORTS, STORES, METHODS)
    before = [set(known) for known in registries]
    try:
        exec(
            compile(code, str(page), "exec", dont_inherit=True),
            {"__name__": "__main__"},
        )
    finally:
        for known, names in zip(registries, before, strict=True):
            for name in set(known) - names:
                del known[name]


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
    said = re.findall(
        r"\b\d+\.\d\d\b", (ROOT / "README.md").read_text(encoding="utf-8").split("\n```")[0]
    )
    assert len(said) == 3
    assert all(re.search(rf"\| \**{re.escape(x)}\** ", readme) for x in said), said


CLASSES = {
    "galore": "GaLoreAdamW",
    "fira": "FiraAdamW",
    "apollo": "ApolloAdamW",
    "frugal": "FrugalAdamW",
    "dct_adamw": "DCTAdamW",
    "ldadam": "LDAdamW",
    "sst": "SSTAdamW",
    "switchlora": "SwitchLoRAAdamW",
}
"""The page of a method, and the class whose options its table lists."""


def options(page: Path) -> dict[str, Any]:
    """Options and defaults of the first table of the section, but for defaults that depend."""
    section = page.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    found = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", section.split("\n\n|")[1], re.M):
        names, defaults = (x.replace("`", "").split(", ") for x in row)
        values = defaults * len(names) if len(defaults) == 1 else defaults
        for name, value in zip(names, values, strict=True):
            if "(" not in value:  # a formula
                found[name] = ast.literal_eval(value)
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_of_option_tables_are_those_of_the_class(name: str) -> None:
    listed = options(DOCS / "algorithms" / f"{name}.md")
    optimizer = getattr(lowrank_optim, CLASSES[name])([torch.nn.Parameter(torch.ones(256, 256))])
    parameters = inspect.signature(type(optimizer)).parameters
    own = {key for key, x in parameters.items() if x.kind is x.KEYWORD_ONLY}
    assert own <= listed.keys() | {"iterations_per_round"}, own - listed.keys()
    for key, value in listed.items():
        assert optimizer.defaults["rank" if key == "density" else key] == value, key


def attaches(name: str, mode: Any, modules: bool = False, **options: Any) -> bool:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 8))
    form = {"SST": "sst", "SwitchLoRA": "switchlora"}.get(name.removesuffix("AdamW"), "")
    groups = convert(model, form, rank=4) if modules else model.named_parameters()
    rank = {} if modules or "density" in options or name == "FrugalAdamW" else {"rank": 4}
    optimizer = getattr(lowrank_optim, name)(groups, **rank, **options)
    try:
        with lowrank_optim.attach_in_backward(optimizer, mode):
            model(torch.randn(4, 32)).square().mean().backward()
            optimizer.step()
    except ValueError as error:
        assert "use mode='step'" in str(error)
        return False
    return True


def test_table_of_what_each_method_can_do() -> None:
    """docs/choosing.md: every method steps inside backward; who projects, and on what condition."""
    directions = {"free_rule": "none", "projector": "rsvd", "density": 0.25}
    text = (DOCS / "choosing.md").read_text(encoding="utf-8").split("## What each can do")[1]
    said = dict(re.findall(r"^\| ([\w-]+) \| yes \| (.*?) \|", text.split("\n## ")[0], re.M))
    assert said.pop("GaLore") == said.pop("SST") == "yes"
    assert said.pop("Fira").startswith("no") and said.pop("APOLLO").startswith("no")
    assert said.pop("FRUGAL") == 'with `free_rule="none"` and a projector other than `block`'
    assert said.pop("DCT-AdamW") == "with `update_proj_gap` above 1 and no error feedback"
    assert said.pop("LDAdam") == "with `update_proj_gap` above 1 and no error feedback"
    assert said.pop("SwitchLoRA") == "as modules" and not said
    assert all(attaches(name, "step") for name in CLASSES.values())
    assert attaches("GaLoreAdamW", "project") and attaches("SSTAdamW", "project")
    assert not attaches("FiraAdamW", "project") and not attaches("ApolloAdamW", "project")
    assert attaches("FrugalAdamW", "project", **directions)
    assert not attaches("FrugalAdamW", "project", **{**directions, "projector": "block"})
    assert not attaches("FrugalAdamW", "project", **{**directions, "free_rule": "sign"})
    assert attaches("DCTAdamW", "project", update_proj_gap=2)
    assert not attaches("DCTAdamW", "project")
    assert not attaches("DCTAdamW", "project", update_proj_gap=2, error_feedback="8bit")
    assert attaches("LDAdamW", "project", update_proj_gap=2, error_feedback=None)
    assert not attaches("LDAdamW", "project", error_feedback=None)
    assert not attaches("LDAdamW", "project", update_proj_gap=2)
    assert attaches("SwitchLoRAAdamW", "project", modules=True)
    assert not attaches("SwitchLoRAAdamW", "project")


def test_every_public_name_is_in_the_api_page() -> None:
    listed = re.findall(r"^::: lowrank_optim\.([\w.]+)$", (DOCS / "api.md").read_text(), re.M)
    modules = {"memory", "presets"}
    assert modules <= {name.partition(".")[0] for name in listed}
    assert {*lowrank_optim.__all__} - modules - {"PROJECTORS"} <= {*listed}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_pages_name_exist(page: Path) -> None:
    """A file that moved leaves its name in prose."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|lowrank_optim|benchmarks|csrc)/[\w./]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
