"""Dependencies point one way."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
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


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(tree: ast.AST, typing: bool = False, later: bool = True) -> Iterator[ast.AST]:
    """Every statement that runs: imports for type checkers only are not dependencies.

    ``later`` are those inside functions, which do not run when a module is imported.
    """
    left = [tree]
    while left:
        for child in ast.iter_child_nodes(left.pop()):
            if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                continue
            if (typing or not is_type_checking(child)) and (
                later or not isinstance(child, FUNCTIONS)
            ):
                yield child
                left.append(child)


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(EVERY[name].read_text(encoding="utf-8"))


@functools.cache
def imported(name: str, typing: bool = False) -> set[str]:
    """Full names of what a module imports, attributes of a package included."""
    return names_of(name, nodes(parsed(name), typing))


def names_of(name: str, found: Iterable[ast.AST]) -> set[str]:
    """Full names of what these nodes of a module import."""
    names = set()
    for node in found:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


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


def at_once(name: str) -> set[str]:
    """Full names of what a module imports as it is imported."""
    return names_of(name, nodes(parsed(name), later=False))


def test_the_package_is_imported_without_accelerators() -> None:
    """Where triton or bitsandbytes is not installed, that is a reason, not an ImportError."""
    kernels = {x for x in MODULES if x.startswith("lowrank_optim.ops.triton.")}
    kernels.remove("lowrank_optim.ops.triton.__init__")
    assert any("triton" in at_once(name) for name in kernels)
    for name in MODULES.keys() - kernels:
        names = at_once(name)
        assert not {full.split(".")[0] for full in names} & {"triton", "bitsandbytes"}, name
        assert not {module_of(full) for full in names} & kernels, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_of_several_processes_is_imported_before_there_are_any(folder: str) -> None:
    """DTensors take a second to import, and a torch built without distributed has no groups.

    ``import torch.distributed`` is all that any torch allows.
    """
    inside = [x for x in MODULES if layer(x) == folder and x != "lowrank_optim.distributed"]
    for name in inside:
        assert not {x for x in at_once(name) if x.startswith("torch.distributed.")}, name
