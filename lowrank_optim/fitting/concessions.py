"""What a plan gave up for memory, in sentences, each with what it would have taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lowrank_optim.fitting.costs import Way, gib
from lowrank_optim.fitting.searching import Search

LOST = {
    "project": "Whole gradients, of which clipping now sees the part in the subspace",
    "step": "Several micro-batches, clipping by the global norm, and GradScaler",
}
"""What a mode costs its user."""


def concessions(
    search: Search,
    way: Way,
    ranks: Sequence[int],
    spectrum: Sequence[Sequence[float]] | None,
) -> Iterator[str]:
    """What a larger budget would give back.

    Args:
        search: that found the way.
        way: the one taken.
        ranks: of its matrices.
        spectrum: of their gradients, where there was a calibration.
    """
    asked, first = search.asked, search.ways[0]
    if way.state_device != asked.places[0] and "state_device" not in way.options:
        moved = search.costs.exact(way, ranks).host
        yield (
            f"Moments on the device: {gib(moved)} GiB of them lie in host memory and cross the bus "
            f"twice in every step; {_needed(search, replace(way, state_device=asked.places[0]))}"
        )
    if (way.optimizer, way.options) != (first.optimizer, first.options):
        own = replace(way, optimizer=first.optimizer, options=first.options)
        yield f"{first.optimizer.__name__}: {_needed(search, own)}"
    if way.state_dtype != asked.state_dtypes[0]:
        own = replace(way, state_dtype=asked.state_dtypes[0])
        yield f"Moments in {own.state_dtype}: {_needed(search, own)}"
    if way.in_backward is not None:
        text = LOST[way.in_backward]
        if asked.modes[0] != way.in_backward:
            text += f": {_needed(search, replace(way, in_backward=asked.modes[0]))}"
        yield text
    yield from _of_ranks(search, way, ranks)
    for matrix, energies in zip(search.costs.matrices, spectrum, strict=True) if spectrum else ():
        if not any(energies):
            yield f"The rank of {matrix.name}: the micro-batches of calibrate gave it no gradient"


def _of_ranks(search: Search, way: Way, ranks: Sequence[int]) -> Iterator[str]:
    """A quarter and a half of the sides, where the even path does not fit them."""
    half = len(search.even.steps)
    if search.fits(way, search.even, half):
        return
    if search.fits(way, search.even, search.enough):
        yield f"Ranks of half of the smaller sides, which take {_peak(search, way, half)} GiB"
        return
    share = sum(ranks) / sum(search.sides)
    yield (
        f"Ranks of a quarter of the smaller sides, which take {_peak(search, way, search.enough)} "
        f"GiB: those of the plan are {share:.1%}"
    )


def _needed(search: Search, way: Way) -> str:
    """What a way needs at a quarter of the sides, or that there is none."""
    if search.refuses(way) is not None:
        return f"it has no in_backward={way.in_backward!r}"
    return f"ranks of a quarter of the smaller sides take {_peak(search, way, search.enough)} GiB"


def _peak(search: Search, way: Way, count: int) -> str:
    return gib(search.costs.exact(way, search.even.ranks(count)).peak)
