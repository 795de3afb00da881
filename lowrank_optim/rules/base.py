"""How a small gradient becomes a direction: the Rule role."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_optim.ops.quant import Moment
from lowrank_optim.ops.stacked import empty_like_all

Slots = Sequence[Moment]
Steps = Sequence[float] | Tensor
"""The step each gradient is at; on the device ``(k,)``, of k gradients, where no host may know."""


class Slot(NamedTuple):
    """One moment that a rule keeps for a gradient ``g``."""

    name: str
    signed: bool
    """Whether values can be negative; decides the 8-bit map, and how a rotation acts."""
    averaged: int | None = None
    """The dimension of ``g`` that is averaged away, for factored moments."""
    fused: bool = False
    """Whether the rule updates it by an op that reads and writes 8 bits; else it is decoded.

    The codes may have columns behind those of ``g``, which fill up a block: see :func:`filled_up`.
    """

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of this slot for a gradient of ``shape``."""
        if self.averaged is None:
            return tuple(shape)
        kept = list(shape)
        del kept[self.averaged]
        return tuple(kept)


Over = tuple[int, ...]
"""Dimensions of a mesh: the ranks that differ in these alone."""


class Split(NamedTuple):
    """What is here of a gradient, where other ranks have the rest of it."""

    shape: tuple[int, ...]
    """Of the whole."""
    dims: Mapping[int, Over]
    """The dimensions that are split, counted from the end, and those of the mesh that do it."""

    def over(self, dims: Sequence[int]) -> Over:
        """What of the mesh splits some dimensions; nothing of one that is not split."""
        return tuple(sorted(i for dim in dims for i in self.dims.get(dim, ())))


class Sum(NamedTuple):
    """A tensor that is to be added up, in place, over some ranks."""

    x: Tensor
    over: Over


Directions = tuple[list[Tensor], list[float] | list[Tensor]]
_T = TypeVar("_T")
Asking = Generator[list[Sum], None, _T]
"""Work that asks, each time it yields, for some tensors to be added up over the ranks in place."""


def finished(phases: Asking[_T]) -> _T:
    """The result where all there is to be added up is here."""
    while True:
        try:
            next(phases)
        except StopIteration as end:
            result: _T = end.value
            return result


def together(phases: Sequence[Asking[_T]]) -> Asking[list[_T]]:
    """Several at a time: what they ask for in the same turn is asked for at once."""
    results: dict[int, _T] = {}
    while len(results) < len(phases):
        asked: list[Sum] = []
        for n, own in enumerate(phases):
            if n in results:
                continue
            try:
                asked += next(own)
            except StopIteration as end:
                results[n] = end.value
        if len(results) < len(phases):
            yield asked
    return [results[n] for n in range(len(phases))]


@dataclass(frozen=True)
class Rule:
    """Direction of a gradient. Knows nothing of bases, parameters, learning rate or decay."""

    elementwise: ClassVar[bool] = True
    """Whether an entry's direction depends on that entry alone, so that a tensor may be tiled."""

    @property
    def by_row(self) -> bool:
        """Whether rows may have steps of their own: none matters, or ``ages`` are taken."""
        return True

    @property
    def host_steps(self) -> str | None:
        """Why the host must know the steps, as a clause; None if they may be on the device."""
        return f"{type(self).__name__} is not known to take steps that the device counts"

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> Rule:
        """The rule with the hyper-parameters of a parameter group."""
        raise NotImplementedError

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """The moments kept for a gradient of ``shape``."""
        raise NotImplementedError

    def directions_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> Directions:
        """Update the moments in place and return directions.

        Args:
            grads: any shapes, in the moments' dtype or a narrower one; left as they are.
            slots: the moments of each gradient, in the order of :meth:`slots`, in at least float32;
                all those of a ``fused`` slot may be in 8 bits instead.
            steps: the step each gradient is at, 1 at first; on the device where
                :attr:`host_steps` is None, and then so are the factors that are returned.
            dtype: of the directions (default: that of arithmetic).
            finite: 0-d bools on the device, one a gradient: where False, moments stay as they are
                and the direction is 0. None are given where the host has looked already.
            ages: where rows have steps of their own, those of each row ``(..., r)`` in float32, in
                place of ``steps``: the direction then has its bias correction in it, and its factor
                is 1.

        Returns:
            The raw direction of each gradient, and its bias correction as a factor apart: Fira's
            limiter looks at the direction before that correction.
        """
        raise NotImplementedError

    def phases_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
        split: Split | None = None,
    ) -> Asking[Directions]:
        """:meth:`directions_` of what is here, asking for sums of what is on all ranks.

        Args:
            grads: as of :meth:`directions_`, like all that follow.
            slots: likewise.
            steps: likewise.
            dtype: likewise.
            finite: likewise.
            ages: likewise.
            split: how the gradients lie on the ranks (default: here are all of them).
        """
        yield from ()  # an elementwise rule asks for nothing
        return self.directions_(grads, slots, steps, dtype, finite, ages)

    def weighs(self) -> bool:
        """Whether step sizes depend on the weights, by the root mean square of each matrix."""
        return False

    def biases(self, step: float) -> tuple[float, ...]:
        """``1 - beta^step`` of each slot: how far its moving mean has come from zero."""
        raise NotImplementedError

    def step_size(
        self,
        lr: float | Tensor | None,
        step: float | Tensor,
        param: Tensor,
        rms: Tensor | None = None,
    ) -> float | Tensor:
        """The learning rate of one parameter; Adafactor's depends on the step and the weights.

        Args:
            lr: of the group.
            step: of the parameter; ``()`` on the device where no host may know.
            param: what is here of it.
            rms: root mean square of the whole, where others have parts of it (default: of what is
                here), as :func:`matrix_rms` has it.
        """
        assert lr is not None  # Adafactor alone has step sizes of its own
        return lr

    def step_dense_(
        self,
        param: Tensor,
        grad: Tensor,
        slots: Sequence[Tensor],
        step: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool,
    ) -> bool:
        """One step of an unprojected parameter by torch's own implementation, where it has one.

        Called only when parameter, gradient and moments share a dtype. Advances ``step``.

        Returns:
            False if torch has none: the caller then uses :meth:`directions_`.
        """
        return False


def filled_up(x: Tensor, moment: Moment) -> Tensor:
    """``x`` with columns of zeros behind its own, where those of ``moment`` fill up a block.

    What is elementwise is given such gradients by the step. Zeros leave a block as it is.
    """
    if isinstance(moment, Tensor) or moment.codes.shape == x.shape:
        return x
    return F.pad(x, (0, moment.codes.shape[-1] - x.shape[-1]))


def directions_like(grads: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Contiguous tensors for the directions of ``grads``; one allocation where shapes are equal."""
    shape = grads[0].shape
    if len(grads) > 1 and all(g.shape == shape for g in grads):
        return empty_like_all(grads, shape, dtype or compute_dtype(grads[0].dtype))
    return [
        torch.empty(g.shape, dtype=dtype or compute_dtype(g.dtype), device=g.device) for g in grads
    ]


@functools.cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for parameters of ``dtype``: float32, or wider."""
    return torch.promote_types(dtype, torch.float32)
