"""Checkpoints from one mesh to another: a run that goes from mesh to mesh is one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sharded import test_full_state, training
from tests.sharded.combinations import NAMED
from tests.sharded.ranks import Ranks
from tests.sharded.test_resharding import LEG, in_memory, leg
from tests.sharded.training import Case

Worlds = Callable[[int], Ranks]
ONLY = ("wide", "tall", "few")
LEGS: dict[str, tuple[int, str, str]] = {
    "2 x 2 copies": (4, "fsdp", "square"),
    "2 x 2 copies of columns": (4, "fsdp columns", "square"),
    "2 x 2 parallel": (4, "parallel", "square"),
    "2 x 2 parallel placed": (4, "parallel placed", "square"),
    "4": (4, "fsdp", "all"),
    "2": (2, "fsdp", "all"),
    "1": (1, "fsdp", "all"),
}
"""Ranks, how a model is split over them, and their mesh."""
ROUTE = ("2 x 2 copies", "4", "2", "1", "2 x 2 parallel", "2 x 2 copies")
OTHER = ("1", "2 x 2 parallel placed", "2 x 2 parallel", "2", "2 x 2 copies of columns", "1")


def of(name: str, key: str) -> Case:
    _, how, mesh = LEGS[key]
    torchs = Case("torch.AdamW", {"foreach": False})
    own = torchs if name == "torch" else NAMED[name]
    return replace(own, how=how, mesh=mesh, only=ONLY)


def check(ranks: Worlds, name: str, route: tuple[str, ...], folder: Path, flat: bool) -> None:
    whole = replace(of(name, "1"), steps=LEG * len(route))
    expected, source = training.reference(whole), None
    for i, key in enumerate(route):
        size, target = LEGS[key][0], str(folder / str(i))
        args = {"begin": i * LEG, "source": source, "target": target, "flat": flat}
        job = ranks(size).run(f"leg {i}", leg, case=of(name, key), plain=size == 1, **args)
        run = training.assembled(job.checked())
        training.assert_equal_runs(run, expected[i * LEG : (i + 1) * LEG])
        source = target


def test_a_run_from_mesh_to_mesh_is_one_run(ranks: Worlds, tmp_path: Path) -> None:
    check(ranks, "rsvd", ("2 x 2 copies", "2", "2 x 2 parallel"), tmp_path, False)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("route", [ROUTE, OTHER], ids=["there", "other"])
@pytest.mark.parametrize(
    "name", ["torch", "rsvd", "svd full", "dct memory", "frugal columns", "ldadam"]
)
def test_a_run_from_mesh_to_mesh_is_one_run_everywhere(
    name: str, route: tuple[str, ...], flat: bool, ranks: Worlds, tmp_path: Path
) -> None:
    check(ranks, name, route, tmp_path, flat)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in LEGS if "x" in key])
@pytest.mark.parametrize("name", ["fira svd", "svd full", "dct memory"])
def test_another_optimizer_takes_over(name: str, key: str, ranks: Worlds) -> None:
    """From whole states that every rank has, and from shards.

    Under tensor parallel of sizes that ranks divide: torch reads no other whole weights.
    """
    only = ("large", "square") if "parallel" in key else ONLY
    case = replace(of(name, key), steps=8, only=only)
    for full in (False, True):
        values = ranks(4).run(name, in_memory, case=case, flat=False, full=full).checked()
        expected = training.reference(case.reference)
        training.assert_equal_runs(training.assembled(values), expected)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["2 x 2 copies", "2 x 2 parallel"])
@pytest.mark.parametrize("way", test_full_state.WAYS)
def test_a_run_goes_on_from_a_whole_state(way: str, key: str, ranks: Worlds) -> None:
    """Of rank 0 alone, of every rank, and by ``load_state_dict``: bit for bit."""
    case = replace(of("rsvd", key), steps=8)
    goes_on = test_full_state.goes_on
    ranks(4).run(way, goes_on, case=case, way=way, cuts=((4, 2),)).checked()
