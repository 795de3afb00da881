"""What machines read beside the code: versions, addresses, make targets and links agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import lowrank_optim

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = PROJECT["urls"]["Source"]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.y*ml"))
FORMS = sorted(f for f in (GITHUB / "ISSUE_TEMPLATE").glob("*.y*ml") if f.name != "config.yml")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *GITHUB.rglob("*.md")])
TEXTS = [
    *PAGES,
    *WORKFLOWS,
    *(GITHUB / "ISSUE_TEMPLATE").iterdir(),
    ROOT / "CITATION.cff",
    ROOT / "pyproject.toml",
]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().split("\n")
    if line and not line.startswith("#")
)
PYTHONS = [
    version
    for line in PROJECT["classifiers"]
    if re.fullmatch(r"3\.\d+", version := line.rpartition(" :: ")[2])
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> Any:
    """YAML in which no key is given twice, which `yaml` takes in silence."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{short(path)}{node.start_mark}: a key twice: {keys}"
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return yaml.load(path.read_text(), Loader)


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


# ------------------------------------------------------------------------------ versions


def test_citation_is_of_this_version() -> None:
    """The fields that Citation File Format 1.2.0 requires, and those that the package has too."""
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(a.get("name") or a.get("family-names") for a in citation["authors"])
    assert str(citation["version"]) == lowrank_optim.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == HOME
    assert citation["keywords"] == PROJECT["keywords"]
    assert [a["name"] for a in citation["authors"]] == [a["name"] for a in PROJECT["authors"]]


def test_pre_commit_has_the_versions_of_constraints() -> None:
    hooks = [h for r in load(ROOT / ".pre-commit-config.yaml")["repos"] for h in r["hooks"]]
    assert {h["entry"].split()[0] for h in hooks} == {"ruff", "clang-format", "mypy"}
    for hook in hooks:
        assert hook["additional_dependencies"], f"{hook['id']} takes whatever is newest"
        for requirement in hook["additional_dependencies"]:
            name, _, version = requirement.partition("==")
            assert PINS[name] == version, f"{hook['id']}: {requirement}"


def test_tools_are_pinned() -> None:
    """What judges or builds a change: a new release of a tool must not fail an old commit."""
    tools = {"pytest", "mypy", "ruff", "clang-format", "hypothesis", "pyyaml"}
    extras = PROJECT["optional-dependencies"]
    names = {re.split(r"[<>=;\[ ]", r)[0] for r in extras["release"]} | tools
    assert names <= set(PINS), f"not in constraints.txt: {names - set(PINS)}"
    assert tools <= {re.split(r"[<>=;\[ ]", r)[0] for r in extras["dev"]}


def test_nothing_built_is_in_the_repository() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    assert not [f for f in files if f.suffix in {".whl", ".so", ".o", ".pyc", ".gz"}]


def test_constraints_are_those_of_their_torch() -> None:
    """What this torch requires of others, where it is the one of the constraints."""
    if torch.__version__.partition("+")[0] != PINS["torch"]:
        pytest.skip(f"this is torch {torch.__version__}")
    for line in metadata.requires("torch") or []:
        required = Requirement(line)
        pinned = PINS.get(required.name)
        if pinned is not None and (required.marker is None or required.marker.evaluate()):
            assert required.specifier.contains(pinned), f"torch requires {line}, not {pinned}"


def test_pythons_are_those_of_the_workflow() -> None:
    """Each Python that is claimed is one that the suite runs on; the least is required."""
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    jobs = load(GITHUB / "workflows" / "ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    ends = jobs["test-wheel"]["strategy"]["matrix"]["include"]
    assert {end["python"] for end in ends} == {PYTHONS[0], PYTHONS[-1]}
    (oldest,) = (r.partition(">=")[2] for r in PROJECT["dependencies"] if r.startswith("torch"))
    assert {end["torch"] for end in ends} == {f"{oldest}.0", ""}


# ------------------------------------------------------------------------------ workflows


def targets() -> list[str]:
    """Of the Makefile, as often as it defines them."""
    return re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_targets_are_defined_once_and_phony() -> None:
    names = targets()
    assert len(names) == len(set(names)), f"defined twice: {sorted(names)}"
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert {n for n in names if not n.startswith(".")} == set(phony[1].split())


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=short)
def test_workflows_call_make_alone(path: Path) -> None:
    """Nothing is done there that cannot be done here, and every target exists."""
    if path.suffix:
        lines = [line for step in steps(path) if "run" in step for line in step["run"].splitlines()]
    else:
        lines = re.findall(r"^make.*$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        words = line.split("${{")[0].split()
        assert words[0] == "make", f"{short(path)}: {line!r} is not a make target"
        called = [w for w in words[1:] if "=" not in w]
        assert called and set(called) <= set(targets()), f"{short(path)}: {line!r}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=short)
def test_workflows_are_complete(path: Path) -> None:
    """What the runner requires (`on` is a boolean to YAML 1.1); rights and machines said."""
    flow = load(path)
    assert flow["name"] and flow[True] and flow["permissions"]
    for name, job in flow["jobs"].items():
        assert not job["runs-on"].endswith("-latest"), name
        assert set(job.get("needs", "").split()) <= set(flow["jobs"]), name
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step), name
        assert job["steps"][0]["uses"].startswith("actions/checkout@"), name


def test_contributors_are_told_targets_that_exist() -> None:
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "README.md"):
        called = set(re.findall(r"^(?:.*`)?make ([\w-]+)", page.read_text(), re.MULTILINE))
        assert called and called <= set(targets()), f"{page.name}: {called - set(targets())}"


@pytest.mark.parametrize("path", FORMS, ids=short)
def test_issue_forms_are_valid(path: Path) -> None:
    """What GitHub requires of a form; one that is wrong is not shown, and nobody is told."""
    form = load(path)
    assert form["name"] and form["description"] and form["body"]
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids))
    for item in form["body"]:
        assert item["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert item["attributes"]["label"]
        options = item["attributes"].get("options")
        assert (options is not None) == (item["type"] in {"dropdown", "checkboxes"})
    assert any(item.get("validations", {}).get("required") for item in form["body"])


# ------------------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    """To files and headings of this tree, by path or by the address of its main branch.

    README is read on package registries too, where a relative link leads nowhere.
    """
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith(f"{HOME}/blob/main/") or target.startswith(f"{HOME}/raw/main/"):
            path = ROOT / target.removeprefix(HOME).split("/main/", 1)[1].partition("?")[0]
        elif "://" in target:
            continue
        else:
            assert page.name != "README.md" or not target, f"README.md: {link} is relative"
            path = page.parent / target if target else page
        assert path.exists(), f"{short(page)}: {link} leads nowhere"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{short(page)}: {link}: no such heading"


def test_one_address() -> None:
    """Every mention of the repository or its pages is that of `[project.urls]`."""
    pages = PROJECT["urls"]["Documentation"]
    for name, url in PROJECT["urls"].items():
        assert url.startswith((HOME, pages)), name
    found = r"https?://(?:raw\.)?github[\w.]*/[\w.-]+/lowrank[-_]optim\b|https?://[\w.-]+\.github\.io/\S*"
    for text in TEXTS:
        for address in re.findall(found, text.read_text()):
            assert address.startswith((HOME, pages.rstrip("/"))), f"{short(text)}: {address}"
