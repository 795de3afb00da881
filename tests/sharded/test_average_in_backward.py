"""Coordinates averaged inside backward: what DDP does, on less wire and in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, attach_in_backward
from lowrank_optim.sharding import averages, collectives
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from tests import runs
from tests.backward.nets import Now
from tests.compare import assert_close
from tests.pairwise import in_turns
from tests.sharded.meter import Meter
from tests.sharded.ranks import Ranks, World
from tests.sharded.replicas import SHORT, Run, Together, train
from tests.sharded.training import (
    Case,
    Step,
    assembled,
    assert_equal_runs,
    assert_worth_comparing,
    choices,
)

Worlds = Callable[[int], Ranks]
SVD = Case("GaLoreAdamW", {"projector": "svd"}, only=SHORT)
WHOLE = replace(SVD, only=())
DIAGONAL = {"eps": 1e-3}
"""Of bases of both sides: what Adam makes of zeros beside singular values is above rounding."""

EQUAL: dict[str, Run] = {
    "all shapes": Run(WHOLE, bucket=1 << 10),
    "accumulated": Run(
        Case("GaLoreAdamW", {"on_refresh": "project"}, only=SHORT), pieces=2, bucket=600
    ),
    "accumulated, told how often": Run(SVD, pieces=2, told=True),
    "other order on a rank": Run(SVD, turned=True, bucket=300),
    "scaled": Run(SVD, scaled=True),
    "reentrant checkpoints": Run(SVD, reentrant=True, bucket=300),
    "unused": Run(SVD, unused=True, bucket=300),
    "unused, accumulated": Run(SVD, unused=True, pieces=2),
    "both sides": Run(
        Case("GaLoreAdamW", {"projector": "svd", "proj_type": "full", **DIAGONAL}, only=SHORT)
    ),
    "factors": Run(
        Case("SSTAdamW", {"steps_per_iteration": 2, "warmup_steps": 1, "rank": 2}, only=SHORT)
    ),
    "stepped": Run(SVD, "step", bucket=300),
    "stepped, the rest too": Run(replace(SVD, cls="FiraAdamW"), "step", pieces=2, bucket=300),
    "stepped, unused": Run(SVD, "step", unused=True, pieces=2, bucket=300),
    "stepped blocks": Run(
        Case("FrugalAdamW", {"density": 0.5}, only=SHORT), "step", turned=True, bucket=300
    ),
}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "lion": ("GaLoreLion", {"projector": "random"}),
    "adafactor": ("GaLoreAdafactor", {"relative_step": False, "scale_parameter": False}),
    "columns": ("GaLoreAdamW", {"projector": "columns", "rank": 0.5}),
    "entries": ("GaLoreAdamW", {"projector": "randk", "rank": 0.3}),
    "hadamard": ("GaLoreSGD", {"projector": "hadamard", "momentum": 0.9}),
    "cosines": ("DCTAdamW", {"update_proj_gap": 3}),
    "at once": ("GaLoreAdamW", {"stagger": False, "on_refresh": "reset", "maximize": True}),
    "active factors": (
        "SSTAdamW",
        {"steps_per_iteration": 2, "factors": "active", "rank": 2, "warmup_steps": 1},
    ),
}
SLOW = {
    f"{name}, {how}": Run(Case(cls, own, only=SHORT), how, pieces=2, bucket=400)
    for name, (cls, own) in _MORE.items()
    for how in ("project", "step")
} | {
    "unused, all shapes": Run(WHOLE, unused=True, bucket=1 << 10),
    "all shapes, step": Run(replace(WHOLE, cls="FiraAdamW"), "step", pieces=2, bucket=1 << 10),
    "memory, step": Run(Case("DCTAdamW", {"error_feedback": "float32"}, only=SHORT), "step"),
    "switched, step": Run(Case("SwitchLoRAAdamW", {"rank": 2}, only=SHORT), "step"),
}


THREE = ("all shapes", "other order on a rank", "unused", "stepped", "stepped, unused")
"""Runs in which one rank does other things than two that are alike, and one run of each mode."""


def compared(run: Run, world: Ranks, name: str) -> tuple[list[Step], list[Step]]:
    """A run, and DDP's, of all ranks: copies are alike to the bit, or this fails."""
    return assembled(world.run(name, train, run=run).checked()), by_ddp(run.plain, world)


def by_ddp(plain: Run, world: Ranks) -> list[Step]:
    """A run of DDP, which several runs are compared with."""
    key = world.size, repr(plain)
    if key not in _by_ddp:
        _by_ddp[key] = assembled(world.run("plain", train, run=plain).checked())
    return _by_ddp[key]


_by_ddp: dict[tuple[int, str], list[Step]] = {}


COVERED = (
    "accumulated, told how often", "scaled", "unused, accumulated", "stepped",
    "stepped, the rest too", "both sides", "reentrant checkpoints",
)  # fmt: skip
"""Others accumulate, leave layers out and step; of a scaled loss the clipping is that of DDP."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in SLOW or x in COVERED else ())
        for x in (*EQUAL, *SLOW)
    ],
)
def test_it_is_ddp(name: str, ranks: Worlds) -> None:
    """Weights, state, choices and counters, over refreshes; ranks alike to the bit."""
    run = (EQUAL | SLOW)[name]
    ours, ddp = compared(run, ranks(3 if name in THREE or name in SLOW else 2), name)
    assert_equal_runs(ours, ddp)
    if not run.unused and run.case.cls != "SwitchLoRAAdamW":
        assert_worth_comparing(run.case, [_renamed(step) for step in ours])
    assert max(choices(ours).values()) >= 3 or run.how == "step"


def _renamed(step: Step) -> Step:
    weights, states = step
    return ({k.removeprefix("model."): x for k, x in weights.items()}, states)


CLIPPED = {
    "by torch": Run(SVD, pieces=2, clip=0.05, bucket=300),
    "in the step": Run(SVD, max_norm=0.05),
    "scaled": Run(SVD, clip=0.05, scaled=True),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_is_that_of_one_process(name: str, ranks: Worlds) -> None:
    """The norm is that of averages, of coordinates too; due bases are found by one rank."""
    run = CLIPPED[name]
    values = ranks(3).run(name, train, run=run).checked()
    one = assembled([train(None, run, size=3)]) if not run.scaled else None
    if one is None:  # the overflow is rank 1's: DDP with coordinates is what there is to compare
        hook = ranks(3).run("hook", train, run=replace(run, how="hook")).checked()
        one = assembled(hook)
    assert_equal_runs(assembled(values), one)
    loose = train(None, replace(run, clip=None, max_norm=None, scaled=False), size=3)
    gap = max(float((x[0] - one[-1][0][k]).abs().max()) for k, x in loose[-1][0].items())
    assert gap > 1e-6, "nothing was clipped"


# ------------------------------------------------------------------ resumed


def resumed(world: World, run: Run, at: int) -> Any:
    whole = train(world, run)
    first = Together(replace(run), world)
    for step in range(at):
        first.step(step)
    weights, state = runs.through_a_file([first.net.state_dict(), first.optimizer.state_dict()])
    second = Together(run, world)
    second.net.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    for step in range(at, run.case.steps):
        second.step(step)
    return [whole[-1]], [second.held()]


@pytest.mark.parametrize("how", ["project", pytest.param("step", marks=pytest.mark.slow)])
def test_resumed_to_the_bit(how: str, ranks: Worlds) -> None:
    """Three ranks: a sum in other buckets would be added up in another order."""
    run = Run(SVD, how, pieces=2)
    values = ranks(3).run(f"resumed, {how}", resumed, run=run, at=3).checked()
    whole, again = (assembled([own[i] for own in values]) for i in range(2))
    (w0, s0), (w1, s1) = whole[0], again[0]
    assert all(torch.equal(w0[k], w1[k]) for k in w0)
    assert all(torch.equal(s0[k][j], s1[k][j]) for k in s0 for j in s0[k])


# ------------------------------------------------------------------ what is sent, and held

M, N, R, LAYERS = 64, 96, 4, 6


def tower() -> nn.Sequential:
    """Matrices, biases and norms; no layer's output is another's input, so that names are apart."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(LAYERS):
        layers += [nn.Linear(*((N, M) if i % 2 else (M, N))), nn.Tanh()]
    return nn.Sequential(*layers, nn.LayerNorm(M)).double()


def counted(world: World, how: str, accumulated: bool) -> Any:
    """Messages of a backward after the first step, bytes of gradients alive, and who was first."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(world.rank)
    model = tower()
    named = list(model.named_parameters())
    optimizer = GaLoreAdamW(named, lr=1e-2, rank=R, update_proj_gap=100, stagger=False)
    forward: Any = model
    events: list[str] = []
    live: list[int] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(averages, "BUCKET_BYTES", 8 << 10)
    send = collectives.average_
    patch.setattr(collectives, "average_", lambda *a: events.append("sent") or send(*a))
    handle = None
    if how == "ddp":
        forward = DistributedDataParallel(model)
    else:
        handle = attach_in_backward(optimizer, how, process_group=dist.group.WORLD)  # type: ignore[arg-type]

    def got(_: Tensor) -> None:
        events.append("got")
        live.append(held(named))

    for _, p in named:
        p.register_post_accumulate_grad_hook(got)
    x = torch.randn(8, M, dtype=torch.float64)
    for _ in range(2):
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if accumulated:
        assert handle is not None
        with Meter() as silent, handle.no_sync():
            forward(x).square().mean().backward()
        assert not silent.collectives
    events.clear()
    live.clear()
    with Meter() as meter:
        forward(x).square().mean().backward()
    live.append(held(named))
    patch.undo()
    return meter.counts, meter.bytes, max(live), events


def held(named: Any) -> int:
    """Bytes behind all gradients that exist, each storage once."""
    storages = {}
    for _, p in named:
        if p.grad is not None:
            own = p.grad.coords.values() if isinstance(p.grad, ProjectedGrad) else [p.grad]
            for y in own:
                storages[y.untyped_storage()._cdata] = y.untyped_storage().nbytes()
    return sum(storages.values())


def reached(world: World, mode: Any) -> Any:
    """Steps in some of which autograd reaches a weight and makes no gradient, on some ranks."""
    ends = []
    for attached in (True, False):
        model = Now()
        own = {"lr": 1e-2, "rank": 4, "update_proj_gap": 2}
        optimizer = GaLoreAdamW(model.named_parameters(), **own)
        if attached:
            attach_in_backward(optimizer, mode, process_group=dist.group.WORLD)
        for step in range(7):
            for rank in [world.rank] if attached else range(world.size):
                x = torch.randn(5, 12, generator=torch.Generator().manual_seed(10 * step + rank))
                still = step in (3, 4) and (rank == 1 or step == 4)
                loss = model(x.double(), still).square().mean()
                (loss if attached else loss / world.size).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    return ends


@pytest.mark.parametrize("mode", ["project", "step"])
def test_a_weight_reached_without_a_gradient_counts_as_zeros(mode: str, ranks: Worlds) -> None:
    """As one that a rank does not reach; where no rank has a gradient, no step moves it."""
    for mine, one in ranks(2).run("reached", reached, mode=mode).checked():
        for a, b in zip(mine, one, strict=True):
            assert_close(a, b)


DENSE = sum(M if i % 2 else N for i in range(LAYERS)) + 2 * M
LOW, MATRIX = R * N, M * N
FLAGS = 2 * LAYERS + 2
"""One number a tensor: whether this rank has it."""


@pytest.mark.parametrize("accumulated", [False, True])
def test_coordinates_are_all_that_is_sent_and_kept(accumulated: bool, ranks: Worlds) -> None:
    """r n of m n of each matrix, in buckets that leave before the last gradient has arrived."""
    args = {"how": "project", "accumulated": accumulated}
    for counts, sizes, most, events in ranks(2).run("counted", counted, **args).checked():
        sent = 8 * (LAYERS * LOW + DENSE + FLAGS)
        assert sizes == {"all_reduce": sent}
        assert counts["all_reduce"] == -(-sent // (8 << 10)) > 1
        first = events.index("sent")
        assert "got" in events[first:], "nothing left before the last gradient arrived"
        # all that is kept in buckets; of the micro-batch before what has not been handed over
        assert most <= sent * (2 if accumulated else 1)
    args = {"how": "ddp", "accumulated": False}
    for _, sizes, most, _ in ranks(2).run("counted, ddp", counted, **args).checked():
        assert sizes["all_reduce"] == 8 * (LAYERS * MATRIX + DENSE) > 10 * sent
        assert most >= sizes["all_reduce"]


def test_a_step_inside_backward_keeps_two_buckets(ranks: Worlds) -> None:
    args = {"how": "step", "accumulated": False}
    for _, sizes, most, events in ranks(2).run("counted", counted, **args).checked():
        assert sizes == {"all_reduce": 8 * (LAYERS * MATRIX + DENSE + FLAGS)}
        # of one that is under way, one that is filled, and what each has over a bucket's size
        assert most <= 2 * 8 * (MATRIX + 2 * N + 10) + (8 << 10) < sizes["all_reduce"] / 2
        assert events.index("sent") < len(events) - 1 - events[::-1].index("got")


# ------------------------------------------------------------------ averaging that is not done


def mutated(world: World, run: Run, how: str) -> Any:
    """A run in which the mean is that of this rank, or a mean of means, or once as large."""
    send = collectives.average_

    def alone(x: Tensor, group: Any) -> Any:
        return send(x.clone(), group)

    def twice(x: Tensor, group: Any) -> Any:
        return send(x.div_(group.size()), group)

    def summed(x: Tensor, group: Any) -> Any:
        return send(x.mul_(group.size()), group)

    with pytest.MonkeyPatch.context() as patch:
        changed = {"alone": alone, "twice": twice, "summed": summed}[how]
        patch.setattr(collectives, "average_", changed)
        return train(world, run)


@pytest.mark.parametrize(
    ("how", "way"), in_turns(["alone", "twice", "summed"], ["project", "step", "hook"])
)
def test_a_run_without_averaging_is_seen(how: str, way: str, ranks: Worlds) -> None:
    run = Run(replace(SVD, only=("wide", "tall"), steps=4, cls="GaLoreSGD"), way)
    values = ranks(2).run(f"{how}, {way}", mutated, run=run, how=how).checked()
    ddp = by_ddp(run.plain, ranks(2))
    with pytest.raises(AssertionError):
        assert_equal_runs(assembled(values), ddp)


# ------------------------------------------------------------------ not finite


def poisoned(world: World, at: int) -> Any:
    """One entry of one gradient of one rank, in whichever form the others have it."""
    trained = Together(Run(replace(SVD, only=("wide", "tall"))), world)
    before = []
    for step in range(at + 1):
        if step == at and world.rank == 1:
            p = next(iter(trained.named.values()))

            def broken(g: Tensor) -> Tensor:
                g = g.clone()
                g[0, 0] = float("nan")
                return g

            p.register_hook(broken)
        before = [p.detach().clone() for p in trained.named.values()]
        trained.step(step)
    after = [p.detach().clone() for p in trained.named.values()]
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)], after


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_all_ranks_skip_what_one_has_broken(at: int, ranks: Worlds) -> None:
    values = ranks(3).run(f"poisoned at {at}", poisoned, at=at).checked()
    for still, weights in values:
        assert still == [True, False]
        assert all(torch.equal(a, b) for a, b in zip(weights, values[0][1], strict=True))


# ------------------------------------------------------------------ what is trained changes


def taking_turns(world: World, mode: Any) -> list[Tensor]:
    """Weights of a run of one process, whose batches are those of all ranks, and of the ranks."""
    found = []
    for many in (False, True):
        model, optimizer = small()
        model.double()
        weights = model[0].weight, model[2].weight
        weights[0].requires_grad_(False)
        if many:
            attach_in_backward(optimizer, mode, process_group=dist.group.WORLD)
        for step in range(4):
            if step == 2:  # as many are trained as before
                weights[0].requires_grad_(True)
                weights[1].requires_grad_(False)
            seeds = [2 * step + rank for rank in range(world.size)]
            for seed in seeds[world.rank : world.rank + 1] if many else seeds:
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).double()
                (model(x).square().mean() / (1 if many else world.size)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return found


@pytest.mark.parametrize("mode", ["project", "step"])
def test_one_layer_is_frozen_as_another_begins(mode: Any, ranks: Worlds) -> None:
    """Ranks went by the number of those that are trained, and ended with a ``KeyError``."""
    for alone, together in ranks(2).run(f"turns, {mode}", taking_turns, mode=mode).checked():
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


# ------------------------------------------------------------------ misuse


def small(rank: int = 0, **options: Any) -> tuple[nn.Module, GaLoreAdamW]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    return model, GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=2, **options)


def loss(model: nn.Module, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return model(torch.randn(4, 8, generator=generator)).square().mean()


def starts(world: World) -> Any:
    """Ranks with weights of their own begin with those of the first."""
    model, optimizer = small(world.rank)
    handle = attach_in_backward(optimizer, process_group=dist.group.WORLD)
    equal = all(
        torch.equal(p, q) for p, q in zip(model.parameters(), small()[0].parameters(), strict=True)
    )
    assert optimizer._replicas.known
    handle.remove()
    assert not optimizer._replicas.known
    loss(model, world.rank).backward()  # of this rank alone
    return equal, [p.grad for p in model.parameters()]


def test_ranks_begin_with_the_weights_of_rank_0(ranks: Worlds) -> None:
    values = ranks(3).run("starts", starts).checked()
    assert all(equal for equal, _ in values)
    assert not torch.equal(values[0][1][0], values[1][1][0]), "averaged after remove()"


def misused(world: World, how: str) -> str:
    """The same mistake on every rank: what it says."""
    model, optimizer = small()
    group = dist.group.WORLD
    if how == "never averaged":
        handle = attach_in_backward(optimizer, process_group=group)
        with handle.no_sync():
            loss(model).backward()
        call: Callable[[], Any] = optimizer.step
    elif how == "too few backwards":
        attach_in_backward(optimizer, "step", accumulation_steps=2, process_group=group)
        loss(model).backward()
        call = optimizer.step
    elif how == "no_sync of stepping":
        call = attach_in_backward(optimizer, "step", process_group=group).no_sync
    elif how == "a first basis of one rank":
        call = lambda: attach_in_backward(optimizer, first_basis="micro", process_group=group)  # noqa: E731
    elif how == "other parameters":
        model = nn.Linear(8, 4 + world.rank)
        optimizer = GaLoreAdamW(model.named_parameters(), rank=2)
        call = lambda: attach_in_backward(optimizer, process_group=group)  # noqa: E731
    elif how == "another step":
        attach_in_backward(optimizer, process_group=group)
        if world.rank == 1:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer._replicas.release()
            state = optimizer.state_dict()
            optimizer.param_groups[0]["lr"] = 0.0
            other = GaLoreAdamW(small()[0].named_parameters(), lr=1e-2, rank=2)
            for p in other.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            other.step()
            state = other.state_dict()
            optimizer.zero_grad()
            optimizer.load_state_dict(state)
        call = lambda: loss(model).backward()  # noqa: E731
    elif how == "gradients of the step before":
        attach_in_backward(optimizer, process_group=group)
        optimizer.param_groups[0]["update_proj_gap"] = 2
        for _ in range(2):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        def call() -> None:
            for _ in range(3):
                loss(model).backward()
                optimizer.step()

    elif how == "a part that two checkpoints share":
        from torch.utils.checkpoint import checkpoint

        attach_in_backward(optimizer, process_group=group)

        def call() -> None:
            x = torch.randn(4, 8, requires_grad=True)
            for _ in range(2):
                x = checkpoint(model, x, use_reentrant=True)
            x.square().mean().backward()

    else:
        raise AssertionError(how)
    with pytest.raises((RuntimeError, ValueError)) as error:
        call()
    return str(error.value)


SAID = {
    "never averaged": "have not been averaged .* outside handle.no_sync",
    "too few backwards": "have not been averaged .* accumulation_steps",
    "no_sync of stepping": "pass that number to attach_in_backward",
    "a first basis of one rank": "pass 'boundary', or leave it out",
    "other parameters": r"rank 1 of the group has weight \(5, 8\) where rank 0 has weight \(4, 8\)",
    "another step": "on 1 of 2 ranks .* load the same checkpoint on every rank",
    "gradients of the step before": r"call zero_grad\(\) after every step",
    "a part that two checkpoints share": "use_reentrant=False",
}


@pytest.mark.parametrize("how", SAID)
def test_misuse_is_an_error_on_every_rank(how: str, ranks: Worlds) -> None:
    import re

    for text in ranks(2).run(how, misused, how=how).checked():
        assert re.search(SAID[how], text), text


def too_early() -> str:
    model, optimizer = small()
    with pytest.MonkeyPatch.context() as patch:
        attach_in_backward(optimizer, process_group=dist.group.WORLD)
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.warns(UserWarning, match="is None until init_process_group"):
            loss(model).backward()
    return ""


def test_a_group_that_is_none_yet_is_told() -> None:
    """``dist.group.WORLD`` before there is one, which reads as if there were."""
    assert dist.group.WORLD is None
    too_early()
