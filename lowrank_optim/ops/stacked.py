"""Tensors of a bucket as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator


def empty_like_all(xs: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """One tensor of ``shape`` for each of ``xs``, one after the other in memory."""
    whole = xs[0].new_empty((len(xs), *shape), dtype=dtype)
    return list(whole.unbind(0))


def over_all(xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Where what follows from ``xs`` goes: over them on an accelerator, else into new tensors.

    No accelerator puts back what a step has written. Kernels write rows that lie without gaps.
    """
    if on_accelerator(xs[0]) and all(x.is_contiguous() for x in xs):
        return xs
    return empty_like_all(xs, xs[0].shape, xs[0].dtype)


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


def in_lines(w: Tensor) -> bool:
    """Whether ``w`` fills its memory row after row, or column after column."""
    return w.is_contiguous() or down_columns(w)


def down_columns(w: Tensor) -> bool:
    """Whether ``w`` fills its memory column after column."""
    if w.dim() != 2 or not w.numel():
        return w.dim() > 1 and w.mT.is_contiguous()
    (rows, columns), (down, across) = w.shape, w.stride()  # a view costs as much as a launch
    return (down == 1 or rows == 1) and (across == rows or columns == 1)


def as_lines(w: Tensor) -> Tensor:
    """``w`` if it is :func:`in_lines`, else a copy that is: by rows if their stride is longer."""
    if in_lines(w):
        return w
    down = w.dim() > 1 and w.stride(-2) < w.stride(-1)
    return w.mT.contiguous().mT if down else w.contiguous()


def by_copies(
    copied: Callable[[Tensor], Tensor],
    write: Callable[..., None],
    params: Sequence[Tensor],
    *lists: Sequence[Tensor],
) -> None:
    """``write`` copies of weights, which then go back: what a kernel does not take as they lie.

    One after the other: they may be large.

    Args:
        copied: :func:`as_lines`, which products round by, or ``Tensor.contiguous``.
        write: is given a copy and what belongs to it, as lists.
        params: the weights.
        *lists: parallel ones, or empty ones.
    """
    for n, w in enumerate(params):
        _by_copy(copied(w), write, w, [x[n : n + 1] for x in lists])


def _by_copy(
    own: Tensor, write: Callable[..., None], w: Tensor, lists: Sequence[Sequence[Tensor]]
) -> None:
    write([own], *lists)
    w.copy_(own)


def cast_all(xs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Alike matrices ``(..., m, n)`` in another format, stored as they are; in one copy."""
    first = xs[0]
    if first.dtype == dtype:
        return [*xs]
    turned = first.stride(-2) == 1 and first.stride(-1) != 1
    shape = first.mT.shape if turned else first.shape
    own = torch.empty((len(xs), *shape), dtype=dtype, device=first.device).unbind(0)
    wide = [x.mT for x in own] if turned else list(own)
    torch._foreach_copy_(wide, [*xs])
    return wide


def is_words(x: Tensor, length: int | None = None) -> bool:
    """Whether the memory of ``x`` is whole integers of four bytes.

    Args:
        x: any tensor.
        length: of its rows, each of which is to be whole (default: one row of all elements).
    """
    size = x.element_size()
    if size >= 4 or not x.is_contiguous():
        return x.is_contiguous()
    count = x.numel() if length is None else length
    return count * size % 4 == 0 and x.storage_offset() * size % 4 == 0


def as_words(x: Tensor, word: torch.dtype = torch.int32) -> Tensor:
    """All of ``x``, which :func:`is_words`, as they are, in a format of four bytes."""
    if x.dtype == word:
        return x
    return (x if x.element_size() == 4 else x.view(-1)).view(word)
