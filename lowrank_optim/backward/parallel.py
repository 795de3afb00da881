"""Who else writes gradients: data parallelism that averages them after backward's hooks."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

MESSAGE = (
    "attach_in_backward cannot work with DistributedDataParallel, which averages gradients over "
    "the ranks only after the hooks that project or step them, and keeps all of them: train the "
    "module itself, and average in hooks of your own (see attach_in_backward)"
)


def in_ddp(params: Iterable[Tensor]) -> bool:
    """Whether any of these is a parameter that ``DistributedDataParallel`` averages.

    It leaves no trace on a parameter, so all objects are asked; milliseconds, where ranks exist.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    wanted = {id(p) for p in params}
    for x in gc.get_objects():
        # not isinstance, which a proxy may answer by importing what it stands for
        if issubclass(type(x), DistributedDataParallel):
            ignored = getattr(x, "parameters_to_ignore", ())
            if any(id(p) in wanted for n, p in x.module.named_parameters() if n not in ignored):
                return True
    return False
