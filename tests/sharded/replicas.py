"""Runs of a model that every rank has whole, on its own data: under DDP, and in its place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowrank_optim import attach_in_backward
from lowrank_optim.backward.comm_hook import ddp_comm_hook
from lowrank_optim.sharding import averages
from tests.sharded import models
from tests.sharded.ranks import World
from tests.sharded.training import Case, Held, make_optimizer, part_of

SHORT = ("wide", "tall", "square", "experts")


@dataclass(frozen=True)
class Run:
    """A case, and how the ranks train it together."""

    case: Case
    how: str = "project"
    """``ddp``: the wrapper alone. ``hook``: with ``ddp_comm_hook``. ``project``, ``step``: modes of
    ``attach_in_backward``."""
    pieces: int = 1
    """Micro-batches of a step on each rank."""
    told: bool = False
    """Whether ``accumulation_steps`` says which is the last, or ``no_sync``."""
    clip: float | None = None
    max_norm: float | None = None
    scaled: bool = False
    """By a GradScaler; rank 1 has an overflow at step 4."""
    turned: bool = False
    """Whether gradients arrive in another order on rank 1."""
    reentrant: bool = False
    """Whether layers are checkpointed, each in a backward of its own."""
    unused: bool = False
    """Whether some ranks, or all, leave out some layers in some steps."""
    bucket: int = 0
    """Bytes of a bucket; as many as by default if 0."""
    steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``attach_in_backward`` or of the wrapper."""

    @property
    def plain(self) -> Run:
        """The same under DDP."""
        own = {"find_unused_parameters": True} if self.unused else {}
        return replace(self, how="ddp", bucket=0, reentrant=False, turned=False, options=own)


class Net(nn.Module):
    """The awkward model, in pieces."""

    def __init__(self, only: tuple[str, ...]) -> None:
        super().__init__()
        self.model = models.awkward(only)
        layers = models.Layer, models.Table
        self.layers = [m for m in self.model.modules() if isinstance(m, layers)]

    def forward(
        self, step: int, rank: int, size: int, leave: Sequence[int], turned: bool, reentrant: bool
    ) -> Tensor:
        numbers = [n for n in range(len(self.layers)) if n not in leave]
        losses = []
        for n in reversed(numbers) if turned else numbers:
            if reentrant:
                x = torch.zeros((), dtype=torch.float64, requires_grad=True)
                own = checkpoint(
                    lambda x, n=n: x + self.layers[n](step, rank, size), x, use_reentrant=True
                )
            else:
                own = self.layers[n](step, rank, size)
            losses.append(own)
        return torch.stack(losses).sum()


def left_out(step: int, rank: int) -> tuple[int, ...]:
    """Layer 0 by rank 1 now and then, 1 by all but rank 1, 2 by all at first."""
    own = [0] if rank == 1 and step % 3 else []
    own += [1] if rank != 1 and step % 2 else []
    own += [2] if step < 4 else []
    return tuple(own)


class Together:
    """A run on this rank; of one process it has the data of all."""

    def __init__(self, run: Run, world: World | None, size: int = 1) -> None:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        self.run, self.rank = run, 0 if world is None else world.rank
        self.size = size if world is None else world.size
        self.alone = world is None
        self.pieces = run.pieces * (self.size if self.alone else 1)
        self.net: Any = Net(run.case.only)
        self.named = dict(self.net.named_parameters())
        self.optimizer: Any = make_optimizer(run.case, self.named.items())
        self.forward, self.handle = self.net, None
        self.attach()
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=3, enabled=run.scaled
        )

    def attach(self) -> None:
        run = self.run
        if run.how in ("ddp", "hook"):
            self.forward = (
                self.net if self.alone else DistributedDataParallel(self.net, **run.options)
            )
            if run.how == "hook":
                self.forward.register_comm_hook(None, ddp_comm_hook(self.optimizer))
            return
        own: dict[str, Any] = {"max_norm": run.max_norm, **run.options}
        if not self.alone:
            own["process_group"] = dist.group.WORLD
        elif run.how == "project":
            own["first_basis"] = "boundary"
        if run.told or run.how == "step":
            own["accumulation_steps"] = self.pieces
        self.handle = attach_in_backward(self.optimizer, run.how, **own)  # type: ignore[arg-type]

    def alone_here(self, piece: int) -> AbstractContextManager[Any]:
        """What a micro-batch that is not the last runs in."""
        last = piece == self.pieces - 1
        if last or self.alone or self.run.told or self.run.how == "step":
            return nullcontext()
        return self.handle.no_sync() if self.handle is not None else self.forward.no_sync()

    def backward(self, step: int) -> None:
        run = self.run
        for piece in range(self.pieces):
            rank = piece if self.alone else self.rank + piece * self.size
            count = run.pieces * self.size
            leave = left_out(step, self.rank) if run.unused else ()
            with self.alone_here(piece):
                turned = run.turned and self.rank == 1
                loss = self.forward(step, rank, count, leave, turned, run.reentrant) / self.pieces
                if run.scaled and self.rank == 1 and step == 4:
                    loss = loss * float("inf")
                self.scaler.scale(loss).backward()

    def step(self, step: int) -> None:
        self.backward(step)
        if self.run.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.run.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def held(self) -> tuple[Held, dict[str, Held]]:
        weights = {name: part_of(p.detach()) for name, p in self.named.items()}
        states = self.optimizer.state
        return weights, {
            name: {k: part_of(x) for k, x in states.get(p, {}).items()}
            for name, p in self.named.items()
        }


def train(world: World | None, run: Run, size: int = 1) -> list[tuple[Held, dict[str, Held]]]:
    """A whole run: what is held after every step."""
    out = []
    with pytest.MonkeyPatch.context() as patch:
        if run.bucket:
            patch.setattr(averages, "BUCKET_BYTES", run.bucket)
        trained = Together(run, world, size)
        for step in range(run.steps or run.case.steps):
            trained.step(step)
            out.append(trained.held())
    return out


def beside(world: World, runs: Sequence[Run]) -> list[list[tuple[Held, dict[str, Held]]]]:
    """Several, one after the other."""
    return [train(world, run) for run in runs]
