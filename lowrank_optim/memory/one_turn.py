"""The figures of a model and its optimizer, whose layers stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from lowrank_optim.backward.projecting import check_projecting
from lowrank_optim.memory.activations import Flight, Left, Unit, in_flight
from lowrank_optim.memory.blocks import CACHING, sized_on
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.gradients import Gradients
from lowrank_optim.memory.moments import worst_moments
from lowrank_optim.memory.rehearsal import Rehearsal
from lowrank_optim.memory.reporting import (
    blocks_of,
    host_bytes,
    pinned_bytes,
    report,
    staging_bytes,
)
from lowrank_optim.memory.training import Training
from lowrank_optim.memory.twins import Make, weight_bytes, with_state
from lowrank_optim.memory.world import refusals_of_fsdp
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded


def of_one_turn(
    plain: nn.Module,
    module: nn.Module,
    make: Make,
    training: Training,
    known: dict[Any, Any],
    chosen: tuple[Any, ...],
) -> Estimate:
    """The estimate of layers that stay as they are.

    Args:
        plain: the model.
        module: it, or its shards.
        make: makes the optimizer.
        training: how it is trained.
        known: what was found of this module before.
        chosen: under what the optimizer is found there.
    """
    world, params = training.world, list(module.parameters())
    if chosen not in known:
        known[chosen] = with_state(params, make)
    twins, optimizer = known[chosen]
    if training.in_backward == "project":
        if not isinstance(optimizer, LowRankOptimizer):
            raise ValueError(f"in_backward='project' is not for {type(optimizer).__name__}")
        check_projecting(optimizer)
    held = report(optimizer)
    gradients = Gradients.of(optimizer, twins, training)
    flight: Flight | None = None
    if training.tokens is not None:
        flight = _flight(plain, training, gradients, known)
    passing: Flight | None = None
    if world is not None:
        passing = _flight(plain, replace(training, tokens=None), gradients, known)
    rehearsal = _rehearsed(params, make, training, known, chosen)
    absent = held.moments + held.other
    worst = worst_moments(gradients, training, flight or passing, rehearsal, absent)
    units = list[Unit]()
    if passing is not None and training.in_backward == "step":  # those of a message, at once
        units = list(dict.fromkeys(a.unit for a in passing.arrivals))
    live = _alive(gradients, units)
    gathered = None if passing is None else passing.most - live
    own = twins if world is None else params  # FSDP2 fills up the last shard
    weights = weight_bytes(own)
    together = [frozenset(twins[n] for n in unit) for unit in units]
    staging = staging_bytes(optimizer, training.in_backward == "step", together)
    rounding = 0
    if training.device in CACHING:
        taken = blocks_of(optimizer, own, staging)
        rounding = taken - (weights + held.total - host_bytes(optimizer) + staging)
    return Estimate(
        weights=weights,
        gradients=gradients.total,
        largest_gradient=gradients.largest,
        live_gradients=live,
        basis=held.basis,
        moments=held.moments,
        other=held.other,
        in_backward=training.in_backward,
        host=host_bytes(optimizer),
        pinned=pinned_bytes(optimizer),
        staging=staging,
        rounding=rounding,
        activations=(None if flight is None else max(0, flight.most - live - (gathered or 0))),
        gathered=gathered,
        world_size=None if world is None else world.size,
        step_transients=worst.step,
        refresh_transients=worst.refresh,
        beside=worst.beside,
    )


def _rehearsed(
    params: Sequence[nn.Parameter],
    make: Make,
    training: Training,
    known: dict[Any, Any],
    chosen: tuple[Any, ...],
) -> Rehearsal | None:
    """The steps, taken without memory; None where they do not count, or wait for other ranks."""
    alone = training.world is not None or not any(map(is_sharded, params))
    if not (training.transients and alone):
        return None
    stepping = *chosen, training.attached
    if stepping not in known:
        mode, attached = training.attached
        sized = sized_on(training.device)
        known[stepping] = Rehearsal.of(params, make, mode, attached, sized)
    found: Rehearsal = known[stepping]
    return found


def _alive(gradients: Gradients, units: Sequence[Unit]) -> int:
    """Of gradients, at the worst moment: those of the largest message, where there are any."""
    if not units or gradients.one_by_one:
        return gradients.live
    return max(sum(gradients.sizes[n] for n in unit) for unit in units)


def _flight(
    module: nn.Module, training: Training, gradients: Gradients, known: dict[Any, Any]
) -> Flight:
    def left(i: int, last: bool) -> Left | None:
        if training.in_backward == "step":
            return () if last else None
        return gradients.staying(i)

    staying = tuple((i, gradients.staying(i)) for i in gradients.sizes)
    flying, world = (training.forward_and_backward, staying), training.world
    flights = known.setdefault("flights", {})
    if flying not in flights:
        with nullcontext() if world is None else refusals_of_fsdp(module):
            flights[flying] = in_flight(
                module,
                training.tokens,
                checkpointing=training.checkpointing,
                passes=min(training.accumulation_steps, 2),
                loss=training.loss,
                loss_chunk=training.loss_chunk,
                left=left,
                trained=gradients.sizes,
                sized=gradients.sized,
                autocast=training.autocast,
                device=training.device,
                sharded=None if world is None else world.sharded,
                mode=training.in_backward,
            )
    found: Flight = flights[flying]
    return found
