"""Norms inside backward under FSDP2, and what they clip: those of one process."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lowrank_optim import FrugalAdamW, attach_in_backward
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_in_backward_shards import loss_of, net, optimizer_of, sharded

Worlds = Callable[[int], Ranks]
ALONE = World(0, 1)
STEPS = 6


@dataclass(frozen=True)
class Run:
    """A net, trained inside backward on some ranks or on one."""

    mode: Literal["project", "step"] = "project"
    options: dict[str, Any] = field(default_factory=dict)
    max_norm: float | None = 1e-2
    ranks: int = 2
    rows: bool = False
    """Whether rows are split, so that some matrices stay whole."""
    bad: float | None = None
    """What the last entry of one gradient is in one step, on the rank that has it."""
    when: int = 3
    pieces: int = 1
    cls: str = "GaLoreAdamW"


def by_rows(world: World) -> nn.Module:
    model = net().double()
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return model


def train(world: World, run: Run) -> list[Tensor]:
    """Whole weights after each step."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    alone = world.size == 1
    model = net().double() if alone else by_rows(world) if run.rows else sharded(world)
    if run.cls.startswith("Frugal"):
        own = {"lr": 1e-2, "update_proj_gap": 2, "density": 0.5, "eps": 1e-3}
        optimizer: Any = FrugalAdamW(model.named_parameters(), **own)
    else:
        own = {"projector": "svd", "eps": 1e-3, **run.options}
        optimizer = optimizer_of(model, run.cls, **own)
    now = 0

    def spoil(param: Tensor) -> None:
        if now == run.when and run.bad is not None and world.rank == world.size - 1:
            own: Any = param.grad
            (own if alone else own.to_local())[-1, -1] = run.bad

    model[1][0].weight.register_post_accumulate_grad_hook(spoil)  # before what takes it
    given: dict[str, Any] = {"first_basis": "boundary"} if run.mode == "project" else {}
    if run.mode == "step":
        given["accumulation_steps"] = run.pieces
    attach_in_backward(optimizer, run.mode, max_norm=run.max_norm, **given)
    out = []
    for now in range(STEPS):
        for piece in range(run.pieces):
            of_ranks = [World(i, run.ranks) for i in range(run.ranks)] if alone else [world]
            losses = [loss_of(model, now * run.pieces + piece, part) for part in of_ranks]
            (torch.stack(losses).mean() / run.pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
        out += [p.detach().clone() if alone else p.full_tensor() for p in model.parameters()]
    return [x.detach() for x in out]


TWO = {"proj_type": "full", "eps": 1e-3}
CLIPPED: dict[str, Run] = {
    "step": Run("step"),
}
SLOW: dict[str, Run] = {
    "project": Run(),  # test_in_backward_shards.py has what clipping sees
    "project, accumulated": Run(pieces=2),
    "project, all at once": Run(options={"stagger": False}),
    "project, by rows": Run(rows=True),
    "project, by rows, three": Run(rows=True, ranks=3),
    "project, three": Run(ranks=3),
    "project, both sides": Run(options=TWO),
    "project, both sides, by rows": Run(options=TWO, rows=True),
    "project, copies": Run(ranks=4),
    "project, columns": Run(options={"projector": "columns", "rank": 0.5}),
    "project, dct": Run(options={"projector": "dct"}),
    "project, random": Run(options={"projector": "random"}),
    "step, accumulated": Run("step", pieces=2),
    "step, by rows": Run("step", cls="FiraAdamW", rows=True),
    "step, blocks": Run("step", cls="FrugalAdamW"),
    "step, copies": Run("step", ranks=4),
}
for _bad in (math.nan, math.inf):
    for _name in ("project", "project, by rows", "project, both sides", "project, columns"):
        SLOW[f"{_name}, {_bad}"] = replace((CLIPPED | SLOW)[_name], bad=_bad)
    SLOW[f"project, columns by rows, {_bad}"] = replace(
        SLOW["project, columns"], rows=True, bad=_bad
    )
    SLOW[f"project, where bases are due, {_bad}"] = Run(
        options={"stagger": False}, bad=_bad, when=4
    )
    SLOW[f"project, at first, {_bad}"] = Run(bad=_bad, when=0)
    SLOW[f"step, {_bad}"] = Run("step", bad=_bad)


@pytest.mark.parametrize(
    "name", [*CLIPPED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_max_norm_is_that_of_one_process(name: str, ranks: Worlds) -> None:
    """Weights after every step, on every rank; and clipping changes them."""
    run = (CLIPPED | SLOW)[name]
    one, free = train(ALONE, run), train(ALONE, replace(run, max_norm=None))
    assert max(float((a - b).abs().max()) for a, b in zip(one, free, strict=True)) > 1e-4
    values = ranks(run.ranks).run(name, train, run=run).checked()
    for found in values:
        gap = max(float((a - b).abs().max()) for a, b in zip(found, one, strict=True))
        assert gap <= 1e-10, gap
        assert all(map(torch.equal, found, values[0]))


def parallel(world: World, mode: Any) -> list[Tensor]:
    """Two layers of tensor parallel without FSDP2, beside layers that every rank has."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = net().double()
    if world.size > 1:
        split = {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (world.size,)), split)
        assert len({isinstance(p, DTensor) for p in model.parameters()}) == 2
    optimizer = optimizer_of(model, projector="svd", eps=1e-3)
    own = {"first_basis": "boundary"} if mode == "project" else {}
    attach_in_backward(optimizer, mode, max_norm=1e-2, **own)
    for step in range(STEPS):
        loss_of(model, step, ALONE).backward()
        optimizer.step()
        optimizer.zero_grad()
    params = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in params]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["project", "step"])
def test_plain_parameters_count_once(mode: str, ranks: Worlds) -> None:
    one = parallel(ALONE, mode)
    for found in ranks(2).run(mode, parallel, mode=mode).checked():
        gap = max(float((a - b).abs().max()) for a, b in zip(found, one, strict=True))
        assert gap <= 1e-10, gap


def apart(world: World) -> list[Tensor]:
    """Sharded layers beside one that every rank has, with gradients of its own data."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = net().double()
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in model[1:]:
        fully_shard(layer, mesh=mesh)
    optimizer = optimizer_of(model, projector="svd", eps=1e-3)
    attach_in_backward(optimizer, max_norm=1e-2)
    loss_of(model, 0, world).backward()
    params = list(model.parameters())
    before = [p.grad.to_local().clone() for p in params if isinstance(p.grad, DTensor)]
    attached: Any = optimizer._in_backward
    attached._settle()
    biases = [p for p in params if isinstance(p, DTensor) and p.dim() == 1]
    after = {p: p.grad.to_local() for p in biases}
    whole = [x for x in before if x.dim() == 1]
    return [y / x for x, y in zip(whole, after.values(), strict=True)]


@pytest.mark.slow
def test_ranks_scale_alike_what_plain_gradients_differ_beside(ranks: Worlds) -> None:
    found = ranks(2).run("apart", apart).checked()
    factors = torch.cat([x.flatten() for own in found for x in own])
    assert 0 < factors[0] < 0.5
    assert torch.allclose(factors, factors[0], rtol=1e-12, atol=0)


# ---------------------------------------------------------------- keep_norms


def norms(world: World, how: str, pieces: int) -> tuple[list[float], list[Tensor]]:
    """Norms that clip_grad_norm_ finds and weights: after backward, inside it, or without norms."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = sharded(world)
    optimizer = optimizer_of(model, "FiraAdamW")
    if how != "after":
        attach_in_backward(optimizer, "step", accumulation_steps=pieces, keep_norms=how == "kept")
    found = []
    for step in range(3):
        for piece in range(pieces):
            loss_of(model, step * pieces + piece, world).backward()
        if how != "without":
            most = math.inf if how == "after" else 1e-3
            norm: Any = nn.utils.clip_grad_norm_(model.parameters(), most, foreach=step % 2 == 0)
            found.append(float(norm.full_tensor()))
        if how == "kept":
            grads: list[Any] = [p.grad for p in model.parameters()]
            for grad in grads:
                with pytest.raises(RuntimeError, match="invalid python storage"):
                    grad._local_tensor.untyped_storage().data_ptr()
        optimizer.step()
        assert how == "after" or all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
    return found, [p.detach().full_tensor() for p in model.parameters()]


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(2, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 2), (3, 1), (4, 1)))],
)
def test_norms_that_are_kept_are_of_whole_gradients(size: int, pieces: int, ranks: Worlds) -> None:
    """Of all ranks; and the clipping that asks for them changes nothing."""
    run = ranks(size).run
    after, kept, without = (
        run(how, norms, how=how, pieces=pieces).checked() for how in ("after", "kept", "without")
    )
    for (a, _), (b, weights), (_, plain) in zip(after, kept, without, strict=True):
        assert a == pytest.approx(b, rel=1e-12) and min(a) > 0
        assert all(map(torch.equal, weights, plain))


def again(world: World) -> str:
    """A second gradient before the step."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    optimizer = optimizer_of(model)  # held: hooks do nothing once it is gone
    attach_in_backward(optimizer, "step", keep_norms=True)
    loss_of(model, 0, world).backward()
    with pytest.raises(RuntimeError) as error:
        loss_of(model, 1, world).backward()
    return str(error.value)


@pytest.mark.slow
def test_a_second_gradient_is_an_error(ranks: Worlds) -> None:
    for text in ranks(2).run("again", again).checked():
        assert "accumulation_steps" in text, text
