"""The shared libraries of csrc, and the structs of their C interface."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.rows import check_rows
from lowrank_optim.ops.written import begin

ERRORS = {
    1: "dtypes that the library does not take",
    2: "a block size outside 1..4096 (256 on CUDA)",
    4: "a length with a prime factor above 61",
    5: "no memory for its buffers",
    6: "indices outside their rows, or not ascending",
}
BAD_INDEX = 6
CUDA_ERROR = 1000
ABI = 6


def _struct(name: str, fields: str) -> Any:
    """A struct of `lowrank_optim.h`; ``:d`` double, ``:i`` int32, ``:q`` int64, else a pointer."""
    kinds = {"": ctypes.c_void_p, "d": ctypes.c_double, "i": ctypes.c_int32, "q": ctypes.c_int64}
    pairs = [field.partition(":")[::2] for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in pairs]})


Update: Any = _struct(
    "Update",
    "count:q numels widths grads outs first second first_codes first_scales second_codes"
    " second_scales signed_map unsigned_map rows cols blocks eps row_eps row_scale finite a:d b:d"
    " grad_dtype:i out_dtype:i",
)
Blockwise: Any = _struct("Blockwise", "count:q values codes scales map rows cols blocks dtype:i")
Rounding: Any = _struct("Rounding", "count:q numels values outs seeds offsets widths rows columns")
Norms: Any = _struct("Norms", "count:q values outs rows cols row_strides col_strides dtype:i")
Apply: Any = _struct(
    "Apply",
    "rows:q cols:q weight weight_row:q weight_col:q grad grad_row:q grad_col:q low other low_row:q"
    " factor factor_row:q factor_col:q finite decay:d lr:d scale:d gain:d weight_dtype:i"
    " grad_dtype:i low_dtype:i",
)
Coordinate: Any = _struct(
    "Coordinate",
    "count:q weights grads index lows picked rows cols weight_rows weight_cols grad_rows grad_cols"
    " low_rows low_cols finite decay:d lr:d scale:d gain:d free_rule:i weight_dtype:i grad_dtype:i",
)
CoordinateStep: Any = _struct(
    "CoordinateStep",
    "count:q weights grads index first second picked rows cols weight_rows weight_cols grad_rows"
    " grad_cols eps steps free_steps beta1:d beta2:d decay:d free_rule:i dtype:i",
)
Cosine: Any = _struct(
    "Cosine",
    "count:q n:q weights grads index source lows first second scores picked cols weight_rows"
    " weight_cols grad_rows grad_cols eps row_eps row_scale steps turns beta1:d beta2:d decay:d"
    " basis:i norm:i dtype:i",
)
Top: Any = _struct("Top", "count:q scores index source rows picked")
STRUCTS = (Update, Blockwise, Rounding, Norms, Apply, Coordinate, CoordinateStep, Cosine, Top)


def _paths(name: str) -> Iterator[Path]:
    if folder := os.environ.get("LOWRANK_OPTIM_LIBRARY"):
        yield Path(folder) / name
        return
    for folder in sys.modules[__package__.partition(".")[0]].__path__:  # two in an editable install
        yield Path(folder) / "_native" / name


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    paths = list(_paths(name))
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        return None, f"{name} was not built with this installation (looked at {paths[0]})"
    try:
        library = _open(path)
    except OSError as error:
        return None, f"{path} does not load: {error}"
    sizes = (ctypes.c_int64 * (len(STRUCTS) + 1))()
    library.lro_sizes(sizes)
    if list(sizes) != [*map(ctypes.sizeof, STRUCTS), ABI]:
        return None, f"{path} was built from another version of the sources"
    library.lro_isa.restype = ctypes.c_char_p
    if library.lro_isa() is None:
        return None, f"LOWRANK_OPTIM_ISA={os.environ['LOWRANK_OPTIM_ISA']} is not for this CPU"
    return library, ""


def _open(path: Path) -> ctypes.CDLL:
    """Load ``path``, whose OpenMP calls go to the runtime torch has loaded for the process.

    Where torch has none that is visible (a build with another threading library), the system's
    serves.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "GOMP" not in str(error) and "omp_" not in str(error):
            raise
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))


def available(device_type: str) -> tuple[bool, str]:
    """Whether tensors on ``device_type`` can be served, and if not, why."""
    if device_type == "cpu":
        library, reason = _load("liblowrank_optim.so")
    elif device_type != "cuda":
        return False, f"the native backend serves cpu and cuda, not {device_type}"
    elif torch.version.hip is not None or not torch.cuda.is_available():
        return False, "no CUDA device"
    else:
        library, reason = _load("liblowrank_optim_cuda.so")
    if library is None:
        return False, reason
    return True, "built for CUDA" if device_type == "cuda" else f"{isa()} kernels"


def isa() -> str:
    """The instruction set of the CPU kernels: ``baseline``, ``avx2`` or ``avx512``."""
    name = _library("cpu").lro_isa()
    return str(name.decode())


def _library(device_type: str) -> ctypes.CDLL:
    library, reason = _load(
        "liblowrank_optim_cuda.so" if device_type == "cuda" else "liblowrank_optim.so"
    )
    if library is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return library


@functools.cache
def _function(op: str, device_type: str) -> Callable[..., int]:
    library = _library(device_type)
    function = getattr(library, f"lro_cuda_{op}" if device_type == "cuda" else f"lro_{op}")
    last = ctypes.c_void_p if device_type == "cuda" else ctypes.c_int
    function.argtypes = [ctypes.c_void_p, last]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def run(
    op: str,
    device: torch.device,
    args: ctypes.Structure,
    indices: Iterable[tuple[Tensor, int, int]] = (),
) -> None:
    """Call an op of the library on the current stream, or with torch's number of threads.

    Args:
        op: its name.
        device: where all tensors are.
        args: its struct.
        indices: those that it follows, with how many rows there are and the least that each may be:
            asked only when the library has refused them.

    Raises:
        IndexError: an index is outside its rows or out of order; nothing was written.
        RuntimeError: the library cannot serve the call, or CUDA refused a launch of it.
    """
    function = _function(op, device.type)
    begin()
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = function(ctypes.byref(args), torch.cuda.current_stream().cuda_stream)
    else:
        status = function(ctypes.byref(args), torch.get_num_threads())
    if status == BAD_INDEX:
        for index, rows, least in indices:
            check_rows(f"native {op}", index, rows, least)
    if status >= CUDA_ERROR:
        raise RuntimeError(
            f"native {op}: a launch on {device} failed with CUDA error {status - CUDA_ERROR} "
            "(cudaError_t), perhaps that of an earlier kernel: CUDA_LAUNCH_BLOCKING=1 shows which. "
            "Tensors of this call may be half written"
        )
    if status:
        raise RuntimeError(f"native {op}: {ERRORS.get(status, status)}")
