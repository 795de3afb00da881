"""Phase one of a step: when a basis is due, how it is found, and what its moments do."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine import answers
from lowrank_optim.engine.momentum import sought
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    age_key,
    mixed,
    moment_noise,
    seeded,
    slot_key,
)
from lowrank_optim.groups.names import turn_of
from lowrank_optim.ops.devices import on_accelerator, recording
from lowrank_optim.ops.moving import move_rows_all_
from lowrank_optim.ops.rows import take_rows
from lowrank_optim.rules.base import Slot
from lowrank_optim.subspaces.base import BasisChange, RefreshContext
from lowrank_optim.subspaces.projector import usable
from lowrank_optim.subspaces.searches import Ask, Searching, alone
from lowrank_optim.tensors.values import COUNTER_MAX, set_counter_
from lowrank_optim.transports import TRANSPORTS

logger = logging.getLogger(__name__)


def refresh_due(step: int, last: int, gap: int, offset: int) -> bool:
    """Whether a basis is due before step ``step`` (counted from 0), last refreshed at ``last``.

    The first is due at once, the others whenever ``step - offset`` enters a new multiple of the
    gap; a postponed one stays due until it succeeds.
    """
    return last < 0 or (step - offset) // gap > (last - offset) // gap


LAST_STEP = (
    "%s has taken %d steps, the most that its float32 counter on the device can tell apart: no "
    "refresh comes after this. Save now, and go on with capturable=False, whose counters go on"
)


NOTHING_FOUND = "its gradient is zero or not finite, or could not be factored"
"""Why an accelerator has postponed a refresh."""


def basis_due(item: ParamPlan, state: State, chosen: Strategies) -> bool:
    """Whether the next step of a matrix refreshes its basis, if its gradient allows.

    None does where a graph is captured: it would do so at every replay.
    """
    if chosen.capturable and recording():
        return False
    step = int(state["step"])
    if step == COUNTER_MAX and chosen.capturable:  # a graph may know where it is
        logger.warning(LAST_STEP, item.name, step)
    if item.tried == step:
        return False
    answer = answers.of(state)
    if answer is not None and not _due_anyway(item, chosen, answer):
        answers.settle_(state)
    return refresh_due(step, int(state["refresh_step"]), chosen.gap, phase(item, chosen))


def _due_anyway(item: ParamPlan, chosen: Strategies, answer: answers.Answer) -> bool:
    """Whether the next refresh is the same whatever became of the last one.

    A search that starts from the basis in use has to know whether there is one.
    """
    if item.subspace is not None and item.subspace.counters:
        return False  # they tell a round from another
    starts = item.subspace is None or not item.subspace.indexed
    return chosen.gap == 1 and (answer.last is None or answer.last >= 0 or not starts)


def phase(item: ParamPlan, chosen: Strategies) -> int:
    """The remainder modulo the gap of the steps, counted from 0, at which its basis is due."""
    return stagger_offset(item.uid, chosen.gap) if chosen.stagger else 0


def stagger_offset(uid: int, gap: int) -> int:
    """The step within the gap at which a parameter has its turn."""
    return int(gap * turn_of(uid))


def refresh_(
    item: ParamPlan,
    state: State,
    grad: Tensor,
    step: int,
    chosen: Strategies,
    found: dict[str, BasisChange] | None = None,
    sources: dict[str, Tensor] | None = None,
    look: tuple[Tensor, Any] | None = None,
    later: bool = False,
) -> bool:
    """:func:`refreshing_` of one matrix."""
    return alone(refreshing_(item, state, grad, step, chosen, found, sources, look, later))


def refreshing_(
    item: ParamPlan,
    state: State,
    grad: Tensor,
    step: int,
    chosen: Strategies,
    found: dict[str, BasisChange] | None = None,
    sources: dict[str, Tensor] | None = None,
    look: tuple[Tensor, Any] | None = None,
    later: bool = False,
) -> Searching[bool]:
    """Refresh one basis and carry its moments over; False if it had to be postponed.

    How coordinates moved is put in ``found``; where rows of moments come from, in ``sources`` if it
    is given, and then whoever reads them next is to move them. ``look`` is what the subspace saw,
    where it has looked already.

    A gradient that is zero or not finite says nothing about a basis, and one that no factorisation
    can take must not end a run: the refresh is counted as postponed and stays due. With ``later``
    an accelerator is asked for neither now (:mod:`lowrank_optim.engine.answers`), and True says
    that the refresh was queued.
    """
    before = counters_of(item, state)
    shown = grad if look else sought(item, state, grad, chosen)
    moved, ok = yield from finding(item, state, shown, step, chosen, look)
    if moved is None:
        return False
    if ok is not None and not later and not _came_about(item, state, step, ok, before):
        return False
    last = int(state["refresh_step"])
    yield from following_(item, state, moved, step, chosen, sources, ok if later else None)
    if ok is not None and later:
        assert item.subspace is not None
        # other ranks are told at once
        soon = chosen.gap > 1 or not item.subspace.indexed or item.part is not None
        yield from answers.expecting_(state, item.name, ok, last, soon, before)
    if found is not None:
        found.update(moved)
    return True


def counters_of(item: ParamPlan, state: State) -> dict[str, float]:
    """What goes back if a refresh does not come about."""
    assert item.subspace is not None
    return {key: float(state[key]) for key in item.subspace.counters}


def finding(
    item: ParamPlan,
    state: State,
    grad: Tensor,
    step: int,
    chosen: Strategies,
    look: tuple[Tensor, Any] | None = None,
) -> Searching[tuple[dict[str, BasisChange] | None, Tensor | None]]:
    """New coordinates, from what :func:`~lowrank_optim.engine.momentum.sought` gives.

    None, and counted, if that had to be postponed; on an accelerator whether they are, 0-d bool,
    and the old ones where new ones were not to be had.
    """
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None
    seen = None if look is None else look[1]
    fine: Tensor | None = None
    if subspace.needs_grad:
        norm, seen = look or (yield from subspace.looking(grad))
        if norm is None:
            pass  # the search itself finds out, and says so
        elif subspace.selects and on_accelerator(norm):
            fine = yield Ask(usable, (norm,))
        elif not _is_informative(item, state, float(norm), step):
            return None, None
    generator = seeded(chosen.seed, item.uid, step)
    # a part of W is of no use to what is a factor of W
    whole = item.part is None or not item.part.sharded or item.part.side == "whole"
    param = view.of(item.param) if whole else None
    first = int(state.get("refresh_step", 0)) < 0
    ctx = RefreshContext(
        view, generator, item.uid, step, param=param, seen=seen, fine=fine, first=first
    )
    try:
        moved = yield from subspace.refreshing_(state, grad, ctx)
    except LinAlgError as error:
        postpone_(item, state, step, str(error))
        return None, None
    ok = next((own.ok for own in moved.values()), None)
    if ok is None and (fine is not None or (subspace.needs_grad and norm is None)):
        raise TypeError(
            f"{type(subspace).__name__}.refresh_ of {item.name} does not say whether anything "
            "moved, on an accelerator whose host has not looked at the gradient: return "
            "BasisChange(ok=...), with nothing changed where ctx.fine is False, or set the class "
            "variable selects = False"
        )
    return moved, ok


def _came_about(
    item: ParamPlan, state: State, step: int, ok: Tensor, before: dict[str, float]
) -> bool:
    """Ask an accelerator at once whether it found a basis: what follows tells other ranks."""
    if bool(ok):
        return True
    for key, count in before.items():
        state[key].fill_(count)
    postpone_(item, state, step, NOTHING_FOUND)
    return False


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
    for coord, own in moved.items():
        if own.fresh:
            _restart_(state, coord, subspace.coord_shapes(view)[coord], own.fresh, chosen)


def postpone_(item: ParamPlan, state: State, step: int, why: str) -> None:
    """Count a refresh that did not come about, and say so."""
    state["postponed"] += 1
    logger.warning("refresh of %s postponed at step %d: %s", item.name, step, why)


def _is_informative(item: ParamPlan, state: State, norm: float, step: int) -> bool:
    """Whether a gradient says something about a basis; if not, the refresh counts as postponed."""
    if norm != 0 and math.isfinite(norm):
        return True
    state["postponed"] += 1
    logger.log(
        logging.DEBUG if norm == 0 else logging.WARNING,
        "refresh of %s postponed at step %d: gradient norm %s",
        item.name,
        step,
        norm,
    )
    return False


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
        chosen.store.write_(state, key, slot, x, moment_noise(state, key, seed), ok)


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


def _restart_(
    state: State, coord: str, shape: Sequence[int], rows: Sequence[slice], chosen: Strategies
) -> None:
    """Zero moments and ages of some rows where they are kept: no other row is read or written."""
    for slot in chosen.rule.slots(shape):
        for own in rows:
            chosen.store.restart_rows_(state, slot_key(coord, slot.name), slot, own)
    for own in rows if chosen.aged else ():
        state[age_key(coord)][..., own].zero_()


def _carry_ages_(age: Tensor, moved: BasisChange, on_refresh: str, ok: Tensor | None) -> None:
    if on_refresh == "reset":
        age.copy_(torch.where(ok, 0, age)) if ok is not None else age.zero_()
    elif moved.source is not None:
        age.copy_(take_rows(age, moved.source, -1))
