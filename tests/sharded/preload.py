"""What the server of worlds imports once, so that none of its processes does."""

from __future__ import annotations

import atexit
import importlib
import os

LATER = (
    "torch._dynamo",
    "torch._inductor.utils",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "tests.sharded.ranks",
    "tests.sharded.training",
)
"""With what torch imports when a weight is first sharded."""

for name in LATER:
    importlib.import_module(name)

# as it ends, Triton's bindings list the objects that its caches still hold
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
