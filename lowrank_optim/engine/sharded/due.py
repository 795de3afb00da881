"""A matrix whose basis is due, and the rank that finds it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest
from typing import NamedTuple, TypeVar

from torch import Tensor

from lowrank_optim.engine.momentum import Momentum, momentum_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.local import stepped
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding.parts import Part
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.alive import of_shape

_Job = TypeVar("_Job")


class Share(NamedTuple):
    """A matrix that a rank is the owner of, as far as memory goes."""

    kind: Hashable
    sizes: tuple[int, ...]


Shares = tuple[tuple[Share, ...], ...]
"""By rank, what it is the owner of, the longest first."""


class Due(NamedTuple):
    """A matrix whose basis is due."""

    item: ParamPlan
    twin: ParamPlan
    """What stands for the part that is here."""
    state: State
    grad: Tensor | None
    """The columns that are here, where a refresh looks at them."""
    chosen: Strategies
    norm: Tensor | None = None
    """Of its whole gradient, where ranks have agreed on it."""

    @property
    def step(self) -> int:
        """Steps taken before."""
        return int(self.state["step"])

    @property
    def nbytes(self) -> int:
        """Of the whole matrix."""
        return self.item.param.numel() * self.item.param.element_size()

    @property
    def share(self) -> Share:
        """What memory its owner needs depends on."""
        view = self.part.view or self.item.view
        assert view is not None
        kind = type(self.subspace), self.item.param.dtype, id(self.chosen)
        return Share(kind, (*view.batch, view.m, view.n))

    @property
    def columns(self) -> ParamPlan:
        """What stands for the part that is stepped."""
        return stepped(self.item, self.twin.param)

    @property
    def part(self) -> Part:
        """What is here."""
        assert self.item.part is not None
        return self.item.part

    @property
    def subspace(self) -> Subspace:
        """Its subspace."""
        assert self.item.subspace is not None
        return self.item.subspace

    @property
    def momentum(self) -> Momentum | None:
        """The first moment that is here, where a residual asks what a refresh loses of it."""
        if not self.chosen.residual.lost:
            return None
        return momentum_of(self.columns, self.state, self.chosen, copied=True)

    @property
    def balanced(self) -> Sequence[str]:
        """Entries that an owner makes of themselves; the rest of the refresh needs no other."""
        return self.subspace.balanced(self.step)

    @property
    def entries(self) -> list[str]:
        """State keys of what an owner finds."""
        if self.balanced:
            return list(self.balanced)
        assert self.item.view is not None
        meta = of_shape(self.item.view.shape, self.item.param.dtype)
        return list(self.subspace.init(self.item.view, meta))


_SEEN: ContextVar[dict[Shares, None] | None] = ContextVar("seen", default=None)


@contextmanager
def shares_seen() -> Iterator[dict[Shares, None]]:
    """What :func:`owners` gives to the ranks from now on, each once."""
    seen: dict[Shares, None] = {}
    before = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(before)


def owners(due: Sequence[Due]) -> list[list[Due]]:
    """What each rank of their group refreshes: the longest first, to who has least to do."""
    queues: list[list[Due]] = [[] for _ in range(due[0].part.ranks)]
    loads = [0] * len(queues)
    for d in sorted(due, key=lambda d: (-d.item.param.numel(), d.item.uid)):
        owner = loads.index(min(loads))
        queues[owner].append(d)
        loads[owner] += d.item.param.numel()
    seen = _SEEN.get()
    if seen is not None:
        seen[tuple(tuple(d.share for d in own) for own in queues)] = None
    return queues


ROUND_BYTES = 1 << 26
"""Of whole matrices that an owner has at once on an accelerator, if one alone is not larger."""


def rounds_of(due: Sequence[Due]) -> Iterator[list[list[Due]]]:
    """By rank, what each refreshes at a time."""
    if not due:
        return iter(())
    return merged(zip_longest(*owners(due)), lambda d: d.nbytes, due[0].twin.param)


def merged(
    rounds: Iterable[Sequence[_Job | None]], nbytes: Callable[[_Job], int], like: Tensor
) -> Iterator[list[list[_Job]]]:
    """By rank, what each does at a time: as much as fits, and at least one.

    They share messages, and equal ones the calls that the host of an accelerator waits for. On a
    CPU nobody waits, and a rank has one at a time.

    Args:
        rounds: one for each rank, or none.
        nbytes: of what a rank has of one.
        like: where they are.
    """
    most = ROUND_BYTES if on_accelerator(like) else 0
    now: list[list[_Job]] = []
    held = 0
    for each in rounds:
        size = max(nbytes(job) for job in each if job is not None)
        if now and held + size > most:
            yield now
            now, held = [], 0
        now = now or [[] for _ in each]
        for own, job in zip(now, each, strict=True):
            own += [] if job is None else [job]
        held += size
    if now:
        yield now
