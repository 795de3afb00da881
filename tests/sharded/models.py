"""Small awkward models, and batches that every rank takes another part of.

Every layer has a batch of its own, of more samples than any dimension, so that every gradient has
full rank: of one that has not, the sign of what a subspace leaves is rounding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

SAMPLES = 48
"""Of one step: a multiple of every number of ranks, more than any dimension."""

SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (5, 12),
    "tall": (13, 6),  # 13 rows: no number of ranks divides them
    "square": (8, 8),
    "few": (2, 9),  # empty shards from 3 ranks on
    "narrow": (9, 2),  # the same on the other side
    "large": (16, 12),  # rows > columns, and both divided by 2 and 4
    "experts": (3, 5, 7),
    "experts pair": (2, 8, 4),  # fewer experts than ranks
    "conv": (6, 3, 2, 2),
}
"""Of all weights that a step may project."""

BLOCKS: dict[str, tuple[int, ...]] = {
    "four blocks": (34, 1024),  # 2 and 4 ranks share whole blocks of 256
    "some blocks": (40, 700),  # the last is not full, and edges of shards are within blocks
    "a few more": (600, 36),  # by rows of the weight, the canonical columns
    "no block": (60, 240),  # narrower than one
    "small": (8, 300),  # moments of too few entries
    "experts blocks": (3, 24, 520),
    "more experts": (8, 24, 520),  # as many columns in all as means in 8 bits have at least
    "two sides": (70, 300),  # coordinates (66, 66) are enough entries
    "long": (6, 4196),  # as many columns as means in 8 bits have at least
    "odd": (48, 333),  # a row of 4 bits ends within a byte
    "odd row": (121, 123),  # and within its only block
    "table": (37, 260),
    "vector": (5000,),
    "six blocks": (34, 1536),  # 2 and 3 ranks share whole blocks of 256
}
"""Whose moments have blocks: only where they are asked for."""
EVERY = {**SHAPES, **BLOCKS}


class Layer(nn.Module):
    """One weight of any shape, and a bias; its loss is that of a batch of its own."""

    def __init__(self, shape: tuple[int, ...], place: int, bias: bool = True) -> None:
        super().__init__()
        self.shape, self.place = shape, place
        self.weight = nn.Parameter(0.5 * torch.randn(shape))
        self.bias = nn.Parameter(0.1 * torch.randn(shape[-2 if len(shape) == 3 else 0]))
        if not bias:
            self.bias = None

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        inputs = self.shape[1:] if len(self.shape) != 3 else self.shape[::2]
        if len(self.shape) == 4:
            inputs = (inputs[0], inputs[1] + 1, inputs[2])
        x = part(inputs, step, self.place, rank, size)
        if isinstance(self.weight, DTensor):  # of tensor parallel, whose ranks have one batch
            mesh = self.weight.device_mesh
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            y = F.linear(x, self.weight, self.bias).full_tensor()
        elif len(self.shape) == 2:
            y = F.linear(x, self.weight, self.bias)
        elif len(self.shape) == 3:
            y = torch.einsum("bei,eoi->beo", x, self.weight)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.conv2d(x, self.weight, self.bias)
        return (y.tanh() - part(y.shape[1:], step, 100 + self.place, rank, size)).square().mean()


class Table(nn.Module):
    """An embedding and the norm behind it: what no optimizer here projects."""

    def __init__(self, rows: int, width: int, place: int) -> None:
        super().__init__()
        self.place = place
        self.embed = nn.Embedding(rows, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(77 * step)
        tokens = torch.randint(self.embed.num_embeddings, (SAMPLES,), generator=generator)
        y = self.norm(self.embed(tokens[rank::size]))
        return (y.tanh() - part(y.shape[1:], step, 100 + self.place, rank, size)).square().mean()


class Block(nn.Module):
    """What is sharded together."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        return sum((layer(step, rank, size) for layer in self.children()), torch.zeros(()))


class Model(nn.Module):
    """Blocks, and layers of the root."""

    def __init__(self, blocks: list[dict[str, nn.Module]], own: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layers) for layers in blocks)
        self.own = Block(own)

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        return sum((block(step, rank, size) for block in self.blocks), self.own(step, rank, size))


def part(shape: Any, step: int, place: int, rank: int, size: int) -> Tensor:
    """The samples of a rank: another part of the same batch for any number of ranks."""
    return _batch(tuple(shape), step, place)[rank::size]


@functools.lru_cache(4096)
def _batch(shape: tuple[int, ...], step: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + place)
    return torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)


def awkward(only: tuple[str, ...] = ()) -> Model:
    """The same weights at every call: all shapes, or ``only`` some and nothing beside them."""
    before = torch.get_rng_state()
    torch.manual_seed(11)
    names = list(SHAPES)
    every = list(EVERY)
    layers: dict[str, nn.Module] = {
        name.replace(" ", "_"): Layer(EVERY[name], every.index(name), bias=not only)
        for name in only or names
    }
    halves = [dict(list(layers.items())[i::2]) for i in range(2)]
    if not only:
        halves[0]["table"] = Table(7, 5, 50)
    own: dict[str, nn.Module] = {"root": Layer((7, 10), 60)} if not only else {}
    model = Model([half for half in halves if half], own).double()
    torch.set_rng_state(before)
    return model


def by_columns(size: int) -> Callable[[nn.Parameter], Any]:
    """FSDP2's ``shard_placement_fn``: columns wherever it can split them evenly."""

    def place(param: nn.Parameter) -> Any:
        pieces = size
        if isinstance(param, DTensor) and param.placements[0].is_shard(1):
            pieces *= param.device_mesh.size()
        even = param.dim() in (2, 4) and param.numel() and param.shape[1] % pieces == 0
        return Shard(1) if even else None

    return place


TAKES_WHOLE_NUMBERS = torch.__version__ >= "2.13"
"""Whether FSDP2 shards parameters of whole numbers: that of 2.11 does not."""
shards_whole_numbers = pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters,
    reason="FSDP2 of torch 2.6 takes no parameters of whole numbers, and cannot leave them out",
)
"""Of layers that have some."""


def left_out(model: nn.Module, always: bool = False) -> dict[str, Any]:
    """Options by which ``fully_shard`` leaves whole numbers as they are, where it must."""
    whole = {x for x in model.parameters() if not x.is_floating_point()}
    return {"ignored_params": whole} if whole and (always or not TAKES_WHOLE_NUMBERS) else {}


def here(x: Tensor, mesh: DeviceMesh, places: Sequence[Any]) -> DTensor:
    """What every rank has, in other placements: none need send any, but by torch 2.6.

    That leaves the padding of uneven columns in memory, which its own FSDP2 does not take.
    """
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(x, mesh, places, src_data_rank=None)
    own = distribute_tensor(x, mesh, places).to_local().contiguous()
    args = {"run_check": False, "shape": x.shape, "stride": x.stride()}
    return DTensor.from_local(own, mesh, places, **args)


def _cuts_unevenly() -> bool:
    try:
        _StridedShard(0, split_factor=2)._split_tensor(torch.empty(5), 2)
    except AssertionError:  # "only allows even sharding"
        return False
    return True


CUTS_UNEVENLY = _cuts_unevenly()
"""Whether FSDP2 splits rows that tensor parallel has split, of any number: that of torch 2.6 takes
those alone that all ranks divide."""


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    """Matrices split by rows and by columns in turn, as tensor parallel splits them."""
    layers = [x for x in model.modules() if isinstance(x, Layer) and len(x.shape) == 2]
    for i, layer in enumerate(layers):
        rows = CUTS_UNEVENLY or layer.shape[0] % dist.get_world_size() == 0
        for name, param in list(layer.named_parameters()):
            split = [Shard(i % 2 if rows else 1)] if name == "weight" else [Replicate()]
            x = here(param.detach(), mesh, split)
            layer.register_parameter(name, nn.Parameter(x))
