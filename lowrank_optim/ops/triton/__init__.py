"""The ops as Triton kernels: NVIDIA, AMD and Intel accelerators, CPU tensors when interpreted.

Importing this package does not import triton; asking for an op does. One launcher per op, with the
op's own argument list; `available` says whether they can run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

_MODULES = {
    "adamw_direction_": "direction",
    "lion_direction_": "direction",
    "moment_": "direction",
    "adamw_direction_8bit_": "direction8",
    "lion_direction_8bit_": "direction8",
    "moment_8bit_": "direction8",
    "quantize_blockwise_": "quantize",
    "dequantize_blockwise_": "quantize",
    "stochastic_round_": "rounding",
    "column_norms": "norms",
    "decay_": "factors",
    "direction_add_": "factors",
    "addmm_": "lift",
    "count_": "factors",
    "row_steps_": "factors",
    "residual_factors_": "factors",
    "row_dots_": "turns",
    "turn_rows_": "turns",
    "step_rows_": "turns",
    "lift_add_scaled_": "lift",
    "lift_add_sign_": "lift",
    "coordinate_add_": "coordinate",
    "coordinate_adamw_": "coordinate",
    "top_rows_": "rows",
    "move_rows_": "rows",
    "cosine_scores": "cosine",
    "cosine_project_": "cosine",
    "cosine_top_project_": "cosine",
    "cosine_lift_add_": "cosine",
    "cosine_adamw_": "cosine",
}
OPS = tuple(_MODULES)
"""Names of the launchers."""

__all__ = ["OPS", "available", *OPS]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; read when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def available(device_type: str) -> tuple[bool, str]:
    """Whether the kernels run on tensors of ``device_type``, and the reason if they do not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if interpreted():
        if device_type == "cpu":
            return True, "interpreted (TRITON_INTERPRET=1)"
        return False, "TRITON_INTERPRET=1: kernels are interpreted, on CPU tensors only"
    if device_type == "cpu":
        return False, "triton runs on the CPU only under TRITON_INTERPRET=1"
    if device_type not in ("cuda", "xpu"):
        return False, f"no triton kernels for device type {device_type!r}"
    if not getattr(torch, device_type).is_available():
        return False, f"this torch finds no {device_type} device"
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return False, f"kernels are built for sm_80 and newer, this device is sm_{major}{minor}"
    return True, "ok"


def __getattr__(name: str) -> Callable[..., object]:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op: Callable[..., object] = getattr(_module(_MODULES[name]), name)
    return op


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
