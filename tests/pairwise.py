"""Rows in which every two values of two factors meet: choices that do not interact by threes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def named(value: Any) -> str:
    """An id that is the same in every process: a function's name, not its address."""
    assert not hasattr(value, "marks"), f"{value} is a parameter with marks: give its value"
    return getattr(value, "__name__", None) or str(value)


def paired(*axes: Sequence[Any], marks: Any = pytest.mark.slow) -> list[Any]:
    """All combinations of some axes, as parameters: the default run has every two of their values.

    Args:
        *axes: the values of each.
        marks: of the other combinations; ``()`` for none.
    """
    places = {str(i): range(len(axis)) for i, axis in enumerate(axes)}
    fast = set(pairwise(places))
    found = []
    for at in itertools.product(*places.values()):
        values = [axis[i] for axis, i in zip(axes, at, strict=True)]
        name = "-".join(map(named, values))
        found.append(pytest.param(*values, id=name, marks=() if at in fast else marks))
    return found


def in_turns(values: Sequence[Any], turns: Sequence[Any]) -> list[Any]:
    """All combinations of two axes, as parameters: the default run has each value with one turn."""
    return [
        pytest.param(
            value,
            turn,
            id=f"{named(value)}-{named(turn)}",
            marks=() if i % len(turns) == j else pytest.mark.slow,
        )
        for i, value in enumerate(values)
        for j, turn in enumerate(turns)
    ]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    seed: int = 0,
) -> list[Row]:
    """Rows in which any two values of two factors meet, wherever some allowed row has both.

    Greedy: of some random rows that begin with a pair that has not met, the one with most such.
    """
    draw = random.Random(seed)
    values = list(factors.values())
    n = len(values)
    left = {
        (i, j, a, b)
        for i, j in itertools.combinations(range(n), 2)
        for a, b in itertools.product(range(len(values[i])), range(len(values[j])))
    }
    rows: list[Row] = []
    while left:
        i, j, a, b = min(left)
        best: tuple[int, tuple[int, ...]] | None = None
        for _ in range(40):
            row = [draw.randrange(len(v)) for v in values]
            row[i], row[j] = a, b
            count = len(left & set(_pairs_of(row)))
            if (best is None or count > best[0]) and allowed(_row(values, row)):
                best = count, tuple(row)
        if best is None:
            left.discard((i, j, a, b))  # no row may have both
            continue
        left -= set(_pairs_of(best[1]))
        rows.append(_row(values, best[1]))
    return rows


def _row(values: Sequence[Sequence[Any]], row: Sequence[int]) -> Row:
    return tuple(own[x] for own, x in zip(values, row, strict=True))


def _pairs_of(row: Sequence[int]) -> list[tuple[int, int, int, int]]:
    return [(i, j, row[i], row[j]) for i, j in itertools.combinations(range(len(row)), 2)]
