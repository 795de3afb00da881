"""What a step in flight has overwritten of a matrix's state: put back if the step raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Self

import torch
from torch import Tensor

from lowrank_optim.engine import answers
from lowrank_optim.engine.plan import on_host
from lowrank_optim.ops.devices import on_accelerator, recording
from lowrank_optim.ops.stacked import as_words, is_words

State = MutableMapping[str, Tensor]
COUNTERS = ("step", "refresh_step", "postponed", "clock")
"""Entries that every step may change: kept as numbers, which on the host cost less than a copy."""


class Undo:
    """Puts the state of matrices back, bit for bit, if its ``with`` block raises.

    A phase says what it is about to overwrite. A matrix whose weights have been written is done:
    from then on its new state is the right one.
    """

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        """Begin with nothing.

        Args:
            before: called before anything is put back (default: nothing is done).
        """
        self._before = before
        self._kept: dict[
            int, tuple[State, State, list[float | Tensor], answers.Answer | None, State]
        ] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        """Memory of copies that are not needed any more: to get it anew costs more than a copy."""
        self.taken = 0
        """Parameters that have taken the whole step."""
        self._idle = recording()
        """Where a graph is captured nothing runs: there is nothing to put back."""

    def begin(self, state: State) -> None:
        """Remember which tensors a state has, and its counters."""
        if id(state) not in self._kept and not self._idle:
            counters = [
                state[key].clone() if on_accelerator(state[key]) else float(state[key])
                for key in COUNTERS
                if key in state
            ]
            self._kept[id(state)] = state, dict(state), counters, answers.of(state), {}

    def keep(self, state: State, keys: Iterable[str]) -> None:
        """Copy entries that are about to be overwritten, unless that was done; no counters."""
        self.keep_all([state], keys)

    def keep_all(self, states: Sequence[State], keys: Iterable[str]) -> None:
        """:meth:`keep` of several, whose copies are made at once."""
        if self._idle:
            return
        lists: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for key in keys:
            for state in states:
                own = self._kept[id(state)][-1]
                if key not in own and key in state and key not in COUNTERS:
                    entry = state[key].detach()
                    spare = self._spare.get((entry.shape, entry.dtype, entry.device))
                    own[key] = spare.pop() if spare else torch.empty_like(entry)
                    pair = own[key], entry
                    words = on_accelerator(entry) and not on_host(key) and all(map(is_words, pair))
                    if words:  # one kernel for all formats
                        pair = as_words(own[key]), as_words(entry)
                    copies, entries = lists.setdefault(pair[0].dtype, ([], []))
                    copies.append(pair[0])
                    entries.append(pair[1])
        for copies, entries in lists.values():
            torch._foreach_copy_(copies, entries)

    def done(self, state: State) -> None:
        """The weights have been written, or the step is over."""
        if id(state) in self._kept:
            self.taken += 1
            self._forget(id(state))

    def holds(self, state: State) -> bool:
        """Whether a state would be put back."""
        return id(state) in self._kept

    def _forget(self, number: int) -> None:
        copies = self._kept.pop(number)[-1]
        for copy in copies.values():
            self._spare.setdefault((copy.shape, copy.dtype, copy.device), []).append(copy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for number in list(self._kept):
                self._forget(number)
            return
        self._before()
        kept, self._kept = self._kept, {}
        for state, entries, counters, answer, copies in kept.values():
            state.clear()
            state.update(entries)
            answers.put_back(state, answer)
            present = [k for k in COUNTERS if k in state]
            for key, value in zip(present, counters, strict=True):
                state[key].fill_(value)  # a number, or a tensor of no dimension
            for key, copy in copies.items():
                state[key].detach().copy_(copy)
