"""What the server of worlds imports once, so that none of its processes does."""

from __future__ import annotations

import atexit
import gc
import importlib
import os

import torch

LATER = (
    "pytest",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.utils",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.experimental",
    "torch.nn.parallel",
    "tests.sharded.ranks",
    "tests.sharded.training",
)
"""With what torch imports when a weight is first sharded."""

for name in LATER:
    importlib.import_module(name)

for name in ("record_event", "wait_event"):
    # all that FSDP2 of torch 2.6 misses on a CPU: later ones have them, and they do nothing
    if not hasattr(torch.cpu.Stream, name):
        setattr(torch.cpu.Stream, name, lambda *_: None)

# as it ends, Triton's bindings list the objects that its caches still hold
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))

# some hundred thousand objects stay in every process: no collection walks them, nor writes beside
# them what makes a page a process's own
gc.collect()
gc.freeze()
