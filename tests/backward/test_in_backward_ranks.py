"""``attach_in_backward`` beside averages of one's own: refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, attach_in_backward
from lowrank_optim.backward import handle
from tests import runs
from tests.compare import assert_close
from tests.sharded.ranks import Ranks, World

STEPS = 7
PIECES = 2
REFUSED = {
    f"{mode}, {order}": (mode, order)
    for mode in ("project", "step")
    for order in ("attached first", "wrapped first")
}


def make() -> tuple[nn.Module, LowRankOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))
    return model, GaLoreAdamW(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)


def batch(step: int, piece: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * piece + rank)
    return torch.randn(4, 12, generator=generator)


def backward(model: nn.Module, step: int, piece: int, rank: int) -> None:
    (model(batch(step, piece, rank)).square().mean() / PIECES).backward()


def average(x: Tensor) -> None:
    dist.all_reduce(x)
    x /= dist.get_world_size()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def ddp(rank: int) -> list[Tensor]:
    """What is to be reproduced: whole gradients of two micro-batches, averaged, then a step."""
    model, optimizer = make()
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        with wrapped.no_sync():
            backward(wrapped, step, 0, rank)
        backward(wrapped, step, 1, rank)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def stepping(rank: int) -> list[Tensor]:
    """A hook of one's own, before that of ``attach_in_backward``."""
    model, optimizer = make()

    def hook(p: Tensor) -> None:
        average(p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    attach_in_backward(optimizer, "step", accumulation_steps=PIECES)
    for step in range(STEPS):
        for piece in range(PIECES):
            backward(model, step, piece, rank)
        optimizer.step()
    return weights(model)


def projecting(rank: int) -> list[Tensor]:
    """Averages of one's own: of coordinates, and of whole gradients where a basis is due."""
    model, optimizer = make()
    attach_in_backward(optimizer, "project", first_basis="boundary")
    whole = 0
    for step in range(STEPS):
        for piece in range(PIECES):
            backward(model, step, piece, rank)
        for p in model.parameters():
            for x in getattr(p.grad, "coords", {"": p.grad}).values():
                whole += x.numel()
                average(x)
        optimizer.step()
        optimizer.zero_grad()
    assert whole < STEPS * sum(p.numel() for p in model.parameters())
    return weights(model)


def refused(rank: int, mode: Any, order: str) -> list[Tensor]:
    """The first backward raises on every rank, and nothing has changed."""
    model, optimizer = make()
    start = weights(model)
    if order == "attached first":
        attach_in_backward(optimizer, mode)
    wrapped = DistributedDataParallel(model)
    if order == "wrapped first":
        attach_in_backward(optimizer, mode)
    with pytest.raises(RuntimeError, match=r"process_group=.*ddp_comm_hook\(optimizer\)"):
        backward(wrapped, 0, 0, rank)
    runs.assert_same(model.parameters(), start)
    assert not optimizer.state
    return start


def unseen(rank: int) -> list[Tensor]:
    """If it is not found beforehand: the gradient that it writes again is an error at the step."""
    model, optimizer = make()
    attach_in_backward(optimizer, "step")
    wrapped = DistributedDataParallel(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handle, "in_ddp", lambda params: False)
        backward(wrapped, 0, 0, rank)
        with pytest.raises(RuntimeError, match="a gradient is back after its step"):
            optimizer.step()
    return []


def other(rank: int) -> list[Tensor]:
    """A wrapped model beside it, and parameters that the wrapper ignores, are nobody's business."""
    model, optimizer = make()
    beside = DistributedDataParallel(make()[0])
    names = [name for name, _ in model.named_parameters()]
    holder = nn.Sequential(model, nn.Linear(12, 12))
    ignore = [f"0.{name}" for name in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(holder, ignore)
    wrapped = DistributedDataParallel(holder)
    attach_in_backward(optimizer, "step")
    backward(beside, 0, 0, rank)
    backward(wrapped, 0, 0, 0)
    optimizer.step()
    return weights(model)


def work(world: World) -> dict[str, list[Tensor]]:
    done = {f.__name__: f(world.rank) for f in (ddp, stepping, projecting, unseen, other)}
    return done | {name: refused(world.rank, *case) for name, case in REFUSED.items()}


@pytest.fixture(scope="module")
def ended(ranks: Callable[[int], Ranks]) -> list[dict[str, list[Tensor]]]:
    """What two processes ended with; an assertion that fails in one of them fails here."""
    return ranks(2).run("in backward", work).checked()


@pytest.mark.parametrize("how", ["ddp", "stepping", "projecting", "other"])
def test_ranks_hold_the_same_bits(how: str, ended: Any) -> None:
    runs.assert_same(ended[0][how], ended[1][how])


@pytest.mark.parametrize("how", ["stepping", "projecting"])
def test_without_the_wrapper_it_is_what_the_wrapper_does(how: str, ended: Any) -> None:
    for a, b in zip(ended[0][how], ended[0]["ddp"], strict=True):
        assert_close(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(make()[0].parameters(), ended[0][how], strict=True)
    )


@pytest.mark.parametrize("case", REFUSED)
def test_the_wrapper_is_refused_at_the_first_backward(case: str, ended: Any) -> None:
    """Asserted where it happens; here, that the weights are those of the start."""
    for held in ended:
        runs.assert_same(held[case], weights(make()[0]))


def test_a_gradient_written_again_in_one_process() -> None:
    """What the wrapper does to a parameter, whoever does it."""
    model, optimizer = make()
    attach_in_backward(optimizer, "step")
    model(batch(0, 0, 0)).square().mean().backward()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match="a gradient is back after its step"):
        optimizer.step()
