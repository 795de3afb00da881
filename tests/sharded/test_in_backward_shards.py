"""attach_in_backward under FSDP2: the run is that without, and fewer gradients are alive."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim
from lowrank_optim import attach_in_backward
from lowrank_optim.tensors.projected_grad import ProjectedGrad, projection
from tests.sharded.models import SAMPLES
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import (
    Case,
    Held,
    Step,
    Trained,
    assembled,
    assert_equal_runs,
    assert_worth_comparing,
)

Worlds = Callable[[int], Ranks]
SHORT = ("wide", "tall", "few", "experts")
SVD = Case("GaLoreAdamW", {"projector": "svd"}, how="fsdp columns", only=SHORT)


@dataclass(frozen=True)
class Run:
    """A case, trained inside backward or after it."""

    case: Case
    mode: Literal["project", "step"] | None = "project"
    pieces: int = 1
    sync: bool = True
    """Whether every micro-batch reduces its gradients, or the last alone."""
    clip: float | None = None
    reshard: bool = True
    nan: int | None = None
    """The step in which an entry of the loss of the last rank is not a number."""
    resumed: int | None = None
    """The step before which all is saved, made anew and loaded."""
    told: int | None = None
    """``accumulation_steps`` (default: what it should be)."""

    @property
    def plain(self) -> Run:
        """The same without."""
        return replace(self, mode=None, resumed=None)


def attached(run: Run, optimizer: Any) -> Any:
    if run.mode is None:
        return None
    told = run.told or (run.pieces if run.sync else 1)
    steps = {} if run.mode == "project" else {"accumulation_steps": told}
    return attach_in_backward(optimizer, run.mode, **steps)


def backward(trained: Trained, run: Run, step: int) -> None:
    """All micro-batches of a step."""
    model = trained.model
    assert model is not None
    count = trained.size * run.pieces
    for piece in range(run.pieces):
        if not run.sync:
            model.set_requires_gradient_sync(piece == run.pieces - 1)
        if not run.reshard:
            last = piece == run.pieces - 1
            model.set_reshard_after_backward(last)
            model.set_is_last_backward(last)
        loss = model(step, trained.rank + piece * trained.size, count) / run.pieces
        if run.nan == step and trained.rank == trained.size - 1:
            loss = loss * float("nan")
        loss.backward()


def resumed(trained: Trained, world: World) -> Trained:
    """Another that goes on from what this one saves."""
    file = io.BytesIO()
    own = {name: param.detach().to_local() for name, param in trained.named.items()}
    torch.save({"weights": own, "state": trained.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    new = Trained(trained.case, world)
    with torch.no_grad():
        for name, param in new.named.items():
            param.to_local().copy_(saved["weights"][name])
    new.optimizer.load_state_dict(saved["state"])
    return new


def train(world: World, run: Run) -> list[tuple[Held, dict[str, Held]]]:
    """What is held after every step."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(run.case, world)
    handle, out = attached(run, trained.optimizer), []
    for step in range(run.case.steps):
        if run.resumed == step:
            handle.remove()
            trained = resumed(trained, world)
            handle = attached(run, trained.optimizer)
        backward(trained, run, step)
        if run.mode == "step" and run.told is None:
            assert all(p.grad is None for p in trained.named.values()), "a gradient is left"
        if run.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.named.values(), run.clip)
        if run.mode == "project" and step == 2:
            kinds = [projection(p.grad) is not None for p in trained.named.values()]
            assert any(kinds), "nothing is projected"
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        out.append(trained.held())
    return out


def beside(world: World, runs: list[Run]) -> list[Any]:
    return [train(world, run) for run in runs]


def compared(run: Run, world: Ranks, name: str) -> tuple[list[Step], list[Step]]:
    values = world.run(name, beside, runs=[run, run.plain]).checked()
    ours, plain = (assembled([own[i] for own in values]) for i in range(2))
    return ours, plain


EQUAL: dict[str, Run] = {
    "project": Run(SVD),
    "step": Run(replace(SVD, cls="FiraAdamW"), "step"),
}
SLOW: dict[str, Run] = {
    "project, accumulated": Run(SVD, pieces=2),
    "project, three in one": Run(SVD, pieces=3, sync=False),
    "project, kept unsharded": Run(SVD, pieces=2, reshard=False),
    "project, all shapes": Run(replace(SVD, only=())),
    "project, by rows": Run(replace(SVD, how="fsdp", only=())),
    "project, both sides": Run(
        replace(SVD, options={"projector": "svd", "proj_type": "full", "eps": 1e-3})
    ),
    "project, columns": Run(
        replace(SVD, options={"projector": "columns", "rank": 0.5, "on_refresh": "project"})
    ),
    "project, dct": Run(replace(SVD, options={"projector": "dct", "on_refresh": "reset"})),
    "project, random, up": Run(replace(SVD, options={"projector": "random", "maximize": True})),
    "project, lion": Run(Case("GaLoreLion", {}, how="fsdp columns", only=SHORT), pieces=2),
    "project, not a number": Run(SVD, nan=5),
    "project, where bases are due": Run(
        replace(SVD, options={"projector": "svd", "stagger": False}), nan=3
    ),
    "project, columns not a number": Run(
        replace(SVD, options={"projector": "columns", "rank": 0.5}), nan=5
    ),
    "step, accumulated": Run(SVD, "step", pieces=2),
    "step, three in one": Run(SVD, "step", pieces=3, sync=False),
    "step, told of backwards": Run(SVD, "step", pieces=3, sync=False, told=3),
    "step, kept unsharded": Run(SVD, "step", pieces=2, reshard=False),
    "step, all shapes": Run(replace(SVD, how="fsdp", only=()), "step"),
    "step, not a number": Run(SVD, "step", nan=5),
    "step, blocks": Run(
        Case("FrugalAdamW", {"density": 0.5}, how="fsdp columns", only=SHORT), "step"
    ),
    "step, blocks told of backwards": Run(
        Case("FrugalAdamW", {"density": 0.5}, how="fsdp", only=SHORT),
        "step", pieces=3, sync=False, told=3,
    ),
    "step, memory": Run(
        Case("DCTAdamW", {"error_feedback": "float32"}, how="fsdp columns", only=SHORT), "step"
    ),
    "project, over tensor parallel": Run(replace(SVD, how="parallel columns", mesh="square")),
    "step, over tensor parallel": Run(replace(SVD, how="parallel", mesh="square"), "step"),
    "project, copies": Run(replace(SVD, mesh="square"), pieces=2),
    "step, copies": Run(replace(SVD, mesh="square"), "step"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*EQUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_is_fsdp2_without(name: str, size: int, ranks: Worlds) -> None:
    """Weights, state, choices and counters, over refreshes; stepped inside, to the bit."""
    run = (EQUAL | SLOW)[name]
    if run.case.mesh == "square":
        if size == 3:
            pytest.skip("a square has four ranks")
        size = 4
    ours, plain = compared(run, ranks(size), name)
    exact = run.mode == "step" and size == 2
    assert_equal_runs(ours, plain, *((0.0, 0.0) if exact else ()))
    if run.nan is None:
        assert_worth_comparing(run.case, ours)
