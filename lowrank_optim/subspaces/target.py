"""What an update is added to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.numbers import is_number, is_one, number_of, on_device, same_number
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.subspaces.terms import Term


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
    """Factor of :attr:`lr`, ``()`` on the device: of an update and its term. Subspaces get it that
    take it (:meth:`Subspace.takes_step`)."""
    across: Tensor | None = None
    """Sums over all columns, by :meth:`Subspace.across`, where W has only some of them."""

    guarded: Tensor | None = None
    """What :meth:`guarded_decay` returns, where :func:`guarded` has computed it of several."""

    @property
    def numbers(self) -> tuple[float, float]:
        """Decay and step size as kernels get them from the host."""
        return number_of(self.decay), self.lr

    @property
    def read(self) -> tuple[bool, bool, bool]:
        """Which of :func:`of_kernels` there are."""
        return self.finite is not None, self.step is not None, isinstance(self.decay, Tensor)

    def guarded_decay(self) -> float | Tensor:
        """The decay, 1 where the gradient is not finite."""
        if self.guarded is not None:
            return self.guarded
        if self.finite is None or is_one(self.decay):
            return self.decay
        # in full precision: a bare scalar would be float32
        dtype = torch.promote_types(self.param.dtype, torch.float32)
        if isinstance(self.decay, Tensor):
            one = torch.ones((), dtype=dtype, device=self.param.device)
            return torch.where(self.finite, self.decay.to(dtype), one)
        ones = torch.ones(self.finite.shape, dtype=dtype, device=self.param.device)
        return ones.masked_fill_(self.finite, self.decay)


def guarded(intos: Sequence[Target]) -> list[Target]:
    """The same with :meth:`Target.guarded_decay` known, of all that are alike in one kernel."""
    every = _guarded(intos)
    if every is None:
        return [*intos]
    return [x._replace(guarded=own) for x, own in zip(intos, every, strict=True)]


def _guarded(intos: Sequence[Target]) -> Sequence[Tensor] | None:
    """:meth:`Target.guarded_decay` of alike ones in one kernel; None of others, and of 1."""
    first = intos[0]
    flags = [into.finite for into in intos if into.finite is not None]
    alike = len(flags) == len(intos) > 1 and all(same_number(x.decay, first.decay) for x in intos)
    alike = alike and (isinstance(first.decay, float) or first.decay.dim() == 0)
    every = first._replace(finite=stacked(flags)).guarded_decay() if alike else 1.0
    return every.unbind(0) if isinstance(every, Tensor) else None


def decayed_(intos: Sequence[Target]) -> list[float | Tensor]:
    """Let those decay, all at once, whose flags are on the device; what is left to the others.

    torch's GEMMs take a factor from the host alone, and a flag not at all.
    """
    left = [into.decay for into in intos]
    here = [
        n
        for n, into in enumerate(intos)
        if into.finite is not None and into.rounding is None
        if is_number(into.decay) and not is_one(into.decay)
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
            factors = on_device([decay] * len(at), params[0])
            ops.decay_(params, 1.0, factors, finite)  # type: ignore[arg-type]
        else:
            ops.decay_(params, decay, [], finite)  # type: ignore[arg-type]
        for n in at:
            left[n] = 1.0
    for n, into in enumerate(intos):
        if n not in here:
            left[n] = into.guarded_decay()
    return left


def lift_all_(
    intos: Sequence[Target],
    bases: Sequence[Tensor],
    lows: Sequence[Tensor],
    rights: Sequence[Tensor | None],
    alphas: Sequence[float],
) -> Iterator[int]:
    """``W <- decay W + alpha P N (Q^T)`` of each, by number when it is written.

    Args:
        intos: what is added to.
        bases: P ``(..., m, r)``.
        lows: N ``(..., r, n)``, or ``(..., r, r)`` with Q.
        rights: Q ``(..., n, r)``, or None.
        alphas: factors of the products; those with a :attr:`Target.step` are multiplied by it too.
    """
    if _read_factors(intos):
        yield from _lift_there_(intos, bases, lows, rights, alphas)
        return
    for n, decay in enumerate(decayed_(intos)):
        into = intos[n]
        assert into.step is None  # as ops.reads_factors has it
        ops.lift_add_(into.param, bases[n], lows[n], rights[n], decay, alphas[n], into.rounding)
        yield n


def _lift_there_(
    intos: Sequence[Target],
    bases: Sequence[Tensor],
    lows: Sequence[Tensor],
    rights: Sequence[Tensor | None],
    alphas: Sequence[float],
) -> Iterator[int]:
    """The same by products that read their factors on the device, all at once if N are there."""
    params = [into.param for into in intos]
    found: Sequence[float | Tensor] | None = _guarded(intos)
    found = found or [into.guarded_decay() for into in intos]
    decays = _there(found, params[0])
    own = on_device([into.step for into in intos if into.step is not None], params[0])
    steps = torch._foreach_mul(own, [*alphas]) if own else _there(alphas, params[0])
    if rights[0] is None:
        ops.addmm_(params, bases, lows, steps, decays)
        yield from range(len(intos))
        return
    for n, (low, right) in enumerate(zip(lows, rights, strict=True)):
        assert right is not None
        whole = [low @ right.mT.to(low.dtype)]
        ops.addmm_(params[n : n + 1], bases[n : n + 1], whole, [steps[n]], [decays[n]])
        yield n


def _read_factors(intos: Sequence[Target]) -> bool:
    """Whether a factor of all is on the device, and products of the first read it there."""
    for into in intos:
        there = into.finite is not None or isinstance(into.decay, Tensor)
        if into.step is None and (is_one(into.decay) or not there):
            return False
        if into.rounding is not None or not is_number(into.decay):
            return False
    return ops.reads_factors(intos[0].param)


def _there(factors: Sequence[float | Tensor], like: Tensor) -> list[Tensor]:
    """All on the device: numbers go with kernels that fill, one for each of them."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = {x for x in factors if isinstance(x, float)}
    known = {x: torch.full((), x, dtype=dtype, device=like.device) for x in numbers}
    return on_device([known[x] if isinstance(x, float) else x for x in factors], like)


def gains_of(terms: Sequence[Term | None], like: Tensor) -> list[Tensor]:
    """What kernels read on the device of terms that have their gain there."""
    gains = [term.gain for term in terms if term is not None and isinstance(term.gain, Tensor)]
    return on_device(gains, like)


def of_kernels(intos: Sequence[Target]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What kernels read of matrices on the device: flags, steps and decays, one of each or none."""
    flags = [into.finite for into in intos if into.finite is not None]
    steps = [into.step for into in intos if into.step is not None]
    decays = [into.decay for into in intos if isinstance(into.decay, Tensor)]
    like = intos[0].param
    return flags, on_device(steps, like), on_device(decays, like)
