"""Rows moved within a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops import matrices as ops
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.rows import take_rows


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
    """:func:`move_rows_` of several lists ``(..., r, k)`` by the same ``sources (r,)``, at once.

    What does not lie in one piece is moved by itself.
    """
    whole: list[tuple[Tensor, Tensor, int]] = []
    for xs, fill in zip(lists, fills, strict=True):
        for x, source in zip(xs, sources, strict=True):
            if not x.is_contiguous():
                move_rows_(x, source, fill)
                continue
            each = x.flatten(0, -3).unbind(0) if x.dim() > 2 else [x]
            whole += [(own, source, fill) for own in each]
    if whole:
        own, where, what = zip(*whole, strict=True)
        ops.move_rows_(list(own), list(where), list(what))
