"""Which devices a host may ask for a value."""

from __future__ import annotations

from torch import Tensor

HOSTS = frozenset({"cpu"})
"""Device types whose tensors a host reads at once: no queue has to run dry before."""


def on_accelerator(tensor: Tensor) -> bool:
    """Whether branching on a value of this tensor would stall its device."""
    return tensor.device.type not in HOSTS
