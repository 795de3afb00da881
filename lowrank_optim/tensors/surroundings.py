"""What the code around a step has set for its own operations, and a step must not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without ``torch.autocast`` of any device, and with the host as default device.

    A loop may be all under autocast. ``torch.optim`` has no product that it could cast; here
    coordinates, updates and bases are products, which it would round to 8 bits of mantissa.
    Counters and draws are made on the default device, where a generator of the host draws nothing
    if that is another one.
    """
    elsewhere = torch._C._len_torch_function_stack() > 0  # to ask for the device takes 50 us
    with torch._C._DisableAutocast(), torch.device("cpu") if elsewhere else nullcontext():
        yield
