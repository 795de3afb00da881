"""Moments of alike matrices: read in the form that a rule takes, and written back as kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowrank_optim.engine.draws import moment_noise, seeds_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import slot_key
from lowrank_optim.ops.quant import Moment
from lowrank_optim.rules.base import Slot
from lowrank_optim.stores import scale_key

ReadMoments = Sequence[tuple[str, Slot, Moment]]
"""The moments of one coordinate as they were read: key, slot, and what the rule updates."""

Keys = Sequence[tuple[str, Slot]]
"""Those that tell which."""


def slot_keys(coord: str, shape: Sequence[int], chosen: Strategies) -> Keys:
    """The slots of one coordinate and their state keys, the same for all items of a bucket."""
    return [(slot_key(coord, slot.name), slot) for slot in chosen.rule.slots(shape)]


def read_slots(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    coord: str,
    shape: Sequence[int],
    chosen: Strategies,
) -> list[ReadMoments]:
    """The moments of one coordinate of alike matrices, each in the form that the rule takes."""
    likes, keys = [item.param for item in items], slot_keys(coord, shape, chosen)
    every = [chosen.store.read_all(states, key, slot, shape, likes) for key, slot in keys]
    return [
        [(key, slot, x) for (key, slot), x in zip(keys, own, strict=True)]
        for own in zip(*every, strict=True)
    ] or [[] for _ in items]


def write_slots_(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    held: Sequence[ReadMoments],
    chosen: Strategies,
    finite: Sequence[Tensor] = (),
    rows: slice | None = None,
) -> None:
    """Write back the moments that were copied to be read; the others are in place already.

    Args:
        items: alike matrices.
        states: of each.
        held: what was read of each, and updated.
        chosen: what their group chose.
        finite: of each, 0-d bools on the device; where False what is stored does not change.
        rows: of the first dimension, that were read (default: all).
    """
    into = states if rows is None else [rows_of(state, held[0], rows) for state in states]
    for n, (key, slot, _) in enumerate(held[0] if held else ()):
        every = [own[n][2] for own in held]
        at = [i for i, x in enumerate(every) if isinstance(x, Tensor) and x is not into[i][key]]
        if at:
            own = [states[i] for i in at]
            seeds = seeds_of([items[i] for i in at], own, chosen, 1, n)
            xs, places = [every[i] for i in at], [into[i] for i in at]
            noises = [
                moment_noise(state, key, seed, x.shape)  # type: ignore[union-attr]
                for state, seed, x in zip(own, seeds, xs, strict=True)
            ]
            if rows is not None:
                noises = [noise.narrow(0, rows.start) for noise in noises]
            fine = [finite[i] for i in at] if finite else []
            chosen.store.write_all_(places, key, slot, xs, noises, fine)  # type: ignore[arg-type]


def rows_of(state: State, keys: Sequence[tuple[Any, ...]], rows: slice) -> State:
    """Some rows of the first dimension of slots, as they are stored, with their scales."""
    names = [name for key, *_ in keys for name in (key, scale_key(key)) if name in state]
    return {name: state[name][rows] for name in names}
