"""Checkpoints changed at random: an error that says why, or a load that can be stepped from.

In a process of its own: what once came of it was a crash.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_optim.ops import quant
from tests.checkpoints.fuzz import damaged
from tests.sharded.ranks import Ranks, World


def fuzz(examples: int, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.fuzz", str(examples), str(seed)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert " refused" in done.stdout


def test_damaged_checkpoints(ranks: Callable[[int], Ranks]) -> None:
    """Values, dtypes, shapes, orders, missing and extra entries, and junk in their place."""
    ((refused, taken),) = ranks(1).run("fuzz", of_rank, examples=40).checked()
    assert refused > taken > 0


def of_rank(world: World, examples: int) -> tuple[int, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "MIN_SIZE", 40)
        return damaged(examples)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_damaged_checkpoints(seed: int) -> None:
    fuzz(2000, seed)
