"""What each of several processes holds in real training steps under FSDP2; jobs of a world."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LlamaConfig

from lowrank_optim import attach_in_backward, memory, methods
from lowrank_optim.distributed import shard_placement_fn
from lowrank_optim.memory.activations import _as_on_a_gpu, checkpoint_layers
from lowrank_optim.memory.inputs import batch_of, model_of
from lowrank_optim.memory.losses import loss_by
from lowrank_optim.ops import devices
from tests.memory.trained import Tracker
from tests.sharded.ranks import World

PATIENCE = 20.0
"""Seconds within which a thread of gloo lets go of what it sent."""
LETS_GO = 0.005
"""Seconds for the storage of a tensor that it has let go of."""
LLAMA = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 256}
LLAMA |= {"num_attention_heads": 2, "num_hidden_layers": 2}
TOKENS = (2, 32)


def config(**sizes: int) -> Any:
    return LlamaConfig(**(LLAMA | sizes))


def layers(model: nn.Module, mesh: DeviceMesh, **own: Any) -> None:
    """As users write it."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **own)
    fully_shard(model, mesh=mesh, **own)


def mixed(model: nn.Module, mesh: DeviceMesh) -> None:
    """Float32 weights, used in bfloat16; what is gathered stays until backward."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers(model, mesh, mp_policy=policy, reshard_after_forward=False)


def placed(model: nn.Module, mesh: DeviceMesh) -> None:
    """No projected side is split, where ranks divide the other."""
    layers(model, mesh, shard_placement_fn=shard_placement_fn(mesh.size()))


SHARDS = {None: layers, "mixed": mixed, "placed": placed}


def class_of(name: str) -> Any:
    return getattr(methods, name, None) or getattr(torch.optim, name)


def batch_for(model: nn.Module, tokens: tuple[int, int] = TOKENS) -> dict[str, torch.Tensor]:
    """Tokens that tell every matrix something: a refresh that finds nothing comes again."""
    shape = batch_of(model, tokens)
    return {key: torch.randint(LLAMA["vocab_size"] - 1, x.shape) for key, x in shape.items()}


@contextmanager
def as_accelerator() -> Iterator[None]:
    """The package takes the CPU for one."""
    before, devices.HOSTS = devices.HOSTS, frozenset()
    try:
        yield
    finally:
        devices.HOSTS = before


class OfMessages(Tracker):
    """One that counts no message that is done, nor what gloo makes while a rank waits for one.

    A thread of gloo lets go of a message's tensors some milliseconds after ``wait`` has returned,
    and the rank that goes on meanwhile has them beside what it makes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sent: list[Any] = []
        """Tensors of messages, weakly: Python's own, which do not go before their storages."""
        self._waits = False
        self._before: Any = None

    def __enter__(self) -> OfMessages:
        self._before = before = dist.Work.wait

        def wait(work: Any, *args: Any) -> Any:
            self._waits = True  # gloo works on some tensors then, and holds them
            try:
                return before(work, *args)
            finally:
                self._waits = False

        dist.Work.wait = wait
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        dist.Work.wait = self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits:  # what gloo makes to reduce and scatter by: other backends make none
            return func(*args, **(kwargs or {}))
        self.settle()
        if func.namespace == "c10d":  # of tensors that none but those who send them hold
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
            own = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            self._sent += [weakref.ref(x) for x in own]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def settle(self) -> None:
        """Wait until nobody holds what was sent.

        The thread frees a storage after the tensor that had it, and takes Python's lock for each:
        one that sees the tensor gone lets it go on.
        """
        if not self._sent:
            return
        end = time.monotonic() + PATIENCE
        while any(x() is not None for x in self._sent):
            if time.monotonic() > end:
                raise TimeoutError(f"what was sent is still held after {PATIENCE} seconds")
            time.sleep(0)
        time.sleep(LETS_GO)
        self._sent = []

    def piece(self, work: Callable[[], Any]) -> int:
        """Most bytes alive at once during ``work``."""
        self.settle()
        return super().piece(work)


def messages(world: World, count: int) -> int:
    """Most bytes alive while messages of 64 KiB come and go, one after the other."""

    def work() -> None:
        for _ in range(count):
            sent = torch.empty(2**14)
            arrived = torch.empty_like(sent)
            dist.all_to_all_single(arrived, sent)
            del sent, arrived

    tracker = OfMessages()
    with tracker:
        return tracker.piece(work)


def _made(shard: str | None, dtype: torch.dtype, sizes: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    model = model_of(config(**sizes), dtype).train()
    _as_on_a_gpu(model)
    return model


def held(world: World, run: dict[str, Any]) -> tuple[int, ...]:
    """Weights, gradients and the three parts of the state, by storage, after a step."""
    model = _made(run.get("shard"), torch.bfloat16, run["sizes"])
    SHARDS[run.get("shard")](model, init_device_mesh("cpu", (world.size,)))
    optimizer = class_of(run["name"])(model.named_parameters(), **run["options"])
    loss_by("transformers", model, batch_for(model)).backward()
    grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    weights = memory.storage_bytes(p.to_local() for p in model.parameters())
    return weights, memory.storage_bytes(grads), *memory.report(optimizer)


def peaks(world: World, run: dict[str, Any]) -> dict[str, int]:
    """Most bytes alive at once beside the weights, as torch's MemTracker counts real steps.

    Of forward and backward, of steps, and of steps that find bases: of four steps with a gap of
    three the first and the last do.
    """
    with as_accelerator():
        return _peaks(init_device_mesh("cpu", (world.size,)), **run)


def _peaks(
    mesh: DeviceMesh,
    name: str,
    options: dict[str, Any],
    shard: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sizes: dict[str, int] | None = None,
    checkpointing: bool = False,
    accumulation_steps: int = 1,
    mode: Any = None,
    tokens: tuple[int, int] = TOKENS,
) -> dict[str, int]:
    model = _made(shard, dtype, sizes or {})
    if checkpointing:
        checkpoint_layers(model)
    SHARDS[shard](model, mesh)
    batch = batch_for(model, tokens)
    optimizer = class_of(name)(model.named_parameters(), **options)
    if mode is not None:
        own = {"accumulation_steps": accumulation_steps} if mode == "step" else {}
        attach_in_backward(optimizer, mode, **own)
    tracker, most = OfMessages(), dict[str, int]()
    tracker.track_external(model, *batch.values(), optimizer)
    with tracker:
        before = tracker.now()

        def backward() -> None:
            loss_by("transformers", model, batch).backward()

        def step() -> None:
            if mode is None:
                clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        for n in range(4):
            for _ in range(accumulation_steps):
                found = tracker.piece(backward) - before
                most["backward"] = max(most.get("backward", 0), found)
            moment = "refresh" if n % 3 == 0 else "step"
            most[moment] = max(most.get(moment, 0), tracker.piece(step) - before)
            optimizer.zero_grad()
    return most
