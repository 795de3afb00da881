"""Which devices a host may ask for a value."""

from __future__ import annotations

import torch
from torch import Tensor

HOSTS = frozenset({"cpu"})
"""Device types whose tensors a host reads at once: no queue has to run dry before."""


def on_accelerator(tensor: Tensor) -> bool:
    """Whether branching on a value of this tensor would stall its device."""
    return tensor.device.type not in HOSTS


def recording() -> bool:
    """Whether a CUDA graph is being captured: kernels are recorded, and none runs."""
    return _capturing()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
