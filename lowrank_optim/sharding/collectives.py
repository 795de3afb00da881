"""All that ranks exchange in a step. Every collective of the package is called here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.ops.devices import sent
from lowrank_optim.sharding.grid import Block, Grid, length

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


def average_(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to average a tensor over the ranks, in place: one all-reduce, and who waits for it.

    Divided before it is added up, as DistributedDataParallel does: sums of float16 would overflow.
    """
    x.div_(group.size())
    work: dist.Work = dist.all_reduce(x, group=group, async_op=True)
    return work


def broadcast(
    tensors: Sequence[Tensor] | None,
    forms: Sequence[Form],
    source: int,
    group: dist.ProcessGroup,
    device: torch.device,
    host: int = 0,
) -> list[Tensor]:
    """What rank ``source`` of the group has, on every rank: one broadcast.

    Args:
        tensors: to be sent; None on all other ranks.
        forms: of the tensors, known to all.
        source: rank of the sender in the group.
        group: the ranks.
        device: where the tensors are.
        host: how many of them, the first ones, are in the host's memory, and arrive there: who
            receives them waits for the device, once.
    """
    buffer = torch.empty(sum(f.nbytes for f in forms), dtype=torch.uint8, device=device)
    parts, head = _unpacked(buffer, forms), sum(f.nbytes for f in forms[:host])
    if tensors is not None:
        if head:
            packed = torch.zeros(head, dtype=torch.uint8)
            for part, x in zip(_unpacked(packed, forms[:host]), tensors, strict=False):
                part.copy_(x)
            buffer[:head].copy_(sent(packed, device), non_blocking=True)
        for part, x in zip(parts[host:], tensors[host:], strict=True):
            part.copy_(x)
    dist.broadcast(buffer, group=group, group_src=source)
    if not head:
        return parts
    first = (
        list(tensors[:host])
        if tensors is not None
        else _unpacked(buffer[:head].cpu(), forms[:host])
    )
    return [*first, *parts[host:]]


def from_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the first rank of the group has in the place of a tensor, on every rank."""
    mine = [x] if dist.get_rank(group) == 0 else None
    return broadcast(mine, [form(x)], 0, group, x.device)[0]


def gather(
    tensors: Sequence[Tensor],
    forms: Sequence[Sequence[Form]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """What each rank has, on every rank: one all-gather, of as much as the most that one has.

    Args:
        tensors: of this rank.
        forms: of what each rank has.
        group: the ranks.
        device: where the tensors are.
    """
    most = max(sum(f.nbytes for f in own) for own in forms)
    buffer = torch.empty(most, dtype=torch.uint8, device=device)
    for part, x in zip(_unpacked(buffer, [form(x) for x in tensors]), tensors, strict=True):
        part.copy_(x)
    arrived = torch.empty(len(forms) * most, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(arrived, buffer, group=group)
    return [
        _unpacked(own, of) for own, of in zip(arrived.view(len(forms), most), forms, strict=True)
    ]


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
    goes = [sum(form(x).nbytes for x in xs) for xs in outgoing]
    got = [sum(f.nbytes for f in forms) for forms in incoming]
    buffer = torch.empty(sum(goes), dtype=torch.uint8, device=device)
    for piece, xs in zip(torch.split(buffer, goes), outgoing, strict=True):
        for part, x in zip(_unpacked(piece, [form(x) for x in xs]), xs, strict=True):
            part.copy_(x)
    arrived = torch.empty(sum(got), dtype=torch.uint8, device=device)
    dist.all_to_all_single(arrived, buffer, got, goes, group=group)
    return [
        _unpacked(p, forms) for p, forms in zip(torch.split(arrived, got), incoming, strict=True)
    ]


def to_columns(
    blocks: Sequence[Tensor], grid: Grid, rank: int, group: dist.ProcessGroup
) -> list[Tensor]:
    """Columns of alike matrices of which each rank has a block: one all-to-all.

    Args:
        blocks: of each matrix ``(..., m, n)`` what this rank stores, ``(..., m_i, n_i)``.
        grid: who stores what, and who is to have which columns.
        rank: this one's place in the group.
        group: the ranks.

    Returns:
        ``(..., m, n_i)`` of each, with the columns of this rank.
    """
    stored, stepped = grid.stored[rank], grid.stepped[rank]
    goes = [grid.sent(rank, to) for to in range(len(grid.stepped))]
    comes = [grid.sent(source, rank) for source in range(len(grid.stored))]
    outgoing = [[_cut(x, stored, own) for x in blocks if own is not None] for own in goes]
    parts = exchange(outgoing, _forms(blocks, comes), group, blocks[0].device)
    whole = Block((0, grid.m), stepped)
    stays = grid.stays(rank)
    out = []
    for i, x in enumerate(blocks):
        new = x.new_empty(*x.shape[:-2], grid.m, length(stepped))
        if stays is not None:
            _cut(new, whole, stays).copy_(_cut(x, stored, stays))
        for source, own in enumerate(comes):
            if own is not None:
                _cut(new, whole, own).copy_(parts[source][i])
        out.append(new)
    return out


def to_blocks(
    columns: Sequence[Tensor], grid: Grid, rank: int, group: dist.ProcessGroup
) -> list[Tensor]:
    """The way back of :func:`to_columns`: one all-to-all."""
    stored, whole = grid.stored[rank], Block((0, grid.m), grid.stepped[rank])
    goes = [grid.sent(to, rank) for to in range(len(grid.stored))]
    comes = [grid.sent(rank, source) for source in range(len(grid.stepped))]
    outgoing = [[_cut(x, whole, own) for x in columns if own is not None] for own in goes]
    parts = exchange(outgoing, _forms(columns, comes), group, columns[0].device)
    stays = grid.stays(rank)
    out = []
    for i, x in enumerate(columns):
        new = x.new_empty(*x.shape[:-2], length(stored.rows), length(stored.columns))
        if stays is not None:
            _cut(new, stored, stays).copy_(_cut(x, whole, stays))
        for source, own in enumerate(comes):
            if own is not None:
                _cut(new, stored, own).copy_(parts[source][i])
        out.append(new)
    return out


def _cut(x: Tensor, of: Block, own: Block) -> Tensor:
    """The block ``own`` of a tensor that holds the block ``of``."""
    if 0 in (length(own.rows), length(own.columns)):
        return x[..., : length(own.rows), : length(own.columns)]
    rows, columns = own.rows[0] - of.rows[0], own.columns[0] - of.columns[0]
    return x[..., rows : rows + length(own.rows), columns : columns + length(own.columns)]


def _forms(xs: Sequence[Tensor], blocks: Sequence[Block | None]) -> list[list[Form]]:
    """Of what comes from each rank."""
    return [
        [
            Form((*x.shape[:-2], length(own.rows), length(own.columns)), x.dtype)
            for x in xs
            if own is not None
        ]
        for own in blocks
    ]


def _unpacked(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Views of a buffer of bytes, one after the other."""
    starts = [0, *accumulate(f.nbytes for f in forms)]
    out = []
    for f, start in zip(forms, starts, strict=False):
        size = math.prod(f.shape) * f.dtype.itemsize
        out.append(buffer[start : start + size].view(f.dtype).view(f.shape))
    return out
