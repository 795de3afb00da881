"""LDAdam: moments follow the basis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim.ops.rows import take_rows
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.transports.base import Moments, register


@register("project")
def project(moments: Moments, moved: BasisChange) -> None:
    r"""LDAdam: re-express the moments in the new basis, with :math:`C = P_{new}^T P_{old}`.

    .. math::
        m \leftarrow C m, \qquad
        v \leftarrow b_2 \left| (C \circ C)(v / b_2 - (m / b_1)^2) + (C m / b_1)^2 \right|

    :math:`b_1, b_2` are the bias factors. The variance about the mean turns as a variance does, and
    the mean as a vector; a second moment with no first moment beside it turns by the first factor
    alone. Between sets of indices C is a permutation, which is exact: rows that stay move to their
    new places, new ones start from zero.

    References:
        Robert et al. (2024), arXiv:2410.16103.
    """
    if moved.carry is not None:
        for slot, x, _ in moments:
            if slot.averaged != -1:  # the mean of all entries says nothing of any
                x.copy_(moved.carry(x))
        return
    if moved.source is not None or moved.source_right is not None:
        _permute_(moments, moved)
        return
    if moved.rotation is None:
        return
    left = moved.rotation()
    right = None if moved.right is None else moved.right()

    def turn(x: Tensor, power: int) -> Tensor:
        c = left.to(x.dtype) ** power
        return c @ x if right is None else c @ x @ (right.to(x.dtype) ** power).mT

    mean: Tensor | None = None
    mean_bias = 1.0
    for slot, x, bias in moments:
        if slot.signed:
            mean, mean_bias = x.clone(), bias
            x.copy_(turn(x, 1))
    factors = {slot.averaged: x for slot, x, _ in moments if slot.averaged is not None}
    if factors:
        _turn_factors_(factors[-1], factors[-2], _squared(left), _squared(right))
    for slot, x, bias in moments:
        if slot.signed or slot.averaged is not None:
            continue
        if mean is None:
            x.copy_(turn(x, 2))
        else:
            centred = turn(x / bias - (mean / mean_bias).square(), 2)
            x.copy_((centred + (turn(mean, 1) / mean_bias).square()).abs() * bias)


def _permute_(moments: Moments, moved: BasisChange) -> None:
    for slot, x, _ in moments:
        if slot.averaged is not None:
            continue
        new = x if moved.source is None else take_rows(x, moved.source)
        if moved.source_right is not None:
            new = take_rows(new.mT, moved.source_right).mT
        x.copy_(new)
    factors = {slot.averaged: x for slot, x, _ in moments if slot.averaged is not None}
    if factors:
        _turn_factors_(
            factors[-1], factors[-2],
            _taken(moved.source), _taken(moved.source_right),
        )  # fmt: skip


Turn = Callable[[Tensor], Tensor]


def _taken(source: Tensor | None) -> Turn | None:
    return None if source is None else lambda x: take_rows(x, source, -1)


def _squared(c: Tensor | None) -> Turn | None:
    """How the means of squares turn with ``c``."""
    if c is None:
        return None
    return lambda x: (c.to(x.dtype).square() @ x.unsqueeze(-1)).squeeze(-1)


def _turn_factors_(row: Tensor, col: Tensor, left: Turn | None, right: Turn | None) -> None:
    """Row means ``(..., r)`` and column means ``(..., n)`` of the turned ``row col^T / mean(row)``.

    A new basis holds only part of the old energy: a turn of one side scales the means over it. A
    side that stays scales nothing, and only some of its columns may be here.
    """

    def turned(turn: Turn | None, x: Tensor) -> tuple[Tensor, Tensor | float]:
        if turn is None:
            return x.clone(), 1.0
        new, tiny = turn(x), torch.finfo(x.dtype).tiny
        return new, new.mean(-1, keepdim=True) / x.mean(-1, keepdim=True).clamp(min=tiny)

    (new_row, row_gain), (new_col, col_gain) = turned(left, row), turned(right, col)
    row.copy_(new_row * col_gain)
    col.copy_(new_col * row_gain)
