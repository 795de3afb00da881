"""What moments and ages do at a refresh: the transport of a group, on state as it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.draws import mixed, moment_noise
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import age_key, slot_key
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.moving import move_rows_all_
from lowrank_optim.ops.rows import take_rows
from lowrank_optim.rules.base import Slot
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.switching import where
from lowrank_optim.tensors.values import set_counter_
from lowrank_optim.transports import TRANSPORTS


def following_(
    item: ParamPlan,
    state: State,
    moved: dict[str, BasisChange],
    step: int,
    chosen: Strategies,
    sources: dict[str, Tensor] | None = None,
    ok: Tensor | None = None,
) -> Searching[None]:
    """Let moments and ages follow their coordinates, and count the refresh.

    Where ``ok``, a 0-d bool on an accelerator, is False, no coordinate has moved, and nothing
    follows; but moments that start again do so in any case, as the host counts steps from here.
    """
    ok = None if chosen.on_refresh == "reset" else ok
    last = int(state["refresh_step"])
    turns = last >= 0 and chosen.on_refresh != "keep"
    if turns or any(own.fresh for own in moved.values()):
        with on_device(item, state, chosen):
            yield from _moments_follow_(item, state, moved, step, chosen, sources, ok)
    set_counter_(state["refresh_step"], step)


def _moments_follow_(
    item: ParamPlan,
    state: State,
    moved: dict[str, BasisChange],
    step: int,
    chosen: Strategies,
    sources: dict[str, Tensor] | None,
    ok: Tensor | None,
) -> Searching[None]:
    """All that :func:`following_` does but for the counter."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None
    last = int(state["refresh_step"])
    if last >= 0 and chosen.on_refresh != "keep":
        time = step - (last if chosen.on_refresh == "reset" else 0)
        for coord, shape in subspace.coord_shapes(view).items():
            source = moved[coord].source
            rows = _rows_alone(state, coord, shape, moved[coord], chosen)
            if sources is None and source is not None and rows:
                xs, fills = zip(*rows, strict=True)
                yield Ask(_move_all_, (source, *xs), (fills,), listed=True)
                continue
            if chosen.aged:
                _carry_ages_(state[age_key(coord)], moved[coord], chosen.on_refresh, ok)
            if sources is not None and source is not None and chosen.on_refresh == "project":
                sources[coord] = source
                continue
            _transport(item, state, coord, shape, moved[coord], float(time), chosen, ok)
    if any(own.fresh for own in moved.values()):
        yield from _restarting_(state, subspace.coord_shapes(view), moved, chosen)


def _transport(
    item: ParamPlan,
    state: State,
    coord: str,
    shape: Sequence[int],
    moved: BasisChange,
    time: float,
    chosen: Strategies,
    ok: Tensor | None,
) -> None:
    slots = chosen.rule.slots(shape)
    keys = [slot_key(coord, slot.name) for slot in slots]
    if chosen.on_refresh == "project" and _moved_as_stored(state, keys, slots, moved, chosen):
        return
    moments = []
    for key, slot, bias in zip(keys, slots, chosen.rule.biases(time), strict=False):
        x = chosen.store.read(state, key, slot, shape, item.param, dense=True)
        assert isinstance(x, Tensor)
        moments.append((slot, x, bias))
    before = [] if ok is None else [x.clone() for _, x, _ in moments]
    TRANSPORTS[chosen.on_refresh](moments, moved)
    for old, (_, x, _) in zip(before, moments, strict=False):
        assert ok is not None
        x.copy_(torch.where(ok, x, old))
    for n, (key, (slot, x, _)) in enumerate(zip(keys, moments, strict=True)):
        seed = mixed(chosen.seed, item.uid, int(time), 2, n)
        chosen.store.write_(state, key, slot, x, moment_noise(state, key, seed, x.shape), ok)


def _moved_as_stored(
    state: State, keys: Sequence[str], slots: Sequence[Slot], moved: BasisChange, chosen: Strategies
) -> bool:
    """Whether moments were whole rows in a new order, and moved in the format they are kept in."""
    source = moved.source
    if source is None or moved.source_right is not None:
        return False
    if any(slot.averaged is not None for slot in slots):
        return False
    return all(
        chosen.store.move_rows_(state, key, slot, source)
        for key, slot in zip(keys, slots, strict=True)
    )


def _rows_alone(
    state: State, coord: str, shape: Sequence[int], moved: BasisChange, chosen: Strategies
) -> list[tuple[Tensor, int]] | None:
    """Moments and ages ``(r, n)``, as they are kept, of an accelerator where their rows alone move.

    Each with what a row is filled with that starts again.
    """
    source, slots = moved.source, chosen.rule.slots(shape)
    if source is None or source.dim() > 1 or not on_accelerator(source):
        return None
    if chosen.on_refresh != "project" or moved.source_right is not None:
        return None
    found = [(state[age_key(coord)].unsqueeze(-1), 0)] if chosen.aged else []
    for slot in slots:
        rows = chosen.store.rows(state, slot_key(coord, slot.name), slot)
        if slot.averaged is not None or rows is None:
            return None
        found += rows
    return found


def _move_all_(sources: list[Tensor], *lists: Any) -> list[Tensor]:
    """Rows of what several matrices keep alike."""
    *kept, fills = lists
    move_rows_all_(kept, sources, fills)
    return sources


def restarting(
    state: State, coord: str, shape: Sequence[int], chosen: Strategies
) -> list[tuple[Tensor, int]]:
    """Moments ``(..., r, k)`` as they are kept, whose rows start again, with their code of zero."""
    return [
        own
        for slot in chosen.rule.slots(shape)
        for own in chosen.store.restarting(state, slot_key(coord, slot.name), slot)
    ]


def _restarting_(
    state: State,
    shapes: Mapping[str, Sequence[int]],
    moved: Mapping[str, BasisChange],
    chosen: Strategies,
) -> Searching[None]:
    """Zero moments and ages of some rows where they are kept: no other row is read or written.

    An accelerator does so for all matrices at once.
    """
    kept: list[Tensor] = []
    options: list[tuple[int, int]] = []
    for n, coord in enumerate(moved):
        found = [(state[age_key(coord)].unsqueeze(-1), 0)] if chosen.aged else []
        found += restarting(state, coord, shapes[coord], chosen)
        kept += [x for x, _ in found]
        options += [(n, fill) for _, fill in found]
    fresh = [own.fresh for own in moved.values()]
    if not on_accelerator(kept[0]):
        _restart_([fresh], [[x] for x in kept], options)
        return
    # calls are alike where their tensors are: which rows each has to do is a tensor of the host
    marks = [torch.zeros(shapes[coord][-2], dtype=torch.bool) for coord in moved]
    for mark, rows in zip(marks, fresh, strict=True):
        for own in rows:
            mark[own] = True
    yield Ask(_restart_all_, (*marks, *kept), (tuple(options),), listed=True)


def _restart_all_(*lists: Any) -> list[Tensor]:
    """:func:`_restart_` of several matrices."""
    *tensors, options = lists
    count = 1 + max(n for n, _ in options)
    marks, kept = tensors[:count], tensors[count:]
    fresh = [[where(mark.tolist()) for mark in own] for own in zip(*marks, strict=True)]
    _restart_(fresh, kept, options)
    return marks[0]  # type: ignore[no-any-return]


def _restart_(
    fresh: Sequence[Sequence[Sequence[slice]]],
    kept: Sequence[Sequence[Tensor]],
    options: Sequence[tuple[int, int]],
) -> None:
    """Rows of what matrices keep, each with its code of zero.

    Args:
        fresh: of each matrix the rows of each coordinate.
        kept: tensors ``(..., r, k)`` of all matrices, by what they are.
        options: the number of its coordinate, and its code of zero, of each of ``kept``.
    """
    alike: dict[torch.dtype, list[Tensor]] = {}
    for xs, (n, fill) in zip(kept, options, strict=True):
        for x, rows in zip(xs, fresh, strict=True):
            for own in rows[n]:
                if fill:  # torch has no kernel that fills tensors of a list
                    x[..., own, :].fill_(fill)
                else:
                    alike.setdefault(x.dtype, []).append(x[..., own, :])
    for zeros in alike.values():
        torch._foreach_zero_(zeros)


def _carry_ages_(age: Tensor, moved: BasisChange, on_refresh: str, ok: Tensor | None) -> None:
    if on_refresh == "reset":
        age.copy_(torch.where(ok, 0, age)) if ok is not None else age.zero_()
    elif moved.source is not None:
        age.copy_(take_rows(age, moved.source, -1))
