"""Dependencies point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_optim

ROOT = Path(lowrank_optim.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
}
ROLES = ("subspaces", "rules", "residuals", "transports", "stores")
PHASES = ("plan", "refresh", "dense", "onepass", "step", "undo")
BASE = ("ops", "matrix", "quant", "state_checks")
ACCELERATORS = {"triton", "ctypes", "bitsandbytes"}
ALLOWED = {
    # what a layer may import of the package, besides itself; matrix is arithmetic on shapes, and
    # state_checks looks at numbers
    "quant": set[str](),
    "ops": {"quant"},
    "matrix": set[str](),
    "undo": set[str](),
    "state_checks": set[str](),
    **{role: {*ROLES, *BASE} for role in ROLES},
    "projected": set[str](),
    **{name: {*ROLES, *PHASES, *BASE, "projected"} for name in PHASES},
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: imports for type checkers only are not dependencies."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported(name: str) -> set[str]:
    """Full names of what a module imports, attributes of a package included."""
    found = set()
    for node in nodes(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_dependencies_point_one_way(name: str) -> None:
    """methods -> optimizer, step -> roles -> ops; only the package itself imports methods.

    Accelerators are behind ops alone, so that everything else runs, and is tested, without them.
    """
    own = layer(name)
    names = imported(name)
    if own != "ops":
        assert not {n.split(".")[0] for n in names} & ACCELERATORS
    inner = {layer(n) for n in names if n.split(".")[0] == "lowrank_optim"} - {own}
    if own and own != "integrations":  # which use the package as anybody does
        assert "methods" not in inner
        assert "__version__" not in inner and "" not in inner
    if own in ALLOWED:
        assert inner <= ALLOWED[own]
