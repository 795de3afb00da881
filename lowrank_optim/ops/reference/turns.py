"""Rows that are turned or stepped, and their products with others: the factors of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.reference.arguments import Tensors, or_none, times


def row_dots_(xs: Tensors, ys: Tensors, outs: Tensors) -> None:
    """``x_i . y_i`` of each row."""
    for x, y, out in zip(xs, ys, outs, strict=True):
        torch.sum(x.to(out.dtype) * y, -1, out=out)


def turn_rows_(
    xs: Tensors,
    directions: Tensors,
    lengths: Tensors,
    across: Tensors,
    outs: Tensors,
    moves: Tensors,
    lr: float,
) -> None:
    """``x' = unit(x - lr d)``, and rows by whose products with others the weight moves."""
    others = [or_none(own, len(xs)) for own in (lengths, across, moves)]
    for x, d, out, length, parts, move in zip(xs, directions, outs, *others, strict=True):
        step = d.to(x.dtype) * lr
        turned = x - step
        if parts is None:
            norm = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
            moved = (step != 0).any(-1, keepdim=True)
        else:
            squares, moved = parts.unsqueeze(-1)
            norm, moved = squares.sqrt().to(x.dtype), moved != 0
        new = _apart(out, x)
        torch.where(moved, turned / norm.clamp(min=torch.finfo(x.dtype).tiny), x, out=new)
        if move is not None:
            rank = x.shape[-2]
            first, second = move[..., :rank, :], move[..., rank:, :]
            if length is None:
                torch.sub(new, x, out=first)
                second.copy_(x)
            else:
                after, before = length.unsqueeze(-1)
                whole = after * new
                first.copy_(whole)
                torch.sub(whole, before * x, out=second)
        if new is not out:
            out.copy_(new)


def _apart(out: Tensor, x: Tensor) -> Tensor:
    """``out``, or memory for it where it is ``x``, which is still to be read."""
    return torch.empty_like(x) if out is x else out


def step_rows_(
    xs: Tensors,
    directions: Tensors,
    outs: Tensors,
    moves: Tensors,
    lr: float,
    decay: float,
    ahead: bool,
    decays: Tensors = (),
) -> None:
    """``x' = decay x - lr d``, and rows by whose products with others the weight moves."""
    others = times(decay, decays, len(xs)), or_none(moves, len(xs))
    for x, d, out, factor, move in zip(xs, directions, outs, *others, strict=True):
        decayed = x * factor if isinstance(factor, torch.Tensor) or factor != 1 else x
        new = _apart(out, x)
        torch.sub(decayed, d.to(x.dtype), alpha=lr, out=new)
        if move is not None:
            first, second = move[..., : x.shape[-2], :], move[..., x.shape[-2] :, :]
            if ahead:
                first.copy_(new)
                torch.sub(new, x, out=second)
            else:
                by = torch.sub(new, x, out=None if new is out else x)
                first.copy_(by)
                torch.sub(new, by, out=second)
        if new is not out:
            out.copy_(new)
