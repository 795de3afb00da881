"""Step sizes and decays: numbers of the host, or tensors of which no host asks the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.stacked import stacked


def same_number(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two are the same, as far as a host knows without asking a device."""
    return a is b or (isinstance(a, float) and isinstance(b, float) and a == b)


def is_one(factor: float | Tensor) -> bool:
    """Whether the host knows that it changes nothing."""
    return isinstance(factor, float) and factor == 1


def number_of(factor: float | Tensor) -> float:
    """What kernels get of it from the host, and 1 if it is on the device."""
    return 1.0 if isinstance(factor, Tensor) else factor


def is_number(factor: float | Tensor) -> bool:
    """Whether it is one for all of a matrix, and not one for each expert."""
    return not isinstance(factor, Tensor) or factor.numel() == 1


def on_device(factors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Numbers as the kernels of matrices like ``like`` read them: ``()``, in at least float32.

    One that several have in common is brought there once, others all at once.
    """
    wide, device = torch.promote_types(like.dtype, torch.float32), like.device
    if all([x.dtype == wide and x.dim() == 0 and x.device == device for x in factors]):
        return [*factors]
    distinct = [*{id(x): x for x in factors}.values()]
    found = distinct
    if any(x.dtype != wide or x.device != device for x in distinct):
        whole = stacked([x.reshape(()) for x in distinct])
        found = [*whole.to(device, wide, non_blocking=True).unbind(0)]
    known = {id(x): own.reshape(()) for x, own in zip(distinct, found, strict=True)}
    return [known[id(x)] for x in factors]
