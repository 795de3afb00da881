"""What training holds, measured: real steps of a model, and what an allocator counts meanwhile."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_optim.backward.attach import attach_in_backward
from lowrank_optim.memory.activations import checkpoint_layers
from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.inputs import batch_of, innermost
from lowrank_optim.memory.losses import LOSSES, Loss, loss_by
from lowrank_optim.optimizer import LowRankOptimizer

STEPS = 3
"""The first makes the state and every basis; two more run beside them."""

REAL = {"adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes")}
"""Layouts: module and name of the optimizer that has each, and the package to install."""


class Peak(NamedTuple):
    """Bytes at the worst moment."""

    allocated: int
    """Of tensors alive at once, beyond those at the start."""
    reserved: int
    """What the allocator took from the device: with what it could not put to use."""


Meter = Callable[[Callable[[], object]], Peak]
"""Does some work, and says what it held."""


def on_gpu(device: torch.device) -> Meter:
    """The meter of a GPU: the counters of torch's caching allocator."""

    def metered(work: Callable[[], object]) -> Peak:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device) - before
        return Peak(allocated, torch.cuda.max_memory_reserved(device))

    return metered


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def capped(device: torch.device, cap: int) -> Iterator[None]:
    """Let torch's allocator have ``cap`` bytes of a GPU, and not more."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    whole = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def real(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """The class itself; of a layout, the optimizer that has it.

    Raises:
        ImportError: its package is not installed.
    """
    if not isinstance(optimizer, str):
        return optimizer
    module, name, package = REAL[optimizer]
    try:
        found: type[Optimizer] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{optimizer} is measured with {package}: pip install {package}"
        ) from error
    return found


def train(
    model: nn.Module,
    optimizer: type[Optimizer] | str,
    *,
    shape: tuple[int, int],
    in_backward: Literal["project", "step"] | None = None,
    accumulation_steps: int = 1,
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    checkpointing: bool = False,
    loss: Loss = LOSSES[0],
    loss_chunk: int | None = None,
    autocast: Autocast | None = None,
    steps: int = STEPS,
    **options: Any,
) -> None:
    """Some steps as :func:`lowrank_optim.memory.estimate` describes them.

    Args:
        model: one of ``transformers``, or what wraps one, on the device where it is to train.
        optimizer: a class, or the name of a layout.
        shape: of a micro-batch: ``(sequences, length)``.
        in_backward: the mode of :func:`lowrank_optim.attach_in_backward`, if there is one.
        accumulation_steps: micro-batches of a step.
        coords_dtype: as of :func:`lowrank_optim.attach_in_backward`.
        checkpointing: whether its layers are checkpointed.
        loss: the model's own, or ``"chunked"``.
        loss_chunk: tokens of which ``"chunked"`` has logits at once (default: 1,024).
        autocast: the dtype of ``torch.autocast``, if there is one; of the model's own loss.
        steps: how many (default: 3).
        **options: arguments of the optimizer.

    Raises:
        ImportError: the package of the optimizer is not installed.
        NotImplementedError: the model has no such loss.
        ValueError: the model is none of ``transformers``, or takes other inputs.
    """
    cls = real(optimizer)
    model.train()
    if checkpointing:
        checkpoint_layers(innermost(model))
    low_rank = issubclass(cls, LowRankOptimizer)
    given: Any = model.named_parameters() if low_rank else model.parameters()
    made: Any = cls(given, **options)
    if in_backward is not None:
        attach_in_backward(
            made, in_backward, accumulation_steps=accumulation_steps, coords_dtype=coords_dtype
        )
    device = next(model.parameters()).device
    with torch.device(device):
        batch = batch_of(model, shape)
    half = None if autocast is None else getattr(torch, autocast)
    for _ in range(steps):
        for _ in range(accumulation_steps):
            with torch.autocast(device.type, half, enabled=half is not None):
                value = loss_by(loss, model, batch, loss_chunk) / accumulation_steps
            value.backward()  # type: ignore[no-untyped-call]
            del value
        made.step()
        made.zero_grad()
