"""When the basis of a matrix is due."""

from __future__ import annotations

import logging

from lowrank_optim.engine import answers
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.groups.names import turn_of
from lowrank_optim.ops.devices import recording
from lowrank_optim.tensors.values import COUNTER_MAX

logger = logging.getLogger(__name__)

LAST_STEP = (
    "%s has taken %d steps, the most that its float32 counter on the device can tell apart: no "
    "refresh comes after this. Save now, and go on with capturable=False, whose counters go on"
)
"""Said of a matrix whose basis stays."""


def refresh_due(step: int, last: int, gap: int, offset: int) -> bool:
    """Whether a basis is due before step ``step`` (counted from 0), last refreshed at ``last``.

    The first is due at once, the others whenever ``step - offset`` enters a new multiple of the
    gap; a postponed one stays due until it succeeds.
    """
    return last < 0 or (step - offset) // gap > (last - offset) // gap


def basis_due(item: ParamPlan, state: State, chosen: Strategies, quiet: bool = False) -> bool:
    """Whether the next step of a matrix refreshes its basis, if its gradient allows.

    None does where a graph is captured: it would do so at every replay. ``quiet`` of who asks
    before the step does: that says it if there is something to be said.
    """
    if chosen.capturable and recording():
        return False
    step = int(state["step"])
    if step == COUNTER_MAX and chosen.capturable and not quiet:  # a graph may know where it is
        logger.warning(LAST_STEP, item.name, step)
    if item.tried == step:
        return False
    answer = answers.of(state)
    if answer is not None and not due_anyway(item, chosen, answer.last):
        answers.settle_(state)
    return refresh_due(step, int(state["refresh_step"]), chosen.gap, phase(item, chosen))


def due_anyway(item: ParamPlan, chosen: Strategies, last: int | None) -> bool:
    """Whether the next refresh is the same whatever becomes of this one, so that nobody asks.

    Searches start from the basis in use, and moments follow from it: they have to know of the first
    whether it came about. So do counters of refreshes, that tell a round from another.

    Args:
        item: whose basis it is.
        chosen: what its group chose.
        last: ``refresh_step`` before it, -1 for none; None if that is not to be put back.
    """
    assert item.subspace is not None
    return chosen.gap == 1 and not item.subspace.counters and (last is None or last >= 0)


def phase(item: ParamPlan, chosen: Strategies) -> int:
    """The remainder modulo the gap of the steps, counted from 0, at which its basis is due."""
    return stagger_offset(item.uid, chosen.gap) if chosen.stagger else 0


def stagger_offset(uid: int, gap: int) -> int:
    """The step within the gap at which a parameter has its turn."""
    return int(gap * turn_of(uid))
