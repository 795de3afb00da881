"""The Triton kernels in Triton's interpreter, where there is no GPU to run them."""

from __future__ import annotations

import pytest

from tests.ops.interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels(marks: str) -> None:
    """``test_triton.py``, ``test_triton_cosine.py`` and what of ``test_ops.py`` backends share."""
    run_interpreted(marks)
