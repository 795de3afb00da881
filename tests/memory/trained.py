"""What torch's MemTracker counts of whole training steps of tensors without memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, active_fake_mode
from torch.nn.utils import clip_grad_norm_

from lowrank_optim import attach_in_backward
from lowrank_optim.engine import tracing
from lowrank_optim.memory.activations import _as_on_a_gpu, checkpoint_layers
from lowrank_optim.memory.inputs import batch_of, model_of
from lowrank_optim.memory.losses import Loss, loss_by
from lowrank_optim.tensors.projected_grad import ProjectedGrad

CPU = torch.device("cpu")


class Tracker(MemTracker):
    """One that tells the peaks of pieces of a run apart."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ProjectedGrad in types:  # as of DTensor: the operations that it makes come here
            return NotImplemented
        entered = getattr(self, "_fake_mode_on_entry", None)
        if entered is not None:  # what a step draws by a generator is real, and as large
            self._fake_mode_on_entry = active_fake_mode()
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            if entered is not None:
                self._fake_mode_on_entry = entered

    def _track_module_params_and_buffers(self, module: nn.Module, **own: Any) -> Any:
        idle = [p for p in module.parameters() if not p.requires_grad]
        for p in idle:  # its turn may come, and a hook is for what requires a gradient
            p.requires_grad_(True)
        try:
            return super()._track_module_params_and_buffers(module, **own)
        finally:
            for p in idle:
                p.requires_grad_(False)

    def now(self) -> int:
        return self.get_tracker_snapshot("current")[CPU]["Total"]

    def piece(self, work: Callable[[], Any]) -> int:
        """Most bytes alive at once during ``work``."""
        gc.collect()  # cycles of the tracker's hooks keep what is over
        self.reset_mod_stats()
        self._peak_mem[CPU] = 0
        work()
        return self.get_tracker_snapshot("peak")[CPU]["Total"]


def tracked(
    config: Any,
    optimizer_class: Any,
    options: dict[str, Any],
    *,
    tokens: tuple[int, int],
    mode: Any = None,
    accumulation_steps: int = 1,
    checkpointing: bool = False,
    loss: Loss = "transformers",
    autocast: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 4,
) -> dict[str, int]:
    """Bytes beside the weights at the worst moment of backward and of steps, over a run.

    Everything runs: forward, loss, backward, clipping, the step; steps are told by whether they
    find bases, so that with the gap of three of four steps the second and third do not.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(config, dtype).train()
        _as_on_a_gpu(model)
        if checkpointing:
            checkpoint_layers(model)
        batch = batch_of(model, tokens)
        optimizer = optimizer_class(model.named_parameters(), **options)
        if mode is not None:
            attach_in_backward(optimizer, mode, accumulation_steps=accumulation_steps)
        tracker, most = Tracker(), dict[str, int]()
        tracker.track_external(model, *batch.values(), optimizer)
        with tracker:
            before = tracker.now()

            def backward() -> None:
                half = None if autocast is None else getattr(torch, autocast)
                with tracing.hosted():  # autograd adds to coordinates, outside of any step
                    with torch.autocast("cpu", half, enabled=half is not None):
                        found = loss_by(loss, model, batch)
                    found.backward()

            def step() -> None:
                if mode is None:
                    clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            for n in range(steps):
                for _ in range(accumulation_steps):
                    found = tracker.piece(backward) - before
                    most["backward"] = max(most.get("backward", 0), found)
                found = tracker.piece(step) - before
                name = "refresh" if n % 3 == 0 else "step"
                most[name] = max(most.get(name, 0), found)
                optimizer.zero_grad()
    return most
