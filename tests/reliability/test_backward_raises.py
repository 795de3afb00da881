"""A backward raises in its middle, out of memory say: the batch is left out, and training goes on.

What is expected is said by runs without `attach_in_backward`: of a batch that was left out, the
parameters that backward had reached have taken the step, under ``mode="step"``, and no other has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_optim import LowRankOptimizer, attach_in_backward, methods
from tests.compare import assert_close
from tests.logged import Logged

BATCHES, BAD = 6, 2


class Fuse(torch.autograd.Function):
    """The identity, whose backward has no memory left where it is blown."""

    blown = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fuse.blown:
            raise torch.OutOfMemoryError("no memory left")
        return grad


class Net(nn.Module):
    """Backward reaches ``late``, then the fuse, then ``early``."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late, self.nested = nn.Linear(8, 12), nn.Linear(12, 8), nested

    def forward(self, x: Tensor) -> Tensor:
        hidden = Fuse.apply(self.early(x).tanh())
        if self.nested:
            return checkpoint(self.late, hidden, use_reentrant=True)
        return self.late(hidden)


def made(model: nn.Module, name: str) -> LowRankOptimizer:
    own = {} if "SwitchLoRA" in name else {"update_proj_gap": 3, "projector": "svd"}
    own |= (
        {"projector": "block", "block_order": "ascending", "rank": 0.5} if "Frugal" in name else {}
    )
    found: LowRankOptimizer = getattr(methods, name)(
        model.named_parameters(), **{"lr": 1e-2, "rank": 2, **own}
    )
    return found


def batches(steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(4, 8, generator=generator) for _ in range(steps)] for _ in range(BATCHES)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def zeroed(optimizer: LowRankOptimizer, model: nn.Module) -> None:
    optimizer.zero_grad()


def zeroed_in_place(optimizer: LowRankOptimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=False)


def zeroed_by_model(optimizer: LowRankOptimizer, model: nn.Module) -> None:
    model.zero_grad()


RECOVER = [zeroed, zeroed_in_place, zeroed_by_model]
Recover = Callable[[LowRankOptimizer, nn.Module], None]


def run(
    optimizer: LowRankOptimizer, model: nn.Module, steps: int, recover: Recover, at: int
) -> None:
    """Batches of several backwards, one of which raises at its backward number ``at``."""
    for n, micro in enumerate(batches(steps)):
        try:
            for k, x in enumerate(micro):
                Fuse.blown = (n, k) == (BAD, at)
                loss_of(model, x).backward()
        except torch.OutOfMemoryError:
            recover(optimizer, model)
            continue
        finally:
            Fuse.blown = False
        optimizer.step()
        recover(optimizer, model)


def expected(name: str, steps: int, reached: bool) -> nn.Module:
    """Without hooks: of the bad batch the last layer alone takes the step, or nothing does."""
    model = Net()
    optimizer = made(model, name)
    for n, micro in enumerate(batches(steps)):
        if n == BAD and not reached:
            continue
        for x in micro:
            loss_of(model, x).backward()
        if n == BAD:
            model.early.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


CASES = [
    # steps, at: a backward that steps; one that adds up; and one that steps after it
    (1, 0), (2, 0), (2, 1),
]  # fmt: skip


@pytest.mark.parametrize("recover", RECOVER)
@pytest.mark.parametrize(("steps", "at"), CASES)
@pytest.mark.parametrize(
    ("name", "keep_norms"), [("GaLoreAdamW", False), ("FiraAdamW", True), ("FrugalAdamW", False)]
)
def test_step_mode(
    name: str, keep_norms: bool, steps: int, at: int, recover: Recover, logged: Logged
) -> None:
    """Every later batch was an error."""
    model = Net()
    optimizer = made(model, name)
    reached = at == steps - 1
    with (
        attach_in_backward(optimizer, "step", accumulation_steps=steps, keep_norms=keep_norms),
        logged.at_level(logging.WARNING),
    ):
        run(optimizer, model, steps, recover, at)
    assert same(model, expected(name, steps, reached))
    said = [r.getMessage() for r in logged.records if "left out" in r.getMessage()]
    assert len(said) == reached
    assert not reached or "after 2 of 4 parameters had taken its step" in said[0]


@pytest.mark.parametrize("recover", RECOVER)
@pytest.mark.parametrize(("steps", "at"), CASES)
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_project_mode(max_norm: float | None, steps: int, at: int, recover: Recover) -> None:
    """Nothing of the batch is left."""
    found = []
    for bad in (at, -1):
        model = Net()
        optimizer = made(model, "GaLoreAdamW")
        with attach_in_backward(optimizer, "project", max_norm=max_norm):
            if bad < 0:
                whole = batches(steps)
                for n, micro in enumerate(whole):
                    for x in micro if n != BAD else ():
                        loss_of(model, x).backward()
                    if n != BAD:
                        optimizer.step()
                    recover(optimizer, model)
            else:
                run(optimizer, model, steps, recover, bad)
        found.append(model)
    assert same(*found)


def test_a_backward_inside_another() -> None:
    """Of reentrant checkpoints: the inner one came to its end, the outer did not."""
    model = Net(nested=True)
    optimizer = made(model, "GaLoreAdamW")
    with attach_in_backward(optimizer, "step"):
        run(optimizer, model, 1, zeroed, 0)
    assert same(model, expected("GaLoreAdamW", 1, True))


def test_a_step_inside_backward_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the parameter that could not be stepped is there: ``step()`` applies it."""
    wanted, model = Net(), Net()
    twin, optimizer = made(wanted, "GaLoreAdamW"), made(model, "GaLoreAdamW")
    alone, calls = optimizer._step_alone, []

    def failing(plan: Any, *args: Any) -> None:
        calls.append(plan.name)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        alone(plan, *args)

    monkeypatch.setattr(optimizer, "_step_alone", failing)
    ((x,), *rest) = batches(1)
    with attach_in_backward(optimizer, "step"):
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        for (y,) in rest:
            loss_of(model, y).backward()
            optimizer.step()
    loss_of(wanted, x).backward()
    for param, own in zip(wanted.parameters(), model.named_parameters(), strict=True):
        if own[0] not in calls[:2]:
            param.grad = None
    for (y,) in [(None,), *rest]:
        if y is not None:
            loss_of(wanted, y).backward()
        twin.step()
        twin.zero_grad()
    assert same(model, wanted)


def test_gradients_that_are_left_are_an_error_that_says_so() -> None:
    """Without zero_grad() part of a batch would be applied with the next one."""
    model = Net()
    optimizer = made(model, "GaLoreAdamW")
    (a, b), *_ = batches(2)
    with attach_in_backward(optimizer, "step", accumulation_steps=3):
        loss_of(model, a).backward()
        Fuse.blown = True
        try:
            with pytest.raises(torch.OutOfMemoryError):
                loss_of(model, b).backward()
        finally:
            Fuse.blown = False
        with pytest.raises(RuntimeError, match=r"a backward raised before its end.*zero_grad"):
            loss_of(model, b).backward()
        optimizer.zero_grad()
        for x in (a, b, a):
            loss_of(model, x).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()


def test_one_backward_too_many_is_an_error() -> None:
    """As ever, where the one before came to its end."""
    model = Net()
    optimizer = made(model, "GaLoreAdamW")
    (x,), *_ = batches(1)
    with attach_in_backward(optimizer, "step"):
        loss_of(model, x).backward()
        with pytest.raises(RuntimeError, match="arrived 2 times before"):
            loss_of(model, x).backward()


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["step", "project"])
def test_with_a_process_group(alone: dist.ProcessGroup, mode: str) -> None:
    """A backward that was not to send anything is left out; of one that was, an error says what to
    do, as messages of other ranks may be under way."""
    model = Net()
    optimizer = made(model, "GaLoreAdamW")
    with attach_in_backward(optimizer, mode, accumulation_steps=2, process_group=alone):
        run(optimizer, model, 2, zeroed, 0)
        wanted = expected("GaLoreAdamW", 2, False)
        for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
            assert_close(a, b)  # "project" adds coordinates of two gradients, not the gradients
        (x, y), *_ = batches(2)
        Fuse.blown = False
        loss_of(model, x).backward()
        Fuse.blown = True
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model, y).backward()
        Fuse.blown = False
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="attach_in_backward again"):
            loss_of(model, x).backward()
            loss_of(model, x).backward()
            optimizer.step()
