"""The Triton kernels in Triton's interpreter, where there is no GPU to run them."""

from __future__ import annotations

import pytest

from tests.ops.interpreted import FILES, INTERPRETED, QUICK, WHOLE, run_interpreted

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels(marks: str) -> None:
    """Triton's own tests, and what of ``test_ops.py`` all backends share."""
    run_interpreted(marks, files=[x for x in FILES if marks != "slow" or x not in QUICK])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_every_op_in_every_format_and_layout() -> None:
    """float32, bfloat16, float16; by rows, by columns and of a slice."""
    run_interpreted("not slow", WHOLE, ["test_ops.py"])
