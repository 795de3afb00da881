"""Which backend serves an op: chosen by device, dtype and availability, or forced."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from lowrank_optim.ops import bitsandbytes, native, reference, triton

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "reference": reference,
    "bitsandbytes": bitsandbytes,
}
ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
"""Backends of a device, best first; a device not named has the reference only.

bitsandbytes is in none: it serves where it is asked for.
"""
VARIABLE = "LOWRANK_OPTIM_BACKEND"


def available(backend: str, device_type: str) -> tuple[bool, str]:
    """Whether a backend can run on a device, and why or why not."""
    if backend == "reference":
        return True, "plain torch"
    return BACKENDS[backend].available(device_type)  # type: ignore[no-any-return]


@functools.cache
def _choose(forced: str | None, device_type: str, wide: bool) -> ModuleType:
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"{VARIABLE} must be one of {[*BACKENDS]}, got {forced!r}")
        ready, reason = available(forced, device_type)
        if wide and forced != "reference":
            ready, reason = False, "float64 is served by the reference alone"
        if not ready:
            raise RuntimeError(f"{VARIABLE}={forced} cannot run on {device_type}: {reason}")
        return BACKENDS[forced]
    for name in () if wide else ORDER.get(device_type, ()):
        if available(name, device_type)[0]:
            return BACKENDS[name]
    return reference


def backend(like: torch.Tensor) -> ModuleType:
    """The module whose functions serve ops on tensors like this one.

    Raises:
        RuntimeError: a backend was forced that cannot run here; there is no silent fall-back.
    """
    wide = like.dtype == torch.float64
    return _choose(os.environ.get(VARIABLE), like.device.type, wide)
