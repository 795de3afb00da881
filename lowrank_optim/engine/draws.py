"""Draws of a step, all of counters: seeds, generators, and the noise of stochastic rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.ops import Noise
from lowrank_optim.ops.noise import signed, splitmix, splitmix_


def mixed(*numbers: int) -> int:
    """One seed for a tuple of counters (splitmix64 of each in turn)."""
    seed = 0
    for number in numbers:
        seed = splitmix(seed, number)
    return seed % 2**63


def seeds_of(
    items: Sequence[ParamPlan], states: Sequence[State], chosen: Strategies, *salt: int
) -> Sequence[int | Tensor]:
    """``mixed(seed, uid, step, *salt)`` of each; ``()`` on the device if it counts the steps."""
    if not chosen.capturable:
        pairs = zip(items, states, strict=True)
        return [mixed(chosen.seed, i.uid, int(state["step"]), *salt) for i, state in pairs]
    steps = [state["step"] for state in states]
    starts = [splitmix(splitmix(0, chosen.seed), item.uid) for item in items]
    # one fill each: a table of the host would have to be kept for as long as a graph that reads it
    device = steps[0].device
    fills = [torch.full((), signed(x), dtype=torch.int64, device=device) for x in starts]
    seeds = splitmix_(torch.stack(fills), torch.stack(steps).to(torch.int64))
    for number in salt:
        seeds = splitmix_(seeds, number)
    return (seeds & (2**63 - 1)).unbind()


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of counters."""
    return torch.Generator().manual_seed(mixed(*numbers))


def moment_noise(state: State, key: str, seed: int | Tensor, shape: Sequence[int]) -> Noise:
    """Of the stochastic rounding of a moment.

    Args:
        state: of the parameter, which knows where in a whole moment a part of one lies.
        key: of the moment.
        seed: of all of it.
        shape: of what is here, or of its first rows.
    """
    placed: Noise | None = state.noise(key, seed) if hasattr(state, "noise") else None
    return Noise.over(seed, shape) if placed is None else placed


def rounds(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether the weights round stochastically: of bfloat16 alone."""
    return chosen.rounding and item.param.dtype == torch.bfloat16


def weight_noises(
    items: Sequence[ParamPlan], states: Sequence[State], chosen: Strategies
) -> Sequence[Noise | None]:
    """Of the stochastic rounding of weights as they are stored; None to round to nearest."""
    at = [n for n, item in enumerate(items) if rounds(item, chosen)]
    if not at:
        return [None] * len(items)
    seeds = seeds_of([items[n] for n in at], [states[n] for n in at], chosen, 3)
    known = dict(zip(at, seeds, strict=True))
    return [item.noise(known[n]) if n in known else None for n, item in enumerate(items)]


def weight_noise(item: ParamPlan, state: State, chosen: Strategies) -> Noise | None:
    """:func:`weight_noises` of one."""
    (noise,) = weight_noises([item], [state], chosen)
    return noise
