"""What every method must keep: exporting a class from ``lowrank_optim.methods`` enrols it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lowrank_optim import methods
from tests import cases
from tests.methods.contract import (
    CONTRACT,
    every_parameter_moves,
    state_is_total_after_one_step,
)

METHODS = pytest.mark.parametrize("name", cases.method_names())
NAMES = sorted(cases.method_names(), key=lambda x: x.endswith("8bit"))
ALIKE = ("FrugalLion", "FrugalSGD")
"""Their rules are those of GaLore's classes, and their residual is FrugalAdamW's."""
OWN = (state_is_total_after_one_step, every_parameter_moves)
"""Clauses that the default run has of these classes too."""
WITH_CLAUSES = [
    pytest.param(
        clause,
        name,
        id=f"{clause.__name__}-{name}",
        marks=pytest.mark.slow
        if clause not in OWN and (name.endswith("8bit") or name in ALIKE or (i + j) % 2)
        else (),
    )
    for i, clause in enumerate(CONTRACT)
    for j, name in enumerate(NAMES)
]
"""Clauses and classes take turns.

Matrices here are too small for codes, so that a class of 8 bits is the other with its name. With
moments in codes the contract is kept in ``tests/stores/test_8bit.py``.
"""


@pytest.mark.parametrize(("clause", "name"), WITH_CLAUSES)
def test_method(clause: Callable[[str], None], name: str) -> None:
    clause(name)


def test_a_new_method_is_enrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported is tested; and the contract notices a method that only looks right."""

    class Sleepy(methods.GaLoreAdamW):
        def _step_items(self, items: Any, *rest: Any) -> None:
            super()._step_items([i for i in items if i.param.dim() != 1], *rest)

    class Twin(methods.GaLoreAdamW):
        pass

    for cls in (Sleepy, Twin):
        monkeypatch.setattr(methods, cls.__name__, cls, raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "Sleepy", "Twin"])
    assert cases.method_names()[-2:] == ["Sleepy", "Twin"]
    for clause in CONTRACT:
        clause("Twin")
    with pytest.raises(AssertionError):
        every_parameter_moves("Sleepy")
