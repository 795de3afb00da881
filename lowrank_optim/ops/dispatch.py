"""Which backend serves an op: chosen by device, dtype and availability, or forced."""

from __future__ import annotations

import functools
import os
import warnings
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


def serving(dtype: torch.dtype, device_type: str) -> ModuleType:
    """The module that serves ops on tensors of a dtype, on a type of device.

    Raises:
        RuntimeError: a backend was forced that cannot run there; there is no silent fall-back.
    """
    return _choose(os.environ.get(VARIABLE), device_type, dtype == torch.float64)


def backend(
    like: torch.Tensor, in_8bit: bool = False, factors_on_device: bool = False
) -> ModuleType:
    """The module whose functions serve ops on tensors like this one.

    Args:
        like: an argument of the op.
        in_8bit: whether it reads or writes 8-bit codes, which plain torch is slow at.
        factors_on_device: whether step sizes, decays or gains are tensors. Native kernels take
            numbers of the host, so that the reference serves in their place.

    Raises:
        RuntimeError: a backend was forced that cannot run here; there is no silent fall-back.
    """
    device_type = like.device.type
    chosen = serving(like.dtype, device_type)
    if factors_on_device and chosen is native:
        return reference
    slow = in_8bit and chosen is reference and device_type in ORDER
    if slow and not os.environ.get(VARIABLE) and like.dtype != torch.float64:
        _warn_slow(device_type)
    return chosen


@functools.cache
def _warn_slow(device_type: str) -> None:
    """Once a process: 8-bit moments work without a compiled library, and take their time."""
    names = [name for name in ORDER[device_type] if name != "reference"]
    why = "; ".join(f"{name}: {available(name, device_type)[1]}" for name in names)
    need = "a C++ compiler and then" if device_type == "cpu" else "triton, or nvcc and then"
    warnings.warn(
        f"8-bit moments on {device_type} are updated in plain torch (on a CPU a step takes 3 to 24 "
        f"times as long), because no compiled kernels were found: {why}. Install {need} "
        "lowrank_optim again; `python -m lowrank_optim.ops` says what is used. "
        f"{VARIABLE}=reference asks for plain torch, without this warning",
        stacklevel=2,
    )
