"""Rows by where they stood: what happens to moments that belong to indices."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator


def check_rows(op: str, index: Tensor, rows: int, least: int = 0) -> None:
    """Raise unless ``index (..., r)`` ascends within ``rows``, each once; of the host.

    On an accelerator nobody looks: the host would have to wait.

    Args:
        op: what follows it.
        index: integers.
        rows: how many rows there are.
        least: -1 where that stands for nowhere, and may be anywhere.

    Raises:
        IndexError: with the first index that is wrong.
    """
    if on_accelerator(index) or not index.numel():
        return
    wrong = (index < least) | (index >= rows)
    if bool(wrong.any()):
        raise IndexError(f"{op}: index {int(index[wrong][0])} is not in [{least}, {rows - 1}]")
    for own in index.reshape(-1, index.shape[-1]):
        own = own[own >= 0]
        late = own[1:] <= own[:-1]
        if bool(late.any()):
            before, after = int(own[:-1][late][0]), int(own[1:][late][0])
            raise IndexError(
                f"{op}: index {after} comes after {before}; indices must ascend, each once"
            )


def take_rows(x: Tensor, source: Tensor, dim: int = -2) -> Tensor:
    """Rows of ``x`` by old index along ``dim``, zeros where it is -1.

    Args:
        x: ``(..., r, n)`` with ``dim=-2``, or ``(..., r)`` with ``dim=-1``.
        source: ``(r,)``, or with the leading dimensions of ``x``.
        dim: the dimension of the rows.
    """
    if source.dim() == 1 and x.dim() == -dim:  # whole rows: a copy of memory
        taken = x.index_select(dim, source.long().clamp(min=0))
        return taken.masked_fill_((source < 0).reshape([-1] + [1] * (-1 - dim)), 0)
    at = source.long() if dim == -1 else source.long().unsqueeze(-1)
    shape = list(x.shape)
    shape[dim] = source.shape[-1]
    at = at.expand(shape)
    return x.gather(dim, at.clamp(min=0)).masked_fill_(at < 0, 0)
