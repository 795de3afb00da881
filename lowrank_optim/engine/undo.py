"""What a step in flight has overwritten of a matrix's state: put back if the step raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowrank_optim.engine import answers
from lowrank_optim.engine.plan import ParamPlan, State
from lowrank_optim.engine.state import on_host
from lowrank_optim.ops.devices import on_accelerator, recording
from lowrank_optim.ops.stacked import as_words, is_words
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.values import COUNTER_MAX, widen_

COUNTERS = ("step", "refresh_step", "postponed", "clock")
"""Entries that every step may change: kept as numbers, which on the host cost less than a copy."""


SMALL = 1 << 16
"""Entries of a parameter up to which a copy of it costs next to nothing beside its step."""


Views = Callable[[State], Sequence[Tensor]]
"""Views of parts of a state's entries, always of the same."""


@dataclass(slots=True)
class _Kept:
    """What is put back of one parameter."""

    state: State
    entries: State
    """Its tensors by their key, before the step."""
    counters: list[float | Tensor]
    answer: answers.Answer | None
    copies: State
    parts: list[tuple[Views, list[Tensor]]]
    """Parts of entries that were not copied whole by then, and copies of them."""
    weights: list[tuple[Tensor, Tensor]]
    """Parameters, and copies of them."""
    item: ParamPlan | None = None
    version: int = 0
    """Of its weights, before the step."""
    loose: str = ""
    """Name of a parameter that may be stepped in part by now: it is too large to be copied."""
    done: bool = False
    """Whether it has taken the step."""
    passed: bool = False
    """Whether what follows its weights, and was not copied, is being written."""

    @property
    def place(self) -> int:
        """Of the parameter among all; -1 if it is not known."""
        return -1 if self.item is None else self.item.index

    @property
    def partly(self) -> str:
        """Its name, if it may be stepped in part, or a refresh has moved weights of no copy."""
        item = self.item
        if self.done or self.loose or item is None:
            return "" if self.done else self.loose
        moves = item.subspace is not None and item.subspace.moves_weights and not self.weights
        return item.name if moves and _version(item.param) != self.version else ""

    def is_cut(self) -> bool:
        """Whether what was not copied has been written, or is about to be."""
        if self.item is None or self.loose:
            return False
        written = _version(self.item.param) != self.version
        return self.passed or (written and not self.weights)


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
        self._kept: dict[int, _Kept] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        """Memory of copies that are not needed any more: to get it anew costs more than a copy."""
        self.taken: list[int] = []
        """Places of the parameters that have taken the whole step."""
        self.partly: list[str] = []
        """Names of those that a step which raised may have left stepped in part."""
        self.cut: list[str] = []
        """Names of those of :attr:`taken` that were being written when somebody interrupted."""
        self._idle = recording()
        """Where a graph is captured nothing runs: there is nothing to put back."""

    def begin(self, state: State, item: ParamPlan | None = None) -> None:
        """Remember which tensors a state has, and its counters.

        Args:
            state: of a parameter.
            item: the parameter (default: another call says that).
        """
        if self._idle:
            return
        own = self._kept.get(id(state))
        if own is None:
            entries = dict(state)
            found = [entries[key] for key in COUNTERS if key in entries]
            counters = [x.clone() if on_accelerator(x) else float(x) for x in found]
            for x, count in zip(found, counters, strict=True):
                if isinstance(count, float) and count >= COUNTER_MAX:
                    widen_(x)
            own = _Kept(state, entries, counters, answers.of(state), {}, [], [])
            self._kept[id(state)] = own
        if item is not None:
            own.item, own.version = item, _version(item.param)

    def keep(self, state: State, keys: Iterable[str]) -> None:
        """Copy entries that are about to be overwritten, unless that was done; no counters."""
        self.keep_all([state], keys)

    def keep_all(
        self, states: Sequence[State], keys: Iterable[str], parts: Sequence[Views] = ()
    ) -> None:
        """:meth:`keep` of several, whose copies are made at once.

        Args:
            states: of alike parameters.
            keys: of entries, which are copied whole.
            parts: of each state, what of its other entries is about to be overwritten (default:
                nothing). They are asked for again when that is put back: until then others stand
                in for entries that rest on the host.
        """
        if self._idle:
            return
        made: list[tuple[State, str, Tensor]] = []
        cut: list[tuple[_Kept, Views, list[Tensor]]] = []
        pairs: list[tuple[Tensor, Tensor, bool]] = []
        kept = [self._kept[id(state)] for state in states]
        for key in dict.fromkeys(keys):
            if key in COUNTERS:
                continue
            words = not on_host(key)
            for state, own in zip(states, kept, strict=True):
                if key in own.copies or key not in state:
                    continue
                entry = state[key]
                copy = self._room(entry)
                made.append((own.copies, key, copy))
                pairs.append((copy, entry, words))
        for state, own, views in zip(states, kept, parts, strict=False):
            sources = views(state)
            copies = [self._room(x) for x in sources]
            cut.append((own, views, copies))
            pairs += [(copy, x, True) for copy, x in zip(copies, sources, strict=True)]
        _copy_(pairs)
        for entries, key, copy in made:  # from here on it is what is put back
            entries[key] = copy
        for own, views, copies in cut:
            own.parts.append((views, copies))

    def _room(self, x: Tensor) -> Tensor:
        spare = self._spare.get((x.shape, x.dtype, x.device))
        return spare.pop() if spare else torch.empty_like(x)

    def keep_weights(self, state: State, param: Tensor) -> None:
        """Copy a parameter that several operations write, if it is small and on the host."""
        own = self._kept.get(id(state))
        small = 0 < param.numel() <= SMALL and not on_accelerator(param)
        if small and own is not None and not any(x is param for x, _ in own.weights):
            own.weights.append((param, param.detach().clone()))

    def loosen(
        self,
        states: Sequence[State],
        params: Sequence[Tensor],
        names: Sequence[str],
        keys: Sequence[str] | None = None,
    ) -> None:
        """From here on parameters that were not copied may be stepped in part.

        Args:
            states: of the parameters.
            params: whose weights, or moments, are written from here on.
            names: of each.
            keys: entries that are written; those that stand in for others, which rest on the host,
                are no loss (default: the weights are).
        """
        for state, param, name in zip(states, params, names, strict=True):
            own = self._kept.get(id(state))
            if own is None or own.loose or not (param.numel() > SMALL or on_accelerator(param)):
                continue
            if keys is None or _any_written_over(state, own.entries, keys):
                own.loose = name

    def passing(self, states: Sequence[State]) -> None:
        """From here on what follows the weights is written, such as the memory of a residual."""
        for state in states:
            own = self._kept.get(id(state))
            if own is not None:
                own.passed = True

    def done(self, state: State) -> None:
        """The weights have been written, or the step is over."""
        own = self._kept.get(id(state))
        if own is not None:
            own.done = True  # whoever interrupts from here on finds it so
            self.taken.append(own.place)
            self._forget(id(state))

    def holds(self, state: State) -> bool:
        """Whether a state would be put back."""
        return id(state) in self._kept

    def _forget(self, number: int) -> None:
        own = self._kept.pop(number)
        for copy in (*own.copies.values(), *(x for _, copies in own.parts for x in copies)):
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
        self.partly = [own.partly for own in kept.values() if own.partly]
        # an operation ends, and Python hears of Ctrl-C before it hears of that
        interrupted = not issubclass(kind, Exception)
        for own in kept.values():
            cut = interrupted and not own.done and own.is_cut()
            if cut or own.done:
                self.taken += [] if own.place in self.taken else [own.place]
                self.cut += [own.item.name] if cut and own.item is not None else []
                continue
            state = own.state
            state.clear()
            state.update(own.entries)
            answers.put_back(state, own.answer)
            present = [k for k in COUNTERS if k in state]
            for key, value in zip(present, own.counters, strict=True):
                state[key].fill_(value)  # a number, or a tensor of no dimension
            for key, copy in own.copies.items():
                if key in state:  # not what this step has made, as of a block that begins
                    state[key].detach().copy_(copy)
            for views, copies in own.parts:
                for x, copy in zip(views(state), copies, strict=True):
                    x.copy_(copy)
            for param, copy in own.weights:
                param.detach().copy_(copy)


def _copy_(pairs: Iterable[tuple[Tensor, Tensor, bool]]) -> None:
    """Copy into the first of each pair what is in the second.

    Where a pair says so, an accelerator copies all formats as words: by one kernel.
    """
    lists: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    word: torch.dtype | None = None
    for copy, entry, words in pairs:
        into, source = copy, entry
        if words and on_accelerator(entry) and is_words(entry) and is_words(copy):
            # they are read in the format of the first
            word = word or (entry.dtype if entry.element_size() == 4 else torch.int32)
            into, source = as_words(copy, word), as_words(entry, word)
        # of one memory: a list of several goes one by one
        intos, sources = lists.setdefault((into.dtype, words), ([], []))
        intos.append(into)
        sources.append(source)
    for intos, sources in lists.values():
        torch._foreach_copy_(intos, sources)


def _version(param: Tensor) -> int:
    """How often a parameter has been written; operations and kernels count before they end."""
    return 0 if param.is_inference() else param._version


def _any_written_over(state: State, before: State, keys: Sequence[str]) -> bool:
    """Whether any of some entries is still in the memory of what was there before."""
    for key in keys:
        now, then = state.get(key), before.get(key)
        if now is not None and then is not None and (now is then or shares_memory(now, then)):
            return True
    return False
