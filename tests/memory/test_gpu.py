"""What an allocator takes for weights, state and pinned moments, by its own counters."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.memory import estimate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def unlike() -> nn.Module:
    """Weights of sizes that are multiples of nothing; the first has the rest of its segment."""
    return nn.Sequential(nn.Embedding(50257, 384), nn.Linear(384, 901), nn.LayerNorm(901))


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_weights_and_state_take_what_is_estimated(cls: Any) -> None:
    """Weights to the byte; with state too, but for the rests that large moments may have."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = unlike().cuda()
    found = estimate(model, cls, rank=7, transients=False)
    none = estimate(model, torch.optim.SGD, transients=False)
    assert torch.cuda.memory_allocated() - before == none.held
    optimizer = cls(model.parameters(), rank=7)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    large = sum(x.nbytes > 2**20 for s in optimizer.state.values() for x in s.values())
    over = torch.cuda.memory_allocated() - before - found.held
    assert 0 <= over <= large * 2**20 + 2**16  # the tables of 8-bit codes are the package's


def pinned() -> int:
    """Bytes of pinned memory in use, without garbage and what copies that are done have held."""
    gc.collect()
    torch.cuda.synchronize()
    torch.empty(1, pin_memory=True)  # the allocator asks whether copies are done when it is asked
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


@pytest.mark.skipif(not hasattr(torch.cuda, "host_memory_stats"), reason="no such counters")
def test_moments_take_of_the_host_what_is_estimated() -> None:
    """Each a power of two of pinned memory."""
    model = unlike().cuda()
    found = estimate(model, GaLoreAdamW, rank=7, state_device="cpu", transients=False)
    before = pinned()
    optimizer = GaLoreAdamW(model.parameters(), rank=7, state_device="cpu")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    taken = pinned() - before
    assert found.pinned <= taken <= 1.01 * found.pinned  # what goes over on its way is small
