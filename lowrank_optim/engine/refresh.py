"""Phase one of a step: a basis that is due is found, or its refresh postponed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine import answers
from lowrank_optim.engine.draws import seeded
from lowrank_optim.engine.momentum import sought
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.schedule import due_anyway
from lowrank_optim.engine.state import age_key, refreshed_keys
from lowrank_optim.engine.transport import following_, restarting
from lowrank_optim.engine.undo import Undo, Views
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.projector import usable
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext, Touched
from lowrank_optim.subspaces.searches import Ask, Searching, alone

logger = logging.getLogger(__name__)

NOTHING_FOUND = "its gradient is zero or not finite, or could not be factored"
"""Why an accelerator has postponed a refresh."""


def refresh_(
    item: ParamPlan,
    state: State,
    grad: Tensor,
    step: int,
    chosen: Strategies,
    **own: Any,
) -> bool:
    """:func:`refreshing_` of one matrix."""
    return alone(refreshing_(item, state, grad, step, chosen, **own))


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
        soon = item.part is not None or not due_anyway(item, chosen, last)
        yield from answers.expecting_(state, item.name, ok, last, soon, before)
    if found is not None:
        found.update(moved)
    return True


def keep_refreshed(
    pairs: Sequence[tuple[ParamPlan, State]], chosen: Strategies, undo: Undo
) -> None:
    """What refreshes that are due may overwrite, of all of some matrices at once.

    Of an accelerator rows alone, where a subspace knows which. A CPU copies factors and moments
    whole in any case, before a step writes them.
    """
    keys: dict[str, None] = {}
    whole: list[State] = []
    few: dict[str, None] = {}
    parts: list[tuple[State, Views]] = []
    for item, state in pairs:
        subspace, view = item.subspace, item.view
        assert subspace is not None and view is not None
        if subspace.moves_weights:
            undo.keep_weights(state, item.param)
        touched = None
        if on_accelerator(item.param) and chosen.on_refresh == "keep":
            touched = subspace.touched(state, view, int(state["step"]))
        if touched is None:
            whole.append(state)
            keys.update(dict.fromkeys(refreshed_keys(subspace, state, chosen)))
            continue
        ages = map(age_key, touched.fresh) if chosen.aged else ()
        few.update(dict.fromkeys((*touched.keys, *ages)))
        shapes = subspace.coord_shapes(view)
        parts.append((state, partial(_rows, touched=touched, shapes=shapes, chosen=chosen)))
    undo.keep_all(whole, keys)
    undo.keep_all([state for state, _ in parts], few, [views for _, views in parts])


def _rows(
    state: State, touched: Touched, shapes: Mapping[str, Sequence[int]], chosen: Strategies
) -> list[Tensor]:
    """The rows of a state that a refresh may overwrite, of factors and of moments as kept."""
    found = [(state[key], rows) for key, rows in touched.rows.items() if rows]
    for coord, rows in touched.fresh.items():
        if rows:
            found += [(x, rows) for x, _ in restarting(state, coord, shapes[coord], chosen)]
    return [x.narrow(-2, own.start, own.stop - own.start) for x, rows in found for own in rows]


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
