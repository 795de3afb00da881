"""What the allocator of a GPU takes for tensors, against a model of it made from its description.

The notes of ``CUDACachingAllocator`` say: sizes are rounded up to 512 bytes. Those of up to 1 MiB
are packed into segments of 2 MiB, others below 10 MiB into segments of 20 MiB, and larger ones get
a segment of their own, rounded up to 2 MiB. The smallest free block that is large enough is taken,
and split where what is left is 512 bytes (small) or more than 1 MiB (large).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.memory import estimate
from lowrank_optim.memory.blocks import in_blocks, of_a_new_segment, sized_on

MIB = 2**20


class Allocator:
    """Blocks of segments that are never given back; what is freed is not merged."""

    def __init__(self) -> None:
        self.free: dict[bool, list[int]] = {True: [], False: []}
        self.allocated = self.reserved = 0

    def take(self, size: int) -> int:
        """Bytes of the block."""
        if size == 0:
            return 0
        size = -(-size // 512) * 512
        small = size <= MIB
        fitting = [block for block in self.free[small] if block >= size]
        if fitting:
            block = min(fitting)
            self.free[small].remove(block)
        else:
            block = (
                2 * MIB
                if small
                else 20 * MIB
                if size < 10 * MIB
                else -(-size // MIB // 2) * 2 * MIB
            )
            self.reserved += block
        rest = block - size
        if rest >= 512 if small else rest > MIB:
            self.free[small].append(rest)
            block = size
        self.allocated += block
        return block


def all_of(sizes: list[int]) -> Allocator:
    allocator = Allocator()
    for size in sizes:
        allocator.take(size)
    return allocator


EDGES = [
    0, 1, 511, 512, 513, MIB - 512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1,
    11 * MIB - 512, 11 * MIB, 11 * MIB + 512, 12 * MIB, 21 * MIB + 1, 77_194_752, 22_364_160,
]  # fmt: skip


@pytest.mark.parametrize("size", EDGES)
def test_a_block_of_a_new_segment(size: int) -> None:
    assert of_a_new_segment(size) == Allocator().take(size)
    assert sized_on("cuda")(size) == sized_on("meta")(size) == in_blocks(size)
    assert sized_on("cpu")(size) == size
    assert 0 <= of_a_new_segment(size) - in_blocks(size) <= MIB


def test_of_many_a_rest_of_a_segment_is_all_that_differs() -> None:
    """Small ones are exact; of weights, what goes with a block of a segment of 20 MiB is not."""
    draw = random.Random(0)
    small = [draw.randrange(1, MIB + 1) for _ in range(300)]
    assert all_of(small).allocated == sum(map(in_blocks, small))
    sizes = [draw.randrange(1, 40 * MIB) for _ in range(300)] + small
    found = all_of(sizes).allocated
    shared = all_of([x for x in sizes if MIB < x < 10 * MIB])
    assert 0 <= found - sum(map(of_a_new_segment, sizes)) <= shared.reserved // 20
    assert 0 <= found - sum(map(in_blocks, sizes)) <= MIB * sum(x > MIB for x in sizes)


def test_weights_have_the_rest_of_their_segments() -> None:
    """Of GPT-2's embedding 0.38 MiB; its state and gradient come from memory that is there."""
    weight = nn.Embedding(50257, 768, device="meta", dtype=torch.bfloat16)
    found = estimate(weight, torch.optim.SGD, momentum=0.9, transients=False)
    assert found.held == Allocator().take(50257 * 768 * 2) + in_blocks(found.state)
    assert found.gradients == in_blocks(50257 * 768 * 2)


def held(model: nn.Module, optimizer: Any) -> list[int]:
    """Bytes of what a real optimizer leaves on the device of its model, one by one."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    entries = [x for state in optimizer.state.values() for x in state.values()]
    counters = [x for x in entries if x.dim() == 0]  # in host memory on a GPU too
    assert all(x.numel() == 1 for x in counters)
    return [p.nbytes for p in model.parameters()] + [x.nbytes for x in entries if x.dim()]


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, torch.optim.AdamW])
def test_weights_and_state_are_what_the_allocator_takes(cls: Any) -> None:
    """Tensor by tensor, of sizes that are no multiple of anything; on a CPU nothing is added."""
    model = nn.Sequential(nn.Linear(333, 601), nn.LayerNorm(601), nn.Linear(601, 77))
    own: Any = {"transients": False, **({"rank": 7} if cls is not torch.optim.AdamW else {})}
    there = estimate(model, cls, device="cuda", **own)
    here = estimate(model, cls, device="cpu", **own)
    optimizer = cls(model.parameters(), **({"rank": 7} if "rank" in own else {}))
    assert there.held == all_of(held(model, optimizer)).allocated
    assert (there.weights, there.state, there.rounding > 0) == (here.weights, here.state, True)
    assert here.rounding == 0 and here.held == here.weights + here.state
    gradients = all_of([p.nbytes for p in model.parameters()])
    assert there.peak - there.held == there.gradients == gradients.allocated


def test_small_tensors_of_activations_count_as_blocks() -> None:
    """Of a model so small that nearly all of them are smaller than one."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    there, here = (
        estimate(config, GaLoreAdamW, rank=4, tokens=5, device=device) for device in ("cuda", "cpu")
    )
    assert there.activations > 2 * here.activations
    assert there.peak % 512 == 0 != here.peak % 512


def test_coordinates_and_staging_count_as_blocks() -> None:
    model = nn.Sequential(nn.Linear(100, 130, bias=False), nn.Linear(130, 100, bias=False))
    own: Any = {"rank": 3, "device": "cuda", "update_proj_gap": 10, "transients": False}
    found = estimate(model, GaLoreAdamW, in_backward="project", **own)
    coords, whole = in_blocks(3 * 130 * 4), in_blocks(100 * 130 * 4)
    assert found.live_gradients == coords + 2 * whole  # one whose basis is due, and one in flight
    hosted = estimate(model, GaLoreAdamW, state_device="cpu", **own)
    bases = 2 * in_blocks(100 * 3 * 4)
    assert hosted.held == 2 * whole + bases + 2 * in_blocks(hosted.staging // 2)
