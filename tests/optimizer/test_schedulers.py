"""Learning-rate schedulers of torch: every one, and what the weights make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from lowrank_optim import GaLoreSGD
from tests import cases
from tests.compare import assert_close

STEPS = 12


def sequential(optimizer: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])


def chained(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def cyclic(optimizer: Optimizer) -> Any:
    momentum = "betas" in optimizer.defaults or "momentum" in optimizer.defaults
    return lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-1, step_size_up=6, cycle_momentum=momentum)


def one_cycle(optimizer: Optimizer) -> Any:
    momentum = "betas" in optimizer.defaults or "momentum" in optimizer.defaults
    return lr_scheduler.OneCycleLR(optimizer, 1e-1, total_steps=STEPS + 1, cycle_momentum=momentum)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "CyclicLR": cyclic,
    "OneCycleLR": one_cycle,
}


def test_every_scheduler_of_torch_is_here() -> None:
    base = lr_scheduler.LRScheduler
    known = {
        name
        for name, x in vars(lr_scheduler).items()
        if isinstance(x, type) and issubclass(x, base) and x is not base and name[0] != "_"
    }
    assert known - {"LRScheduler"} == SCHEDULERS.keys()


def advance(scheduler: Any) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def rates(optimizer: Optimizer, make: Callable[[Optimizer], Any], step: Callable[[], None]) -> list:
    """The learning rate of each step, low-rank and dense group alike."""
    scheduler, seen = make(optimizer), []
    for _ in range(STEPS):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        step()
        advance(scheduler)
    return seen


SCHEDULED = [
    (name, scheduler)
    for name in cases.distinct_names()
    for scheduler in SCHEDULERS
    # what a scheduler writes into a group does not depend on who reads it
    if name == "GaLoreAdamW" or scheduler in ("LambdaLR", "OneCycleLR")
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim")
@pytest.mark.parametrize(
    ("name", "scheduler", "tensor_lr"),
    [
        pytest.param(*row, lr, marks=() if (i + i // 2) % 2 == lr else pytest.mark.slow)
        for i, row in enumerate(SCHEDULED)
        for lr in (False, True)
    ],
)
def test_the_scheduled_rate_is_the_one_applied(name: str, scheduler: str, tensor_lr: bool) -> None:
    """The rates are torch.optim.AdamW's of the same kind, and the weights decay by each of them.

    With zero gradients a step is ``W <- (1 - lr wd) W``, for matrices and vectors and every rule,
    so the weights themselves say which rate was used.
    """
    lr: Any = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    params = [torch.nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in [(6, 9), (4,)]]
    optimizer = cases.build(name, params, lr=lr, weight_decay=0.5)
    reference_param = torch.nn.Parameter(torch.ones(2))
    reference = torch.optim.AdamW([reference_param], lr=lr.clone() if tensor_lr else lr)
    make = SCHEDULERS[scheduler]

    def step() -> None:
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()

    got, want = rates(optimizer, make, step), rates(reference, make, lambda: reference.step())
    assert got == pytest.approx(want, rel=1e-9)
    assert len(set(got)) > 1
    factor = torch.tensor([1 - 0.5 * x for x in want], dtype=torch.float64).prod()
    for p in params:
        assert_close(p, torch.full_like(p, float(factor)))


@pytest.mark.parametrize("rank", [4, None])
def test_scheduled_momentum_is_used(rank: int | None) -> None:
    """OneCycleLR moves the momentum too; at full rank the run is that of torch.optim.SGD."""
    start, grads = cases.parameter((4, 9)), cases.gradients((4, 9), STEPS)
    mine, other = (torch.nn.Parameter(start.detach().clone()) for _ in range(2))
    options: dict[str, Any] = {"scale": 1.0, "update_proj_gap": 100, "projector": "svd"}
    ours = GaLoreSGD([{"params": [mine], "rank": rank}], lr=0.1, momentum=0.9, **options)
    theirs = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    for param, optimizer in ((mine, ours), (other, theirs)):
        scheduler = one_cycle(optimizer)
        for grad in grads:
            cases.run(optimizer, [param], [[grad]])
            scheduler.step()
    assert_close(mine, other)
