"""Products of cuBLAS, as torch asks for them, but that their factors are read on the device.

Whether weights decay is known where it is known whether their gradient is finite: on the device.
torch's products take factors of the host alone, so that the decay was a pass of its own. cuBLAS has
the call, and torch has loaded it: it is called with torch's handle, on torch's stream.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import reference
from lowrank_optim.ops.stacked import as_lines, by_copies, down_columns, in_lines

TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
"""``cudaDataType`` of each format."""
SUMS = 68
"""``cublasComputeType_t`` of sums, and so of factors, in float32."""
HOST, DEVICE = 0, 1
"""``cublasPointerMode_t``: where factors lie. Calls of torch itself have theirs on the host."""
STORED, TURNED = 0, 1
"""``cublasOperation_t``."""
FASTEST = -1
"""``cublasGemmAlgo_t``: of cuBLAS's choice, as torch asks for."""
VARIABLE = "LOWRANK_OPTIM_CUBLAS"
"""0 keeps the decay of weights a pass of its own; read once a process."""
OWNER = "libtorch_cuda.so"
"""Names are looked for in this and in what it was linked with: its handles are of that cuBLAS, and
a process may have loaded another as well."""
LONGEST = 2**31 - 1
"""The largest size that the call takes."""

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int
CALLS: dict[str, Any] = {
    "cublasSetPointerMode_v2": [_ADDRESS, _INT],
    "cublasGemmEx": [
        _ADDRESS, _INT, _INT, _INT, _INT, _INT, _ADDRESS,  # handle, operations, m, n, k, alpha
        _ADDRESS, _INT, _INT, _ADDRESS, _INT, _INT, _ADDRESS,  # A, B: type, rows; beta
        _ADDRESS, _INT, _INT, _INT, _INT,  # C: type, rows; compute type, algorithm
    ],
}  # fmt: skip
"""Arguments of the calls."""


@functools.cache
def _load() -> tuple[Any, str]:
    """The library that torch itself calls, and why there is none; never one beside it."""
    if os.environ.get(VARIABLE) == "0":
        return None, f"{VARIABLE}=0"
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    if not sys.platform.startswith("linux"):
        return None, f"not looked for on {sys.platform}"
    try:
        library = ctypes.CDLL(OWNER, os.RTLD_NOW | os.RTLD_NOLOAD)
        for call, kinds in CALLS.items():
            getattr(library, call).argtypes = kinds
    except (OSError, AttributeError) as error:
        return None, f"torch shows no cuBLAS of its own: {error}"
    return library, "ok"


def available() -> tuple[bool, str]:
    """Whether products on CUDA devices can read their factors there, and if not, why."""
    library, why = _load()
    return library is not None, why


def _library(device: torch.device) -> Any:
    return _load()[0] if device.type == "cuda" else None


def _handle() -> int:
    """Of this thread and the current stream, with the settings that torch's own products have."""
    return int(torch.cuda.current_blas_handle())  # type: ignore[no-untyped-call]


def takes(w: Tensor) -> bool:
    """Whether the call writes such weights: a matrix, which it has in memory by rows or columns."""
    return w.dim() == 2 and w.numel() > 0 and max(w.shape) <= LONGEST and w.dtype in TYPES


def addmm_(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    steps: Sequence[Tensor],
    decays: Sequence[Tensor],
) -> None:
    """``W <- d W + s P N`` of each, rounded once."""
    device = params[0].device
    lists: Sequence[Sequence[Tensor]] = (params, lefts, rights, steps, decays)
    served = [takes(w) for w in params]
    loose = [taken and not in_lines(w) for w, taken in zip(params, served, strict=True)]
    if any(loose):
        by_copies(as_lines, addmm_, *([*compress(xs, loose)] for xs in lists))
        lists = [[*compress(xs, map(not_, loose))] for xs in lists]
        served = [*compress(served, map(not_, loose))]
    library = _library(device)
    if library is None:
        served = [False] * len(served)
    # all of torch is done before: its products must not run while factors are on the device
    if not all(served):
        reference.addmm_(*([*compress(xs, map(not_, served))] for xs in lists))
    calls = [_call(*own) for own in compress(zip(*lists, strict=True), served)]
    if not calls:
        return
    with _on(device):
        handle = _handle()
        _check(library.cublasSetPointerMode_v2(handle, DEVICE))
        try:
            for numbers, _ in calls:
                _check(library.cublasGemmEx(handle, *numbers))
        finally:
            library.cublasSetPointerMode_v2(handle, HOST)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Within, torch's handle is that of a device."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _call(
    w: Tensor, left: Tensor, right: Tensor, step: Tensor, decay: Tensor
) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Arguments after the handle, and what has to live until they are used.

    Columns come first for the library, so that it computes ``W^T <- d W^T + s N^T P^T``.
    """
    by_columns = not w.is_contiguous()  # then W itself is what the library computes, P N
    first, second = (left, right) if by_columns else (right, left)
    m, n = w.shape if by_columns else reversed(w.shape)
    k, kind = left.shape[-1], TYPES[w.dtype]
    first, turn_first, rows_first = _operand(first, w.dtype, by_columns)
    second, turn_second, rows_second = _operand(second, w.dtype, by_columns)
    if step.dtype != torch.float32 or decay.dtype != torch.float32:
        step, decay = step.float(), decay.float()
    numbers = (
        turn_first, turn_second, m, n, k, step.data_ptr(),
        first.data_ptr(), kind, rows_first, second.data_ptr(), kind, rows_second,
        decay.data_ptr(), w.data_ptr(), kind, m, SUMS, FASTEST,
    )  # fmt: skip
    return numbers, (first, second, step, decay)


def _operand(x: Tensor, dtype: torch.dtype, by_columns: bool) -> tuple[Tensor, int, int]:
    """What is handed over of ``x``: it, how it is read, and how far apart its lines are.

    Args:
        x: P or N.
        dtype: of the weights.
        by_columns: as of the weights; one that lies in no lines is copied so.
    """
    if x.dtype != dtype:  # asked first, as each call of to() costs
        x = x.to(dtype)
    if not in_lines(x):
        x = x.mT.contiguous().mT if by_columns else x.contiguous()
    alike = down_columns(x) if by_columns else x.is_contiguous()
    in_columns = alike == by_columns
    return x, STORED if alike else TURNED, x.shape[0] if in_columns else x.shape[1]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(
            f"cuBLAS answers with status {status} (cublasStatus_t) to a product whose factors are "
            f"on the device; {VARIABLE}=0 in the environment does without such products"
        )
