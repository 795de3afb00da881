"""What the server of worlds imports once, so that none of its processes does."""

import atexit
import os

import torch._dynamo
import torch._inductor.utils
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel

import tests.sharded.ranks
import tests.sharded.training  # noqa: F401

# as it ends, Triton's bindings list the objects that its caches still hold
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
