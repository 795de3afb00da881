"""What the owner of a matrix puts together of the pieces that ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.sharding.collectives import Form
from lowrank_optim.sharding.grid import Block, Interval, length
from lowrank_optim.tensors.alive import of_shape


class Input(NamedTuple):
    """What an owner puts together of pieces that ranks have."""

    here: Tensor
    """That of this rank."""
    shape: tuple[int, ...]
    """Of the whole."""
    places: list[tuple[Any, ...]]
    """Index of each rank's piece."""

    def form(self, rank: int) -> Form:
        """Of the piece of one rank."""
        whole = of_shape(self.shape)
        return Form(tuple(whole[self.places[rank]].shape), self.here.dtype)

    def together(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole."""
        whole = self.here.new_empty(self.shape)
        for place, piece in zip(self.places, pieces, strict=True):
            whole[place] = piece
        return whole


def _along(x: Tensor, dim: int, spans: Sequence[Interval]) -> Input:
    shape = list(x.shape)
    shape[dim] = sum(map(length, spans))
    return Input(x, tuple(shape), [(slice(None),) * dim + (slice(*span),) for span in spans])


def inputs_of(d: Due) -> list[Input]:
    """What the owner needs of this rank. Factors of W are all found anew, and of W alone."""
    view, part = d.item.view, d.part
    if factors_weight(d):
        assert view is not None and d.twin.view is not None
        weight = d.twin.view.of(d.twin.param)
        if part.side == "batch":
            return [_along(weight, 0, part.spans)]
        every = (0, view.m)
        stored = part.grid.stored if part.grid else [Block(every, span) for span in part.spans]
        places = [(..., slice(*rows), slice(*columns)) for rows, columns in stored]
        return [Input(weight, (*view.batch, view.m, view.n), places)]
    split, found = split_dims(d.item, d.chosen), []
    if gathers(d):
        assert d.grad is not None
        found.append(_along(d.grad, 0 if part.side == "batch" else d.grad.dim() - 1, part.spans))
    keys = [key for key in d.entries if key in split]
    return [*found, *(_along(d.state[key], split[key][0], part.spans) for key in keys)]


def factors_weight(d: Due) -> bool:
    """Whether the owner needs the weight, and nothing else."""
    return d.subspace.of_weight and not d.balanced


def gathers(d: Due) -> bool:
    """Whether the owner needs the gradient itself."""
    if d.balanced:
        return False
    remembers = d.chosen.residual.wants == "memory"  # then its norm is known to nobody
    assert d.item.view is not None  # of a batch, matrices without a gradient keep their basis
    return d.subspace.reads_grad or bool(d.item.view.batch) or remembers
