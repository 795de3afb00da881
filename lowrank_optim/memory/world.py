"""One of several GPUs among which FSDP2 shards a model, without the others.

A process group that sends nothing stands for them, so that ``fully_shard`` itself says what this
rank has, what it gathers and what it frees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowrank_optim import nn as layers
from lowrank_optim.groups.layers import LAYERS
from lowrank_optim.memory.activations import without_memory
from lowrank_optim.memory.layouts import AdamW8bitLayout
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded

Shard = Callable[[nn.Module, Any], object]
"""Shards a model in place, over a mesh."""


@dataclass(frozen=True, eq=False)
class World:
    """The ranks of which this is one."""

    size: int
    mesh: Any
    shard: Shard

    def sharded(self, model: nn.Module) -> nn.Module:
        """The model, once its parameters are shards.

        Raises:
            ValueError: FSDP2 does not take it, or the function that was given shards nothing.
        """
        with refusals_of_fsdp(model):
            self.shard(model, self.mesh)
        left = [name for name, p in model.named_parameters() if not is_sharded(p)]
        if left:
            raise ValueError(
                f"shard must shard every parameter over the mesh that it is given: {left[0]} and "
                f"{len(left) - 1} others are plain. Call fully_shard on the model itself last"
            )
        return model

    def on_meta(self, model: nn.Module) -> nn.Module:
        """A copy on the meta device, sharded."""
        return self.sharded(without_memory(model, "world_size", "meta"))


@contextmanager
def refusals_of_fsdp(model: nn.Module) -> Iterator[None]:
    """What FSDP2 says of a model that it does not take, as an error about the arguments.

    Raises:
        ValueError: it has said so.
    """
    try:
        yield
    except AssertionError as error:
        raise ValueError(
            f"world_size of a {type(model).__name__}: fully_shard does not take it ({error}). Give "
            "shard, a function of the model and a mesh that calls fully_shard as your script does"
        ) from error


def by_layers(model: nn.Module, mesh: Any) -> None:
    """``fully_shard`` of each layer, by its name, and of the model."""
    from torch.distributed.fsdp import fully_shard

    found = (re.search(LAYERS, name) for name, _ in model.named_parameters())
    names = [x.string[: x.end()].rstrip(".") for x in found if x is not None]
    for name in dict.fromkeys(names):
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_world(
    model: Any, optimizer_class: type, world_size: Any, shard: Any, in_backward: Any
) -> None:
    """Raise for a number of ranks, or what goes with it, that cannot be.

    Raises:
        ValueError: it is no number of ranks, the model is sharded, or something has no effect.
        TypeError: ``shard`` is no function.
        NotImplementedError: an argument beside it is not known of several ranks.
        RuntimeError: torch has no process groups, or none for what has no data, or this process is
            in one.
    """
    if world_size is None:
        if shard is not None:
            raise ValueError(f"shard={shard!r} has no effect without world_size, a number of ranks")
        return
    if not (isinstance(world_size, int) and not isinstance(world_size, bool) and world_size >= 1):
        raise ValueError(f"world_size must be a number of ranks, 1 or more, got {world_size!r}")
    if shard is not None and not callable(shard):
        raise TypeError(f"shard must be a function of a model and a mesh, got {shard!r}")
    if isinstance(model, nn.Module) and any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"world_size={world_size} of a model of DTensors: it is sharded already, and figures "
            "without world_size are those of this rank. Leave it out, or give the model as it was "
            "before fully_shard"
        )
    if issubclass(optimizer_class, AdamW8bitLayout):
        raise NotImplementedError(
            f"world_size={world_size} of 'adamw-8bit': bitsandbytes does not step the DTensors of "
            "FSDP2. Take GaLoreAdamW8bit or another 8-bit class of this package"
        )
    factors = sorted(_layers_of_factors(model))
    if factors:
        raise NotImplementedError(
            f"world_size={world_size} of a model with layers of factors ({', '.join(factors)}): "
            "what ranks gather of them is not known without a run. Give the model before it is "
            "converted, with SwitchLoRAAdamW, or SSTAdamW with factors='active'"
        )
    if in_backward is not None and not issubclass(optimizer_class, LowRankOptimizer):
        raise NotImplementedError(
            f"in_backward={in_backward!r} with world_size of {optimizer_class.__name__}: what "
            "attach_in_backward does with shards it does for classes of this package. Leave "
            "in_backward out, or take one of them"
        )
    if not dist.is_available():
        raise RuntimeError("world_size needs a torch that is built with torch.distributed")
    if dist.is_initialized():
        raise RuntimeError(
            f"world_size={world_size}: this process is in a process group already, and an estimate "
            "makes one of its own that sends nothing. Call it before init_process_group, or in "
            "another process; of a model that is sharded already leave world_size out"
        )
    if not sends_without_data():
        raise RuntimeError(
            f"world_size={world_size}: torch {torch.__version__} has no collectives of tensors "
            "without data, which an estimate gives to FSDP2 in place of a model's. Take a newer "
            "torch, or leave world_size out for the figures of one GPU"
        )


def sends_without_data() -> bool:
    """Whether torch's collectives take tensors of the meta device: those of 2.6 do not."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta")


def _layers_of_factors(model: Any) -> set[str]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    kinds = {type(x) for x in modules}
    return {x.__name__ for x in kinds if x.__module__.startswith(f"{layers.__name__}.")}


@contextmanager
def pretended(size: int, shard: Shard | None = None, rank: int = 0) -> Iterator[World]:
    """A world of ``size`` ranks of which the others do not exist.

    Args:
        size: how many there are.
        shard: shards a model (default: :func:`by_layers`).
        rank: this one (default: the first, which has most of whatever is shared unevenly).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        # a name of its own: DTensor keeps what it found of a mesh, and takes another rank's for it
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(f"rank {rank} without others",))
        yield World(size, mesh, shard or by_layers)
    finally:
        dist.destroy_process_group()
