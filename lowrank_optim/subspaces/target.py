"""What an update is added to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import stacked


class Target(NamedTuple):
    """What an update is added to, and how."""

    param: Tensor
    """W ``(..., m, n)``, any strides."""
    grad: Tensor
    """G, alike."""
    low: Tensor | None
    """Its coordinates, where there is one coordinate."""
    lr: float
    """Learning rate times the bias correction."""
    decay: float | Tensor = 1.0
    """Factor of the weights."""
    rounding: ops.Noise | None = None
    """Of the stochastic rounding into bfloat16; None rounds to nearest."""
    finite: Tensor | None = None
    """0-d bool on the device; where False the weights must stay as they are."""
    step: Tensor | None = None
    """Factor, on the device, of all that is added: an update and its term. The engine applies it to
    what :attr:`Subspace.takes_wide` subspaces add to zeros."""
    across: Tensor | None = None
    """Sums over all columns, by :meth:`Subspace.across`, where W has only some of them."""

    guarded: Tensor | None = None
    """What :meth:`guarded_decay` returns, where :func:`guarded` has computed it of several."""

    def guarded_decay(self) -> float | Tensor:
        """The decay, 1 where the gradient is not finite."""
        if self.guarded is not None:
            return self.guarded
        if self.finite is None or (isinstance(self.decay, float) and self.decay == 1):
            return self.decay
        # in full precision: a bare scalar would be float32
        dtype = torch.promote_types(self.param.dtype, torch.float32)
        one = torch.ones((), dtype=dtype, device=self.param.device)
        return torch.where(self.finite, one * self.decay, one)


def guarded(intos: Sequence[Target]) -> list[Target]:
    """The same with :meth:`Target.guarded_decay` known, of all that are alike in one kernel."""
    first = intos[0]
    flags = [into.finite for into in intos if into.finite is not None]
    alike = len(flags) == len(intos) > 1 and all(same_number(x.decay, first.decay) for x in intos)
    alike = alike and (isinstance(first.decay, float) or first.decay.dim() == 0)
    every = first._replace(finite=stacked(flags)).guarded_decay() if alike else 1.0
    if not isinstance(every, Tensor):  # of 1 there is nothing to guard
        return [*intos]
    return [x._replace(guarded=own) for x, own in zip(intos, every.unbind(0), strict=True)]


def decayed_(intos: Sequence[Target]) -> list[float | Tensor]:
    """Let those decay, all at once, whose flags are on the device; what is left to the others.

    A GEMM takes a factor of its own from the host alone, and a flag not at all.
    """
    left = [into.decay for into in intos]
    here = [
        n
        for n, into in enumerate(intos)
        if into.finite is not None and into.rounding is None and _decays_alike(into.decay)
    ]
    by_decay: dict[Any, list[int]] = {}
    for n in here:
        decay = intos[n].decay
        by_decay.setdefault(id(decay) if isinstance(decay, Tensor) else decay, []).append(n)
    for at in by_decay.values():
        decay = intos[at[0]].decay
        finite = [intos[n].finite for n in at]
        params = [intos[n].param for n in at]
        if isinstance(decay, Tensor):
            wide = torch.promote_types(params[0].dtype, torch.float32)
            factor = decay.reshape(()).to(params[0].device, wide, non_blocking=True)
            ops.decay_(params, 1.0, [factor] * len(at), finite)  # type: ignore[arg-type]
        else:
            ops.decay_(params, decay, [], finite)  # type: ignore[arg-type]
        for n in at:
            left[n] = 1.0
    for n, into in enumerate(intos):
        if n not in here:
            left[n] = into.guarded_decay()
    return left


def same_number(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two are the same, as far as a host knows without asking a device."""
    return a is b or (isinstance(a, float) and isinstance(b, float) and a == b)


def _decays_alike(decay: float | Tensor) -> bool:
    """Whether it is one factor for all of a matrix, and not one for each expert, nor none."""
    return decay.numel() == 1 if isinstance(decay, Tensor) else decay != 1
