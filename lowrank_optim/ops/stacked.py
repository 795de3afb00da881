"""Tensors of a bucket as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_like_all(xs: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """One tensor of ``shape`` for each of ``xs``, one after the other in memory."""
    whole = xs[0].new_empty((len(xs), *shape), dtype=dtype)
    return list(whole.unbind(0))


def stacked(xs: Sequence[Tensor]) -> Tensor:
    """``(B, ...)``: a view where they lie one after the other in memory, else a copy."""
    first = xs[0]
    if len(xs) == 1:
        return first.unsqueeze(0)
    size, start = first.numel(), first.storage_offset()
    memory = first.untyped_storage()._cdata  # a tensor without data has one too
    for n, x in enumerate(xs):
        own = x.shape == first.shape and x.dtype == first.dtype and x.is_contiguous()
        placed = x.untyped_storage()._cdata == memory and x.storage_offset() == start + n * size
        if not (own and placed):
            return torch.stack(list(xs))
    return first.as_strided((len(xs), *first.shape), (size, *first.stride()))
