"""Checkpoints changed at random: an error that says why, or a load that can be stepped from.

In a process of its own: what once came of it was a crash.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_damaged_checkpoints() -> None:
    """Values, dtypes, shapes, orders, missing and extra entries, and junk in their place."""
    fuzz(100, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_damaged_checkpoints(seed: int) -> None:
    fuzz(2000, seed)
