"""Dependencies point one way."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_optim

ROOT = Path(lowrank_optim.__file__).parent
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def modules(root: Path) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(root.parent).with_suffix("").parts): path
        for path in root.rglob("*.py")
    }


MODULES = modules(ROOT)
EVERY = MODULES | modules(BENCHMARKS)
ACCELERATORS = {"triton", "ctypes", "bitsandbytes"}
COMMAND = {"click", "rich", "matplotlib"}
LAYERS: tuple[set[str], ...] = (
    {"ops"},
    {"tensors"},
    {"rules"},
    {"subspaces"},
    {"residuals", "transports"},
    {"stores", "sharding"},
    {"groups"},
    {"engine"},
    {"checkpoints"},
    {"optimizer"},
    {"methods", "backward", "nn", "presets"},
    {"memory", "distributed"},
    {"fitting"},
    {"integrations", ""},
    {"cli"},
    {"__main__"},
)
"""What is in the package, from the bottom up: a layer imports those before it, and itself."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes(tree: ast.AST, typing: bool = False) -> Iterator[ast.AST]:
    """Every node that runs: imports for type checkers only are not dependencies."""
    for child in ast.iter_child_nodes(tree):
        if typing or not is_type_checking(child):
            yield child
            yield from nodes(child, typing)


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(EVERY[name].read_text(encoding="utf-8"))


@functools.cache
def imported(name: str, typing: bool = False) -> set[str]:
    """Full names of what a module imports, attributes of a package included."""
    found = set()
    for node in nodes(parsed(name), typing):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> str:
    """``lowrank_optim.rules.adamw`` is in ``rules``; the package itself in ``""``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


FOLDERS = sorted({layer(name) for name in MODULES})


@pytest.mark.parametrize("folder", FOLDERS)
def test_dependencies_point_down(folder: str) -> None:
    """Also those that only annotations use. Members of one layer do not import each other.

    Accelerators are behind ops alone, so that everything else runs, and is tested, without them.
    """
    assert folder in HEIGHT, f"{folder} has no place among LAYERS"
    for name in (x for x in MODULES if layer(x) == folder):
        names = imported(name, typing=True)
        tops = {n.split(".")[0] for n in names}
        assert folder == "ops" or not tops & ACCELERATORS, name
        assert folder == "cli" or not tops & COMMAND, f"{name}: for the command alone"
        inner = {layer(n) for n in names if n.split(".")[0] == "lowrank_optim"} - {folder}
        assert {other for other in inner if HEIGHT[other] >= HEIGHT[folder]} == set(), name


def test_benchmarks_use_the_package_as_anybody_does() -> None:
    """They import nothing of tests; and the package imports neither."""
    for name in EVERY:
        tops = {full.split(".")[0] for full in imported(name, typing=True)}
        assert "tests" not in tops, name
        assert name not in MODULES or "benchmarks" not in tops, name


def module_of(full: str) -> str | None:
    """The module in which ``a.b.c`` is, itself or as an attribute."""
    parts = full.split(".")
    for end in range(len(parts), 0, -1):
        for name in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if name in EVERY:
                return name
    return None


def circles(typing: bool) -> set[frozenset[str]]:
    """Modules that reach each other by imports, those inside functions included."""
    edges = {
        name: {module_of(full) for full in imported(name, typing)} - {name, None} for name in EVERY
    }
    reached: dict[str, set[str | None]] = {}
    for name in EVERY:
        seen, left = set[str | None](), [name]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new  # type: ignore[arg-type]
        reached[name] = seen
    return {
        frozenset(b for b in reached[a] if b is not None and a in reached[b])
        for a in EVERY
        if a in reached[a]
    }


def test_no_two_modules_import_each_other() -> None:
    """Not even in turn, or one of them late inside a function."""
    assert circles(typing=False) == set()


def test_no_circle_for_types_either() -> None:
    """Nor closed by names that annotations alone use."""
    assert circles(typing=True) == set()


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: no bodies of functions."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not is_type_checking(
            child
        ):
            yield child
            yield from at_import(child)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_of_several_processes_is_imported_before_there_are_any(folder: str) -> None:
    """DTensors take a second to import, and a torch built without distributed has no groups.

    ``import torch.distributed`` is all that any torch allows.
    """
    inside = [x for x in MODULES if layer(x) == folder and x != "lowrank_optim.distributed"]
    for name, node in ((x, node) for x in inside for node in at_import(parsed(x))):
        if isinstance(node, ast.ImportFrom):
            told = f"{name}: {ast.unparse(node)}"
            assert not (node.module or "").startswith("torch.distributed"), told
        elif isinstance(node, ast.Import):
            for alias in node.names:
                told = f"{name}: {ast.unparse(node)}"
                assert not alias.name.startswith("torch.distributed."), told
