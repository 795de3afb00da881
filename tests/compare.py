"""How close is close: the one table of tolerances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(1e-2, 1e-3),
    torch.float16: Tolerance(1e-3, 1e-4),
}
"""Keyed by the narrowest format that a result went through."""


def errors(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Which entries differ by more than the table allows; NaN is equal to NaN only."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}")
    rtol, atol = TOLERANCES[dtype]
    return ~torch.isclose(
        actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Every entry within the tolerance of ``dtype`` (default: the narrower of the two).

    Whole numbers, as indices are, must be equal.
    """
    if not actual.is_floating_point():
        if not torch.equal(actual, expected):
            raise AssertionError(f"whole numbers differ: {actual}, {expected}")
        return
    assert_mostly_close(actual, expected, dtype, max_error_rate=0.0)


def assert_mostly_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, *, max_error_rate: float
) -> None:
    """Up to ``max_error_rate`` of the entries may differ: for rules that take signs.

    A sign flips where its argument is within rounding of zero, and then differs by 2, not an ulp.
    """
    dtype = dtype or min(actual.dtype, expected.dtype, key=lambda d: d.itemsize)
    wrong = errors(actual, expected, dtype)
    rate = float(wrong.double().mean()) if wrong.numel() else 0.0
    if rate > max_error_rate:
        gap = (actual.detach().double() - expected.detach().double()).abs().max()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} entries ({rate:.2%}) differ by more than "
            f"{TOLERANCES[dtype]} of {dtype}; largest difference {float(gap):.3e}"
        )


def relative(actual: Tensor, expected: Tensor) -> float:
    """``|a - e| / |e|`` in the Frobenius norm."""
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).norm() / e.norm())
