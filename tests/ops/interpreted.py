"""Kernels interpreted on CPU tensors, in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and other modules compile in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.pairwise import paired

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is such a process."""


FILES = (
    "test_triton.py", "test_triton_cosine.py", "test_triton_lists.py", "test_layouts.py",
    "test_ops.py",
)  # fmt: skip
"""In one process: Triton and torch are imported once."""
SHARED = (
    "guarded or no_ or denormal or flags or top_rows or factors_of or unsound_lift and float32"
    " or (matrices or matrix or columns_of or directions) and rows and float32"
)
"""Of what all backends have in common, in the default run: of the cosine ops none.

``test_triton_cosine.py`` has the three of matrices, in more lengths, and whole steps.
"""
DEFAULT = f"not test_ops or ({SHARED}) and not opcheck"
QUICK = ("test_triton_lists.py", "test_ops.py")
"""Those of which :data:`DEFAULT` chooses no slow test."""
WHOLE = "not forced_backend"
"""Of ``test_ops.py`` every op in every format and layout. Of what a forced backend refuses, one
case is Triton on a CPU, where it runs here."""


def first_triton() -> bool:
    """Whether this is Triton 3.2, that of torch 2.6."""
    import triton

    return bool(triton.__version__.startswith("3.2."))


def run_interpreted(marks: str, chosen: str = DEFAULT, files: Sequence[str] = FILES) -> None:
    """The tests of the kernels with these marks, in a process where Triton interprets."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", marks]
    command += ["-k", chosen]
    run = subprocess.run(
        [*command, *(str(here / name) for name in files)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    for name in files:
        assert name in run.stdout, f"nothing of {name} was run: {run.stdout[-2000:]}"


def unless_interpreted(*values: Any) -> Any:
    """Parameters that compiled kernels run always, and interpreted ones in the slow run."""
    marks = pytest.mark.slow if INTERPRETED else ()
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of some axes; interpreted, the default run has every two of their values."""
    return paired(*axes, marks=pytest.mark.slow if INTERPRETED else ())
