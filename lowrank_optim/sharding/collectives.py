"""All that ranks exchange in a step. Every collective of the package is called here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGN = 8
"""Tensors in one message begin at multiples of this many bytes."""


class Form(NamedTuple):
    """Shape and dtype of a tensor that is to arrive."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of its data, rounded up so that another tensor may follow."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN) * ALIGN


def form(x: Tensor) -> Form:
    """Of a tensor like this one."""
    return Form(tuple(x.shape), x.dtype)


def sum_(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Add up tensors of one dtype over the ranks, in place: one all-reduce."""
    if not tensors:
        return
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=group)
        return
    whole = torch.cat([x.reshape(-1) for x in tensors])
    dist.all_reduce(whole, group=group)
    for x, part in zip(tensors, torch.split(whole, [x.numel() for x in tensors]), strict=True):
        x.copy_(part.view(x.shape))


def broadcast(
    tensors: Sequence[Tensor] | None,
    forms: Sequence[Form],
    source: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Tensor]:
    """What rank ``source`` of the group has, on every rank: one broadcast.

    Args:
        tensors: to be sent; None on all other ranks.
        forms: of the tensors, known to all.
        source: rank of the sender in the group.
        group: the ranks.
        device: where the tensors are.
    """
    buffer = torch.empty(sum(f.nbytes for f in forms), dtype=torch.uint8, device=device)
    parts = _unpacked(buffer, forms)
    if tensors is not None:
        for part, x in zip(parts, tensors, strict=True):
            part.copy_(x)
    dist.broadcast(buffer, group=group, group_src=source)
    return parts


def tell(text: str | None, source: int, group: dist.ProcessGroup) -> str:
    """What rank ``source`` of the group has to say, on every rank: text, where something failed."""
    texts = [text]
    dist.broadcast_object_list(texts, src=dist.get_global_rank(group, source), group=group)
    return str(texts[0])


def exchange(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Form]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """Send some tensors to each rank and get some from each: one all-to-all.

    Args:
        outgoing: what goes to each rank of the group.
        incoming: forms of what comes from each.
        group: the ranks.
        device: where the tensors are.
    """
    sent = [sum(form(x).nbytes for x in xs) for xs in outgoing]
    got = [sum(f.nbytes for f in forms) for forms in incoming]
    buffer = torch.empty(sum(sent), dtype=torch.uint8, device=device)
    for piece, xs in zip(torch.split(buffer, sent), outgoing, strict=True):
        for part, x in zip(_unpacked(piece, [form(x) for x in xs]), xs, strict=True):
            part.copy_(x)
    arrived = torch.empty(sum(got), dtype=torch.uint8, device=device)
    dist.all_to_all_single(arrived, buffer, got, sent, group=group)
    return [
        _unpacked(p, forms) for p, forms in zip(torch.split(arrived, got), incoming, strict=True)
    ]


def to_columns(
    rows: Sequence[Tensor],
    heights: Sequence[Sequence[int]],
    widths: Sequence[Sequence[int]],
    rank: int,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Columns of matrices of which each rank has rows: one all-to-all.

    Args:
        rows: of each matrix ``(..., m_i, n)`` those of this rank.
        heights: of each matrix, the rows that each rank has.
        widths: of each, the columns that each rank is to have.
        rank: this one's place in the group.
        group: the ranks.

    Returns:
        ``(..., m, n_i)`` of each.
    """
    outgoing, incoming = _pieces(rows, widths, heights, -1, rank)
    parts = exchange(outgoing, incoming, group, rows[0].device)
    return [torch.cat([own[i] for own in parts], -2) for i in range(len(rows))]


def to_rows(
    columns: Sequence[Tensor],
    heights: Sequence[Sequence[int]],
    widths: Sequence[Sequence[int]],
    rank: int,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """The way back of :func:`to_columns`: one all-to-all."""
    outgoing, incoming = _pieces(columns, heights, widths, -2, rank)
    parts = exchange(outgoing, incoming, group, columns[0].device)
    return [torch.cat([own[i] for own in parts], -1) for i in range(len(columns))]


def _pieces(
    xs: Sequence[Tensor],
    cut: Sequence[Sequence[int]],
    joined: Sequence[Sequence[int]],
    dim: int,
    rank: int,
) -> tuple[list[list[Tensor]], list[list[Form]]]:
    """What of each tensor goes to each rank, cut along ``dim``, and the forms of what comes."""
    pieces = [torch.split(x, list(sizes), dim) for x, sizes in zip(xs, cut, strict=True)]
    ranks = range(len(cut[0]))
    incoming = []
    for source in ranks:
        forms = []
        for x, mine, theirs in zip(xs, cut, joined, strict=True):
            shape = list(x.shape)
            shape[dim], shape[-3 - dim] = mine[rank], theirs[source]
            forms.append(Form(tuple(shape), x.dtype))
        incoming.append(forms)
    return [[piece[to] for piece in pieces] for to in ranks], incoming


def _unpacked(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Views of a buffer of bytes, one after the other."""
    starts = [0, *accumulate(f.nbytes for f in forms)]
    out = []
    for f, start in zip(forms, starts, strict=False):
        size = math.prod(f.shape) * f.dtype.itemsize
        out.append(buffer[start : start + size].view(f.dtype).view(f.shape))
    return out
