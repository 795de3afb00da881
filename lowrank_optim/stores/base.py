"""How moments are kept between steps: the Store role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.ops.quant import Moment
from lowrank_optim.rules.base import Slot
from lowrank_optim.tensors.state import State as State


class Whole(NamedTuple):
    """What ranks have together, where each allocates its part."""

    shape: tuple[int, ...]
    """Of the gradient of all of it: a format that depends on a size depends on this one."""
    by_rows: bool = False
    """Whether parts are any number of rows, not known to the format."""
    crossed: bool = False
    """Whether edges of parts lie within rows, anywhere."""


class Store(Protocol):
    """Allocates, reads and writes one slot of the state; arithmetic is in ``compute_dtype``."""

    @property
    def rounds(self) -> bool:
        """Whether writes round stochastically, so that torch's own steps may not write."""
        ...

    def unit(self, shape: Sequence[int]) -> int:
        """Columns of a moment that it keeps together: ranks that share it cut it at multiples."""
        ...

    def passing(self, slot: Slot, shape: Sequence[int], like: Tensor) -> tuple[int, int]:
        """Elements in the format of arithmetic that a step of one moment needs beside the state.

        Args:
            slot: what it holds.
            shape: of its gradient, or of the rows that are stepped at once.
            like: a tensor on the device.

        Returns:
            Those of the copy that is read, 0 where none is made; and what a write needs as well.
        """
        ...

    def alloc(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        of: Whole | None = None,
    ) -> None:
        """Zeros for ``slot`` under ``key``, on the device of ``like``.

        Args:
            state: of the parameter.
            key: of the slot.
            slot: what it holds.
            shape: of its gradient; of the part of it that is here.
            like: a tensor on the device.
            of: what that is a part of (default: all is here).
        """
        ...

    def read(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        *,
        dense: bool = False,
    ) -> Moment:
        """The slot in the dtype of arithmetic; the stored tensor itself where that is its dtype.

        What is kept in 8 bits is returned as it is, to be updated in place, if the slot's rule
        takes it so (``fused``) and ``dense`` does not ask for a tensor.

        Args:
            state: of the parameter.
            key: of the slot.
            slot: what it holds.
            shape: of its gradient.
            like: a tensor of the dtype that decides that of arithmetic.
            dense: whether codes are to be decoded (default: False).
        """
        ...

    def read_all(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        shape: Sequence[int],
        likes: Sequence[Tensor],
    ) -> list[Moment]:
        """:meth:`read` of alike matrices, whose kernels may be asked for together."""
        ...

    def write_all_(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        xs: Sequence[Tensor],
        noises: Sequence[Noise],
        finite: Sequence[Tensor] = (),
    ) -> None:
        """:meth:`write_` of alike matrices, whose kernels may be asked for together."""
        ...

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Raise ValueError unless a saved slot holds finite numbers, squares no negative ones."""
        ...

    def rows(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]] | None:
        """Tensors ``(..., r, k)`` whose rows are those of the slot, each with its code of zero.

        None where parts of several rows are kept together.
        """
        ...

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """Move rows to the places ``source`` gives them, without a rounding; False if it cannot."""
        ...

    def restarting(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]]:
        """Tensors ``(..., r, k)`` of which rows start again alone, each with its code of zero."""
        ...

    def write_(
        self,
        state: State,
        key: str,
        slot: Slot,
        x: Tensor,
        noise: Noise,
        finite: Tensor | None = None,
    ) -> None:
        """Keep a tensor that was read and updated.

        Args:
            state: of the parameter.
            key: of the slot.
            slot: what it holds.
            x: its values; nothing is to do where this is the stored tensor itself.
            noise: of the stochastic rounding of narrow formats.
            finite: where False, ``x`` is as it was read and what is stored must not change.
        """
        ...


class OneByOne:
    """What stores have in common that ask nothing of a bucket."""

    def rows(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]] | None:
        """None that could be moved with those of other matrices."""
        return None

    def read_all(
        self: Store,
        states: Sequence[State],
        key: str,
        slot: Slot,
        shape: Sequence[int],
        likes: Sequence[Tensor],
    ) -> list[Moment]:
        """One after the other."""
        pairs = zip(states, likes, strict=True)
        return [self.read(state, key, slot, shape, like) for state, like in pairs]

    def write_all_(
        self: Store,
        states: Sequence[State],
        key: str,
        slot: Slot,
        xs: Sequence[Tensor],
        noises: Sequence[Noise],
        finite: Sequence[Tensor] = (),
    ) -> None:
        """One after the other."""
        for n, (state, x, noise) in enumerate(zip(states, xs, noises, strict=True)):
            self.write_(state, key, slot, x, noise, finite[n] if finite else None)


def scale_key(key: str) -> str:
    """State key of the scales of the slot under ``key``."""
    return f"{key}_scale"


def encoded(store: Store, key: str, slot: Slot, x: Tensor) -> dict[str, Tensor]:
    """A moment as a store keeps it, under its keys; what is rounded by chance is so by seed 0."""
    state: dict[str, Tensor] = {}
    store.alloc(state, key, slot._replace(averaged=None), x.shape, x)
    store.write_(state, key, slot, x, Noise.over(0, x.shape))
    return state


STORES: dict[str, Store] = {}
"""Stores by the name that ``state_dtype`` takes."""


def register(name: str, store: Store) -> None:
    """Make a store known as ``state_dtype=name``.

    Raises:
        ValueError: the name is taken.
        TypeError: it lacks a part of :class:`Store`, which a step would miss later.
    """
    parts = [part for part in vars(Store) if not part.startswith("_")]
    missing = [part for part in parts if not hasattr(store, part)]
    if missing:
        raise TypeError(
            f"the store {name!r} must have {', '.join(parts)}; {type(store).__name__} lacks "
            f"{', '.join(missing)}. lowrank_optim.stores.Store says what each does"
        )
    if name in STORES:
        raise ValueError(f"a store named {name!r} is registered already")
    STORES[name] = store
