"""What a saved state may hold: checks of its values, made before anything is loaded.

Each role checks what it reads: subspaces, residuals and stores by their ``check_state``. A kernel
that follows an index outside its matrix writes into foreign memory, and a moment that is NaN ends
a run without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator

Values = Mapping[str, Tensor]
"""Entries of one parameter by their key, in the dtypes and shapes that a step expects."""

COUNTER_MAX = 2**24 - 1
"""The most that a float32 counter may say: one more is the last that it can count to."""
WIDE_COUNTER_MAX = 2**53
"""The last that a float64 counter can count to."""


def widen_(counter: Tensor) -> None:
    """Let a counter of the host be float64 from here on; it stays the same tensor."""
    counter.data = counter.data.double()


def set_counter_(counter: Tensor, count: float) -> None:
    """Let a counter say ``count``; on the host in float64 where float32 could not add 1 to it.

    One on a device stays what it is: a graph may know where.
    """
    if count >= COUNTER_MAX and not on_accelerator(counter):
        widen_(counter)
    counter.fill_(count)


def counter(count: float) -> Tensor:
    """A counter of the host that says ``count``, in the format that can."""
    x = torch.zeros((), dtype=torch.float32)
    set_counter_(x, count)
    return x


def check_counter(state: Values, key: str, least: int = 0, most: float = COUNTER_MAX) -> None:
    """Raise unless every number under ``key``, if there are any, is whole and in range.

    Raises:
        ValueError: with what was found, where, and what is allowed.
    """
    x = _entry(state, key)
    if x is None:
        return
    low, high = (float(bound) for bound in x.aminmax())
    whole = not x.is_floating_point() or bool((x == x.floor()).all())
    # NaN compares as neither
    if not (whole and least <= low and high <= most and math.isfinite(high)):
        exact = x.double()  # in float32 a bound may be rounded
        wrong = ~((exact >= least) & (exact <= most) & x.isfinite())
        if x.is_floating_point():
            wrong |= x != x.floor()
        raise _found(key, x, wrong, f"whole numbers from {least} to {most:.0f}")


def check_index(state: Values, key: str, size: int, order: str = "any") -> None:
    """Raise unless every entry under ``key``, if there are any, is an index of ``size`` places.

    Args:
        state: of one parameter.
        key: of an integer entry ``(..., r)``.
        size: how many places there are.
        order: "any"; "distinct", where none may come twice; or "ascending", where each must be
            larger than the one before.

    Raises:
        ValueError: with what was found, where, and what is allowed.
    """
    x = _entry(state, key)
    if x is None:
        return
    low, high = (int(bound) for bound in x.aminmax())
    allowed = f"0 to {size - 1}"
    if order != "any":
        allowed += ", each once" if order == "distinct" else ", ascending"
    if low < 0 or high >= size:
        raise _found(key, x, (x < 0) | (x >= size), allowed)
    if order == "any" or x.shape[-1] < 2:
        return
    ordered = x.sort(-1).values if order == "distinct" else x
    again = ordered[..., 1:] <= ordered[..., :-1]
    if bool(again.any()):
        values = ordered[..., 1:][again]
        what = "twice" if order == "distinct" else "after one that is not smaller"
        raise ValueError(f"{key} holds {int(values[0])} {what}; allowed are {allowed}")


def check_finite(state: Values, key: str, least: float = -math.inf) -> None:
    """Raise unless all numbers under ``key``, if there are any, are finite and at least ``least``.

    Raises:
        ValueError: with what was found, where, and what is allowed.
    """
    x = _entry(state, key)
    if x is None:
        return
    low, high = (float(bound) for bound in x.aminmax())  # NaN if any is
    if not (math.isfinite(low) and math.isfinite(high) and low >= least):
        allowed = "finite numbers" if least == -math.inf else f"finite numbers from {least:g} up"
        raise _found(key, x, ~(x.isfinite() & (x >= least)), allowed)


def readable(key: str, value: Any) -> Tensor:
    """A saved entry as a plain tensor: numbers too.

    Raises:
        ValueError: it is no number, and no tensor whose values can be read.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"{key} holds {_shown(value)}; allowed are tensors and numbers"
            ) from None
    x: Tensor = value.detach()
    kinds = {
        "meta": x.is_meta,
        "quantized": x.is_quantized,
        "sparse": x.layout != torch.strided,
        "complex": x.is_complex(),
        "bool": x.dtype == torch.bool,
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(f"{key} is a {kind} tensor; allowed are dense ones of real numbers")
    return x


def as_dtype(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that an entry would have in ``dtype``; integers are not cut yet.

    Raises:
        ValueError: it is of a kind that does not become ``dtype``.
    """
    x = x.to_local() if hasattr(x, "to_local") else x  # of a DTensor, what this rank has
    kind = x.dtype
    if dtype == torch.uint8 != kind or kind.is_floating_point > dtype.is_floating_point:
        raise ValueError(f"{key} is {kind}; allowed is {dtype}")
    return x.to(dtype if dtype.is_floating_point or kind == dtype else torch.int64)


def _entry(state: Values, key: str) -> Tensor | None:
    """The entry, if it is there and not empty: which keys there are is compared elsewhere."""
    x = state.get(key)
    return x if x is not None and x.numel() else None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _found(key: str, x: Tensor, wrong: Tensor, allowed: str) -> ValueError:
    """The first entry that is wrong, and where it is."""
    at = wrong.nonzero()[0].tolist()
    value = x[tuple(at)].item()
    place = f" at {at}" if at else ""
    return ValueError(f"{key} holds {value}{place}; allowed are {allowed}")
