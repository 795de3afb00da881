"""The moments of a training step at which memory may be at its worst."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lowrank_optim.memory.activations import Arrival, Flight, Unit
from lowrank_optim.memory.gradients import Gradients, bytes_of
from lowrank_optim.memory.rehearsal import Rehearsal
from lowrank_optim.memory.training import Training


class Worst(NamedTuple):
    """Bytes at each, beside weights and state; and what a step and a refresh need in passing."""

    beside: dict[str, int]
    step: int | None
    refresh: int | None


def worst_moments(
    gradients: Gradients,
    training: Training,
    flight: Flight | None,
    rehearsal: Rehearsal | None,
    absent: int,
) -> Worst:
    """Every moment at its worst.

    Args:
        gradients: what lives of them.
        training: how the model is trained.
        flight: its forward and backward; None for gradients alone.
        rehearsal: steps of its optimizer; None where they are not known.
        absent: bytes of the state that is not there before a first step.
    """
    backward = gradients.live if flight is None else flight.most
    if rehearsal is None:
        return Worst({"backward": backward}, None, None)
    if training.in_backward == "step":
        return _inside(gradients, flight, rehearsal, backward)
    beside = {"backward": backward}
    if training.in_backward == "project" and training.first_basis == "micro":
        beside["backward"] = max(backward, _projecting(gradients, training, flight, rehearsal))
    everything = gradients.kept(())
    step = rehearsal.step("none")
    beside["step"] = everything + step
    refresh = 0
    if rehearsal.refreshes:
        at_first = gradients.total if training.first_basis == "boundary" else everything
        refresh, beside["refresh"] = _refreshing(gradients, rehearsal, at_first)
        if training.in_backward == "project" and training.first_basis == "micro":
            first = _arriving(gradients, flight, rehearsal.arrivals("first"), again=False)
            beside["refresh"] = max(beside["refresh"], first - absent)
    return Worst(beside, step, refresh)


def _inside(
    gradients: Gradients, flight: Flight | None, rehearsal: Rehearsal, backward: int
) -> Worst:
    """Steps inside backward: each of one parameter, beside the activations alive then."""
    again = gradients.one_by_one
    arrivals = () if flight is None else [a for a in flight.arrivals if a.again == again]
    units = list(dict.fromkeys(a.unit for a in arrivals))
    firsts = rehearsal.arrivals("first", units=units)  # and the state that others need
    passing = rehearsal.arrivals("none", units=units)
    first, later = (None, None) if flight is None else (flight.begun, flight.after)
    beside = {"backward": backward, "step": _arriving(gradients, later, passing, again=again)}
    refresh: dict[Unit, int] = {}
    if rehearsal.refreshes:
        others = rehearsal.arrivals("all", units=units)
        refresh = {unit: max(size, others[unit]) for unit, size in firsts.items()}
        beside["refresh"] = max(
            _arriving(gradients, first, firsts, again=again),
            _arriving(gradients, later, others, again=again),
        )
    return Worst(beside, max(passing.values(), default=0), max(refresh.values(), default=0))


def _projecting(
    gradients: Gradients, training: Training, flight: Flight | None, rehearsal: Rehearsal
) -> int:
    """Gradients that become coordinates, the first time and when there are some already."""
    passes = (False, True)[: min(training.accumulation_steps, 2)]
    found = 0
    for again in passes:
        passing = rehearsal.arrivals("none", 1 + again)
        for i in gradients.whole:
            passing[i,] = 0
        found = max(found, _arriving(gradients, flight, passing, again=again))
    return found


def _arriving(
    gradients: Gradients, flight: Flight | None, passing: Mapping[Unit, int], *, again: bool
) -> int:
    """Most that is alive as a gradient arrives, with what is done to it then.

    Without activations all others are taken to be there already, where they stay.
    """
    arrivals: Iterable[Arrival]
    if flight is not None:
        arrivals = (a for a in flight.arrivals if a.again == again)
    else:
        kept = gradients.kept(gradients.whole)
        sizes = ((i, _beside_others(gradients, kept, i)) for i in gradients.sizes)
        arrivals = [Arrival((i,), again, size) for i, size in sizes]
    return max((a.alive + passing.get(a.unit, 0) for a in arrivals), default=0)


def _beside_others(gradients: Gradients, kept: int, i: int) -> int:
    """What is alive of gradients as number ``i`` arrives."""
    parts = gradients.staying(i)
    if parts is None:
        return kept
    return (
        kept
        + gradients.sizes[i]
        - (0 if gradients.one_by_one else bytes_of(parts, gradients.sized))
    )


def _refreshing(gradients: Gradients, rehearsal: Rehearsal, at_first: int) -> tuple[int, int]:
    """The worst step that finds bases: what it needs in passing, and all beside weights and state.

    The first, which finds all of them, or later the one before which most bytes of gradients are
    whole, and where all are, the one that finds the bases of most bytes.
    """

    def size(due: frozenset[int]) -> tuple[int, int]:
        return gradients.kept(due), sum(gradients.sizes[i] for i in due)

    first, due = rehearsal.step("first"), max(rehearsal.turns(), key=size)
    later = rehearsal.step(due)
    return max((at_first + first, first), (gradients.kept(due) + later, later))[::-1]
