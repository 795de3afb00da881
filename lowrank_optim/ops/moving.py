"""Rows moved within a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.rows import take_rows
from lowrank_optim.ops.stacked import stacked

MOVED_ELEMENTS = 1 << 24
"""Elements of moments that are moved at once on an accelerator."""


def move_rows_(x: Tensor, source: Tensor, fill: int = 0) -> None:
    """Rows of ``x (..., r, n)`` by old index in place, ``fill`` where it is -1.

    On the host only the rows that move are touched: of sorted indices many keep their place.
    """
    if source.dim() == 1 and not on_accelerator(source):
        to = (source != torch.arange(source.shape[0])).nonzero().squeeze(1)
        if to.numel():
            new = x.index_select(-2, source[to].long().clamp(min=0))
            new[..., source[to] < 0, :] = fill  # the experts of a batch share their indices
            x.index_copy_(-2, to, new)
        return
    new = take_rows(x, source)
    x.copy_(new.masked_fill_((source < 0).unsqueeze(-1), fill))


def move_rows_all_(
    lists: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], fills: Sequence[int]
) -> None:
    """:func:`move_rows_` of several lists ``(..., r, k)`` by the same ``sources (r,)``.

    What has one form is copied into one tensor, as much at a time as fills the device.
    """
    source = stacked(sources)
    at, gone = source.clamp(min=0).long(), source < 0
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for xs, fill in zip(lists, fills, strict=True):
        alike.setdefault((xs[0].shape, xs[0].dtype, fill), []).extend(xs)
    for (shape, _, fill), xs in alike.items():
        where = len(sources), *[1] * (len(shape) - 2), -1, 1
        # whole lists, so that sources can be repeated
        count = len(sources) * max(1, MOVED_ELEMENTS // max(1, len(sources) * math.prod(shape)))
        for start in range(0, len(xs), count):
            own = xs[start : start + count]
            old = torch.stack(own).view(len(own) // len(sources), len(sources), *shape)
            new = old.gather(-2, at.view(where).expand(old.shape))
            new.masked_fill_(gone.view(where), fill)
            torch._foreach_copy_(own, list(new.flatten(0, 1).unbind(0)))
