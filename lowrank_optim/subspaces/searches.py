"""Searches that share their factorisations: those of all matrices are made in one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.ops.stacked import stacked

_T = TypeVar("_T")

SHARED_BYTES = 1 << 28
"""What is copied into one tensor at most, so that whole matrices can share a call."""


class Ask(NamedTuple):
    """A call that a search needs the result of."""

    call: Callable[..., Any]
    """Of tensors with any leading dimensions, which it does not write to, to a tensor or a tuple
    of them; a function of a module, so that two are equal."""
    xs: tuple[Tensor, ...]
    options: tuple[Any, ...] = ()
    """What follows the tensors, the same for all that share a call."""
    listed: bool = False
    """Whether the call takes a list of each tensor, which it may write to, and returns a list of
    results: what is too large to be copied into one tensor."""

    @property
    def most(self) -> int:
        """How many may be copied into one tensor."""
        size = max((x.numel() * x.element_size() for x in self.xs), default=0)
        return max(1, SHARED_BYTES // max(1, size))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls have in common that can be made as one."""
        forms = tuple((x.shape, x.dtype, x.device) for x in self.xs)
        return self.call, forms, self.options, self.listed


Searching = Generator[Ask | list[Ask], Any, _T]
"""Work that yields what it asks for, and is sent the result, or thrown the ``LinAlgError`` that
there is none. Asked for several things at once it is sent a list, errors among the results."""


def alone(search: Searching[_T]) -> _T:
    """What one search finds."""
    return together([search])[0]


def together(searches: Sequence[Searching[_T]]) -> list[_T]:
    """What several find. One that asks for nothing is over before the next one begins.

    An accelerator makes its host wait for the status of some factorisations, and has few kernels to
    launch where matrices share one.
    """
    every = beside(searches)
    try:
        asks = next(every)
        while True:
            asks = every.send(_answers(asks))
    except StopIteration as end:
        found: list[_T] = end.value
        return found


def beside(searches: Sequence[Searching[_T]]) -> Generator[list[Ask], list[Any], list[_T]]:
    """Several searches as one, which asks at once for all that they ask for.

    Their results are in their order.
    """
    results: dict[int, _T] = {}
    asked: dict[int, Ask | list[Ask]] = {}

    def go_on(n: int, step: Callable[[], Ask | list[Ask]]) -> None:
        try:
            asked[n] = step()
        except StopIteration as end:
            results[n] = end.value

    for n, search in enumerate(searches):
        go_on(n, partial(next, search))
    while asked:
        now, asked = asked, {}
        found = yield [ask for own in now.values() for ask in _listed(own)]
        found.reverse()  # taken out one by one: none is held for longer than its search does
        for n, own in now.items():
            if isinstance(own, list):
                go_on(n, partial(searches[n].send, [found.pop() for _ in own]))
            elif isinstance(found[-1], LinAlgError):
                go_on(n, partial(searches[n].throw, found.pop()))
            else:
                go_on(n, partial(searches[n].send, found.pop()))
        del now, own  # what they asked with is not held while the next is answered
    return [results[n] for n in range(len(searches))]


def _listed(asks: Ask | list[Ask]) -> list[Ask]:
    return asks if isinstance(asks, list) else [asks]


def _answers(asks: Sequence[Ask]) -> list[Any]:
    """What each asked for, or why it is not there: alike calls are made as one."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, ask in enumerate(asks):
        alike.setdefault(ask.kind, []).append(n)
    found: list[Any] = [None] * len(asks)
    for own in alike.values():
        for n, x in zip(own, _answered([asks[n] for n in own]), strict=True):
            found[n] = x
    return found


def _answered(asks: Sequence[Ask]) -> list[Any]:
    """What each asked for, or why it is not there: one failure is not that of the others."""
    first = asks[0]
    try:
        if first.listed:
            lists = map(list, zip(*(ask.xs for ask in asks), strict=True))
            return list(first.call(*lists, *first.options))
        if len(asks) == 1:
            return [first.call(*first.xs, *first.options)]
        if len(asks) > first.most:
            parts = (asks[i : i + first.most] for i in range(0, len(asks), first.most))
            return [found for part in parts for found in _answered(part)]
        stacks = [stacked(own) for own in zip(*(ask.xs for ask in asks), strict=True)]
        found = first.call(*stacks, *first.options)
        if isinstance(found, torch.Tensor):
            return list(found.unbind(0))
        return list(zip(*(x.unbind(0) for x in found), strict=True))
    except LinAlgError as error:
        if len(asks) == 1:
            return [error]
    return [found for ask in asks for found in _answered([ask])]
