"""Meshes of two dimensions: copies of shards, tensor parallel, both. One process is the measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.sharded import training
from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.ranks import Ranks
from tests.sharded.training import Case

Worlds = Callable[[int], Ranks]

PLACES = ("r0", "r1", "0r", "00", "01", "10", "11", "a0", "b1", "rr")
"""Of plain DTensors: copies of shards, shards of shards, and FSDP2 over tensor parallel."""
FLAT = ("wide", "tall", "few", "large")
HOWS: dict[str, dict[str, Any]] = {
    "copies": {"how": "fsdp", "only": SHORT},
    "copies of columns": {"how": "fsdp columns", "only": SHORT},
    "parallel": {"how": "parallel", "only": FLAT},
    "parallel columns": {"how": "parallel columns", "only": FLAT},
    "tensors": {"how": "tensors", "only": ("wide", "tall"), "places": PLACES},
    "other tensors": {"how": "tensors", "only": ("few", "conv", "experts"), "places": PLACES},
}


def on_square(name: str, how: str, **of: Any) -> Case:
    own = Case("torch.AdamW", {"foreach": False}) if name == "torch" else NAMED[name]
    return replace(own, mesh="square", **{**HOWS[how], **of})


def check(ranks: Worlds, name: str, case: Case) -> None:
    expected = training.reference(case.reference)
    if not case.cls.startswith("torch."):
        training.assert_worth_comparing(case.reference, expected)
    values = ranks(4).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(
    ("name", "how"), [("rsvd", "copies"), ("fira svd", "parallel"), ("dct memory", "tensors")]
)
def test_it_is_one_process(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, f"{name} {how}", on_square(name, how))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["torch", *NAMED])
def test_it_is_one_process_everywhere(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, f"{name} {how}", on_square(name, how))
