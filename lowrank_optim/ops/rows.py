"""Rows by where they stood: what happens to moments that belong to indices."""

from __future__ import annotations

from torch import Tensor


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
