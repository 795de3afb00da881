"""Kernels interpreted on CPU tensors, in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and other modules compile in this process.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is such a process."""


def run_interpreted(file: str, *, marks: str = "not slow", chosen: str = "") -> None:
    """The tests of ``file`` with these marks and names, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks]
    run = subprocess.run(
        [*command, "-k", chosen, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def unless_interpreted(*values: Any) -> Any:
    """Parameters that compiled kernels run always, and interpreted ones in the slow run."""
    marks = pytest.mark.slow if INTERPRETED else ()
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of three axes; interpreted, the slow run has some of them.

    Left are those whose last value is given by the sum of the others, as in a Latin square: every
    two values of two axes meet where no axis before the last is shorter than it.
    """
    found = []
    for at in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, at, strict=True)]
        if sum(at[:-1]) % len(axes[-1]) == at[-1]:
            found.append(pytest.param(*values, id="-".join(map(str, values))))
        else:
            found.append(unless_interpreted(*values))
    return found
