"""A model of tied, reused and frozen weights, trained in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer
from lowrank_optim.residuals import Drop
from tests import cases

METHODS = cases.distinct_names()
STEPS = 7


class Net(nn.Module):
    """Tied, reused, frozen and unused parameters; a convolution, experts, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.up = nn.Linear(8, 14)
        self.down = nn.Linear(14, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 8, 10) / 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.segment: Callable[..., Tensor] = lambda f, x: f(x)

    def block(self, x: Tensor) -> Tensor:
        x = x + self.twice(x).tanh()
        return x + self.down(self.up(self.frozen(x)).tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.mT).mT
        x = self.segment(self.block, x)
        x = self.segment(self.block, x)
        mixed = (x @ self.experts[0]).tanh() @ self.experts[1].T
        return self.head(mixed + x)


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    return model, cases.build(name, model.parameters(), **options)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, -1).flatten())


def batches(count: int = STEPS, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, (size, 6), generator=generator) for _ in range(count)]


def train(model: nn.Module, optimizer: LowRankOptimizer, pieces: int = 1, data=None) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for batch in batches() if data is None else data:
        for piece in batch.chunk(pieces):
            (loss_of(model, piece) / pieces).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


class Still(torch.autograd.Function):
    """A linear map whose weight gets no gradient, as functions of one's own may decide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class Now(nn.Module):
    """Two maps, of which the second is :class:`Still` where it is told so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Linear(12, 12, bias=False).double() for _ in range(2))

    def forward(self, x: Tensor, still: bool) -> Tensor:
        x = self.one(x).tanh()
        return Still.apply(x, self.two.weight) if still else self.two(x)


def projectable(name: str) -> bool:
    optimizer = make(name)[1]
    if name in cases.WHOLE_LAYERS:
        return False
    return all(
        isinstance(optimizer.residual(group), Drop) and optimizer._strategies(group).gap > 1
        for group in optimizer.param_groups
    )


def tensors(optimizer: LowRankOptimizer) -> Iterator[Tensor]:
    for state in optimizer.state_dict()["state"].values():
        yield from state.values()


def assert_same(one: Any, two: Any, equal: Callable[[Tensor, Tensor], Any]) -> None:
    """Parameters and the whole state of two runs."""
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        equal(a, b)
    kept = [list(tensors(x[1])) for x in (one, two)]
    for a, b in zip(*kept, strict=True):
        equal(a, b)


def bitwise(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)
