"""The ops of csrc, through ctypes: `liblowrank_optim.so` on the CPU, its CUDA half on a GPU.

The library knows nothing of torch; this module turns lists of tensors into arrays of pointers. One
call serves a whole list. float64 raises TypeError: it is served by the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {
    1: "dtypes that the library does not take",
    2: "a block size outside 1..4096 (256 on CUDA)",
    3: "the launch failed",
}
FREE = {"none": 0, "sign": 1, "sgd": 2}
ABI = 1

TILE_ELEMENTS = 1 << 18
"""Elements of the buffer that a GEMM writes and a fused apply reads, while it is in the cache."""


# --- the library ----------------------------------------------------------------------------------


def _struct(name: str, fields: str) -> Any:
    """A struct of `lowrank_optim.h`; ``:d`` double, ``:i`` int32, ``:q`` int64, else a pointer."""
    kinds = {"": ctypes.c_void_p, "d": ctypes.c_double, "i": ctypes.c_int32, "q": ctypes.c_int64}
    pairs = [field.partition(":")[::2] for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in pairs]})


Update: Any = _struct(
    "Update",
    "count:q numels widths grads outs first second first_codes first_scales second_codes"
    " second_scales signed_map unsigned_map rows cols blocks eps row_eps row_scale sound a:d b:d"
    " grad_dtype:i out_dtype:i",
)
Blockwise: Any = _struct("Blockwise", "count:q values codes scales map rows cols blocks dtype:i")
Rounding: Any = _struct("Rounding", "count:q numels values outs seeds")
Norms: Any = _struct("Norms", "count:q values outs rows cols row_strides col_strides dtype:i")
Apply: Any = _struct(
    "Apply",
    "rows:q cols:q weight weight_row:q weight_col:q grad grad_row:q grad_col:q low other low_row:q"
    " factor factor_row:q factor_col:q decay:d lr:d scale:d gain:d weight_dtype:i grad_dtype:i"
    " low_dtype:i",
)
Coordinate: Any = _struct(
    "Coordinate",
    "count:q weights grads index lows picked rows cols weight_rows weight_cols grad_rows grad_cols"
    " low_rows low_cols decay:d lr:d scale:d gain:d free_rule:i weight_dtype:i grad_dtype:i",
)
STRUCTS = (Update, Blockwise, Rounding, Norms, Apply, Coordinate)


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
    sizes = (ctypes.c_int64 * 7)()
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
    return library is not None, reason


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


def _run(op: str, device: torch.device, args: ctypes.Structure) -> None:
    function = _function(op, device.type)
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = function(ctypes.byref(args), torch.cuda.current_stream().cuda_stream)
    else:
        status = function(ctypes.byref(args), torch.get_num_threads())
    if status:
        raise RuntimeError(f"native {op}: {ERRORS.get(status, status)}")


# --- tensors to arrays ----------------------------------------------------------------------------


class _Arrays:
    """Arrays for one call, alive as long as this is."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def _keep(self, values: array[Any]) -> int:
        self.kept.append(values)
        return values.buffer_info()[0]

    def pointers(self, tensors: Iterable[Tensor]) -> int:
        return self._keep(array("Q", [t.data_ptr() for t in tensors]))

    def int64(self, values: Iterable[int]) -> int:
        return self._keep(array("q", values))

    def uint32(self, values: Iterable[int]) -> int:
        return self._keep(array("I", [v & 0xFFFFFFFF for v in values]))

    def float32(self, values: Iterable[float]) -> int:
        return self._keep(array("f", values))


def _dtype(tensors: Sequence[Tensor], name: str) -> int:
    """The one dtype of a list."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        raise TypeError(f"native ops take float32, bfloat16 and float16 {name}, got {dtype}")
    if any(t.dtype != dtype for t in tensors):
        raise TypeError(f"native ops take {name} of one dtype, got {[t.dtype for t in tensors]}")
    return DTYPES[dtype]


def _exactly(tensors: Sequence[Tensor], dtype: torch.dtype, name: str) -> None:
    """State that is written in place: this dtype, contiguous."""
    for t in tensors:
        if t.dtype != dtype:
            raise TypeError(f"native ops take {dtype} {name}, got {t.dtype}")
        if not t.is_contiguous():
            raise ValueError(f"native ops take contiguous {name}, got strides {t.stride()}")


def _same(count: int, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"expected {count} {name}, got {len(values)}")


def _sizes(tensors: Sequence[Tensor], like: Sequence[Tensor], name: str) -> None:
    for t, other in zip(tensors, like, strict=True):
        if t.numel() != other.numel() or t.device != other.device:
            raise ValueError(
                f"{name}: {tuple(t.shape)} on {t.device} beside {tuple(other.shape)}"
                f" on {other.device}"
            )


def _blocks(rows: Sequence[int], cols: Sequence[int], blocks: Sequence[int]) -> list[int]:
    return [r * -(-c // b) for r, c, b in zip(rows, cols, blocks, strict=True)]


def _scales(scales: Sequence[Tensor], counts: Sequence[int], name: str) -> None:
    _exactly(scales, torch.float32, name)
    for s, count in zip(scales, counts, strict=True):
        if s.numel() != count:
            raise ValueError(f"expected {count} {name}, got {s.numel()}")


def _map(values: Tensor) -> Tensor:
    if values.dtype != torch.float32 or values.numel() != 256 or not values.is_contiguous():
        raise ValueError(f"a map has 256 float32 entries, got {values.numel()} {values.dtype}")
    return values


# --- moments --------------------------------------------------------------------------------------


def _update(
    op: str,
    grads: Sequence[Tensor],
    outs: Sequence[Tensor],
    a: float,
    b: float,
    sound: Sequence[Tensor],
    moments: dict[str, Sequence[Tensor]],
    *,
    maps: dict[str, Tensor] | None = None,
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
    eps: Sequence[float] | None = None,
    row_eps: Sequence[Tensor] = (),
    row_scale: Sequence[Tensor] = (),
) -> None:
    """One call of an op over ``lro_update``, after the checks that keep it inside its buffers."""
    count = len(grads)
    if count == 0:
        return
    _same(count, outs=outs, **moments)
    _sizes(outs, grads, "outs")
    arrays = _Arrays()
    args = Update(count=count, a=a, b=b)
    args.grad_dtype, args.out_dtype = _dtype(grads, "gradients"), _dtype(outs, "outs")
    for name, tensors in moments.items():
        if name.endswith("_scales"):
            assert layout is not None
            _scales(tensors, _blocks(*layout), name)
        else:
            _exactly(tensors, torch.uint8 if layout else torch.float32, name)
            _sizes(tensors, grads, name)
        setattr(args, name, arrays.pointers(tensors))
    if layout is not None:
        _layout(layout, grads)
        args.rows, args.cols, args.blocks = (arrays.int64(x) for x in layout)
    for name, values in (maps or {}).items():
        setattr(args, name, _map(values).data_ptr())
    if eps is not None and not row_eps:
        _same(count, eps=eps)
        args.eps = arrays.float32(eps)
    if row_eps:
        _same(count, row_eps=row_eps, row_scale=row_scale)
        widths = [g.shape[-1] if g.dim() else 1 for g in grads]
        for name, tensors in (("row_eps", row_eps), ("row_scale", row_scale)):
            rows = [g.numel() // w if w else 0 for g, w in zip(grads, widths, strict=True)]
            _scales(tensors, rows, name)
            setattr(args, name, arrays.pointers(tensors))
        args.widths = arrays.int64(widths)
    if sound:
        _same(count, sound=sound)
        if any(s.dtype != torch.bool or s.numel() != 1 for s in sound):
            raise TypeError("sound: one bool per tensor")
        args.sound = arrays.pointers(sound)
    args.numels = arrays.int64([g.numel() for g in grads])
    # The library reads flat memory: what is not contiguous is copied, one gradient at its size.
    flat_grads = [g.contiguous() for g in grads]
    flat_outs = [
        o if o.is_contiguous() else torch.empty_like(o, memory_format=torch.contiguous_format)
        for o in outs
    ]
    args.grads, args.outs = arrays.pointers(flat_grads), arrays.pointers(flat_outs)
    _run(op, grads[0].device, args)
    for out, flat in zip(outs, flat_outs, strict=True):
        if out is not flat:
            out.copy_(flat)


def _layout(
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]], tensors: Sequence[Tensor]
) -> None:
    for r, c, t in zip(layout[0], layout[1], tensors, strict=True):
        if r * c != t.numel():
            raise ValueError(f"a layout of {r} x {c} for {t.numel()} elements")


def adamw_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    sound: Sequence[Tensor],
) -> None:
    """Update both moments; ``out <- m / (sqrt(v) + eps)``, or by rows of the last dimension."""
    moments = {"first": exp_avgs, "second": exp_avg_sqs}
    _update(
        "adamw_direction",
        grads,
        outs,
        beta1,
        beta2,
        sound,
        moments,
        eps=eps,
        row_eps=row_eps,
        row_scale=row_scale,
    )


def lion_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    sound: Sequence[Tensor],
) -> None:
    """``out <- sign(m + (1 - beta1)(g - m))``, then ``m <- m + (1 - beta2)(g - m)``."""
    _update("lion_direction", grads, outs, beta1, beta2, sound, {"first": exp_avgs})


def moment_(
    xs: Sequence[Tensor],
    moments: Sequence[Tensor],
    outs: Sequence[Tensor],
    decay: float,
    weight: float,
    sound: Sequence[Tensor],
) -> None:
    """``m <- decay m + weight x; out <- m``."""
    _update("moment", xs, outs, decay, weight, sound, {"first": moments})


def adamw_direction_8bit_(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    codes2: Sequence[Tensor],
    scales2: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    unsigned_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    sound: Sequence[Tensor],
) -> None:
    """`adamw_direction_` on 8-bit moments, one pass over each block."""
    moments = {
        "first_codes": codes,
        "first_scales": scales,
        "second_codes": codes2,
        "second_scales": scales2,
    }
    _update(
        "adamw_direction_8bit",
        grads,
        outs,
        beta1,
        beta2,
        sound,
        moments,
        maps={"signed_map": signed_map, "unsigned_map": unsigned_map},
        layout=(rows, cols, blocks),
        eps=eps,
        row_eps=row_eps,
        row_scale=row_scale,
    )


def lion_direction_8bit_(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    sound: Sequence[Tensor],
) -> None:
    """`lion_direction_` on an 8-bit moment."""
    _update(
        "lion_direction_8bit",
        grads,
        outs,
        beta1,
        beta2,
        sound,
        {"first_codes": codes, "first_scales": scales},
        maps={"signed_map": signed_map},
        layout=(rows, cols, blocks),
    )


def moment_8bit_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    decay: float,
    weight: float,
    sound: Sequence[Tensor],
) -> None:
    """`moment_` on an 8-bit moment."""
    _update(
        "moment_8bit",
        xs,
        outs,
        decay,
        weight,
        sound,
        {"first_codes": codes, "first_scales": scales},
        maps={"signed_map": signed_map},
        layout=(rows, cols, blocks),
    )


# --- storage --------------------------------------------------------------------------------------


def _blockwise(
    op: str,
    values: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    table: Tensor,
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> None:
    _same(len(values), codes=codes, scales=scales)
    _exactly(codes, torch.uint8, "codes")
    _scales(scales, _blocks(*layout), "scales")
    _sizes(codes, values, "codes")
    _layout(layout, values)
    arrays = _Arrays()
    args = Blockwise(count=len(values), dtype=_dtype(values, "values"), map=_map(table).data_ptr())
    args.values, args.codes = arrays.pointers(values), arrays.pointers(codes)
    args.scales = arrays.pointers(scales)
    args.rows, args.cols, args.blocks = (arrays.int64(x) for x in layout)
    _run(op, values[0].device, args)


def quantize_blockwise_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """Nearest codes of ``x / scale`` with one scale, the largest magnitude, for each block.

    A block that holds an infinity or NaN gets that for a scale, and reads back as NaN.
    """
    if xs:
        _blockwise(
            "quantize", [x.contiguous() for x in xs], codes, scales, map, (rows, cols, blocks)
        )


def dequantize_blockwise_(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """``out <- map[code] * scale``."""
    if not outs:
        return
    flat = [o.contiguous() for o in outs]
    _blockwise("dequantize", flat, codes, scales, map, (rows, cols, blocks))
    for out, values in zip(outs, flat, strict=True):
        if out is not values:
            out.copy_(values)


def stochastic_round_(xs: Sequence[Tensor], outs: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """float32 to bfloat16, up or down without bias; the noise is a hash of flat index and seed."""
    if not xs:
        return
    _same(len(xs), outs=outs, seeds=seeds)
    _sizes(outs, xs, "outs")
    flat = [x.contiguous() for x in xs]
    flat_outs = [o.contiguous() for o in outs]
    _exactly(flat, torch.float32, "inputs")
    _exactly(flat_outs, torch.bfloat16, "outs")
    arrays = _Arrays()
    args = Rounding(count=len(xs), numels=arrays.int64([x.numel() for x in xs]))
    args.values, args.outs = arrays.pointers(flat), arrays.pointers(flat_outs)
    args.seeds = arrays.uint32(seeds)
    _run("stochastic_round", xs[0].device, args)
    for out, rounded in zip(outs, flat_outs, strict=True):
        if out is not rounded:
            out.copy_(rounded)


# --- matrices -------------------------------------------------------------------------------------


def _matrices(xs: Iterable[Tensor]) -> list[Tensor]:
    """Every 2-D matrix of a list of ``(..., m, n)``; views, whatever the strides."""
    matrices: list[Tensor] = []
    for x in xs:
        _unbind(x, matrices)
    return matrices


def _unbind(x: Tensor, into: list[Tensor]) -> None:
    if x.dim() <= 2:
        into.append(x)
        return
    for part in x.unbind(0):
        _unbind(part, into)


def column_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """``(..., 1, n)`` float32: the norm of each column; sums in float64, so nothing overflows."""
    if not xs:
        return []
    norms = [
        torch.empty((*x.shape[:-2], 1, x.shape[-1]), dtype=torch.float32, device=x.device)
        for x in xs
    ]
    matrices, outs = _matrices(xs), _matrices(norms)
    if not matrices:
        return norms
    arrays = _Arrays()
    args = Norms(count=len(matrices), dtype=_dtype(xs, "matrices"))
    args.values, args.outs = arrays.pointers(matrices), arrays.pointers(outs)
    args.rows = arrays.int64([x.shape[0] for x in matrices])
    args.cols = arrays.int64([x.shape[1] for x in matrices])
    args.row_strides = arrays.int64([x.stride(0) for x in matrices])
    args.col_strides = arrays.int64([x.stride(1) for x in matrices])
    _run("column_norms", xs[0].device, args)
    return norms


def _stored(w: Tensor) -> bool:
    """Whether the rows of ``w`` are how it is stored; else its columns are."""
    return w.stride(1) <= w.stride(0)


def _shape_check(w: Tensor, g: Tensor, p: Tensor, lows: Sequence[Tensor]) -> None:
    m, n = w.shape
    r = p.shape[1]
    if g.shape != w.shape or p.shape[0] != m or any(x.shape != (r, n) for x in lows):
        shapes = [tuple(x.shape) for x in (w, g, p, *lows)]
        raise ValueError(f"shapes do not fit: W, G, P and low-rank {shapes}")


def _tiles(w: Tensor, buffers: int) -> tuple[list[Tensor], int]:
    """Buffers of one tile together within `TILE_ELEMENTS`, and the rows of a tile."""
    rows, cols = w.shape
    step = max(1, min(rows, TILE_ELEMENTS // (buffers * max(cols, 1))))
    return [torch.empty(step, cols, dtype=w.dtype, device=w.device) for _ in range(buffers)], step


def _apply(op: str, w: Tensor, g: Tensor, low: Tensor, other: Tensor, args: Any) -> None:
    args.rows, args.cols = w.shape
    args.weight, args.weight_row, args.weight_col = w.data_ptr(), w.stride(0), w.stride(1)
    args.grad, args.grad_row, args.grad_col = g.data_ptr(), g.stride(0), g.stride(1)
    args.low, args.other, args.low_row = low.data_ptr(), other.data_ptr(), low.stride(0)
    _run(op, w.device, args)


def lift_add_scaled_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    P: Sequence[Tensor],
    N: Sequence[Tensor],
    R: Sequence[Tensor],
    columns: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
) -> None:
    """``W <- decay W - lr (P (a N - a R c) + G c)``: a GEMM into a tile, then one pass over it.

    The GEMM has the dtype of W, as `lift_add_`; the pass is in float32 and rounds W once.
    """
    if not W:
        return
    _same(len(W), G=G, P=P, N=N, R=R, columns=columns)
    dtype = _dtype(W, "weights")
    _dtype([*W, *G], "weights and gradients")
    args = Apply(decay=decay, lr=lr, weight_dtype=dtype, grad_dtype=dtype, low_dtype=dtype)
    matrices = (_matrices(x) for x in (W, G, P, N, R, columns))
    for w, g, p, n, r, c in zip(*matrices, strict=True):
        _shape_check(w, g, p, (n, r))
        if c.shape != (1, w.shape[1]) or c.dtype != torch.float32:
            raise ValueError(f"columns: float32 (1, {w.shape[1]}), got {c.dtype} {tuple(c.shape)}")
        if w.numel() == 0:
            continue
        c = c.contiguous()
        x = torch.addcmul(n.float(), r.float(), c, value=-1.0).mul_(scale).to(w.dtype)
        left, right = p.to(w.dtype), x
        by_rows = _stored(w)
        if not by_rows:
            w, g, left, right = w.t(), g.t(), x.t(), left.t()
        (tile,), step = _tiles(w, 1)
        args.factor_row, args.factor_col = (0, 1) if by_rows else (1, 0)
        for start in range(0, w.shape[0], step):
            stop = min(start + step, w.shape[0])
            low = torch.mm(left[start:stop], right, out=tile[: stop - start])
            args.factor = c.data_ptr() + (0 if by_rows else 4 * start)
            _apply("apply_scaled", w[start:stop], g[start:stop], low, low, args)


def lift_add_sign_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    P: Sequence[Tensor],
    N: Sequence[Tensor],
    R: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two GEMMs into tiles, then one pass."""
    if not W:
        return
    _same(len(W), G=G, P=P, N=N, R=R)
    dtype = _dtype(W, "weights")
    _dtype([*W, *G], "weights and gradients")
    args = Apply(decay=decay, lr=lr, scale=scale, gain=gain)
    args.weight_dtype = args.grad_dtype = args.low_dtype = dtype
    for w, g, p, n, r in zip(*(_matrices(x) for x in (W, G, P, N, R)), strict=True):
        _shape_check(w, g, p, (n, r))
        if w.numel() == 0:
            continue
        by_rows = _stored(w)
        p, n, r = p.to(w.dtype), n.to(w.dtype), r.to(w.dtype)
        if not by_rows:
            w, g = w.t(), g.t()
        (first, second), step = _tiles(w, 2)
        for start in range(0, w.shape[0], step):
            stop = min(start + step, w.shape[0])
            rows = slice(start, stop)
            pairs = (
                [(p[rows], n), (p[rows], r)]
                if by_rows
                else [(n.t()[rows], p.t()), (r.t()[rows], p.t())]
            )
            low = torch.mm(*pairs[0], out=first[: stop - start])
            other = torch.mm(*pairs[1], out=second[: stop - start])
            _apply("apply_sign", w[rows], g[rows], low, other, args)


def coordinate_add_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    index: Sequence[Tensor],
    N: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
) -> None:
    """Rows in ``index``: ``W <- decay W - lr a N[k]``; others ``W <- decay W - lr gain f(G)``."""
    if free not in FREE:
        raise ValueError(f"free must be one of {sorted(FREE)}, got {free!r}")
    if not W:
        return
    _same(len(W), G=G, index=index, N=N)
    dtype = _dtype(W, "weights")
    _dtype([*W, *G], "weights and gradients")
    ws, gs, lows = _matrices(W), _matrices(G), [x.float() for x in _matrices(N)]
    picks: list[Tensor] = []
    for k, w in zip(index, W, strict=True):
        if k.dtype != torch.int32:
            raise TypeError(f"index must be int32, got {k.dtype}")
        rows = k.contiguous().expand(*w.shape[:-2], k.shape[-1]).reshape(-1, k.shape[-1])
        picks += rows.unbind(0)
    for w, g, k, low in zip(ws, gs, picks, lows, strict=True):
        if g.shape != w.shape or low.shape != (k.shape[0], w.shape[1]):
            shapes = [tuple(x.shape) for x in (w, g, k, low)]
            raise ValueError(f"shapes do not fit: W, G, index and N {shapes}")
    if not ws:
        return
    # Read along the columns of W: strides of a power of two would evict each other from the cache.
    lows = [x if _stored(w) else x.t().contiguous().t() for w, x in zip(ws, lows, strict=True)]
    arrays = _Arrays()
    args = Coordinate(count=len(ws), decay=decay, lr=lr, scale=scale, gain=gain)
    args.free_rule, args.weight_dtype, args.grad_dtype = FREE[free], dtype, dtype
    args.weights, args.grads = arrays.pointers(ws), arrays.pointers(gs)
    args.index, args.lows = arrays.pointers(picks), arrays.pointers(lows)
    args.picked = arrays.int64([k.shape[0] for k in picks])
    args.rows, args.cols = (arrays.int64([w.shape[d] for w in ws]) for d in (0, 1))
    args.weight_rows, args.weight_cols = (arrays.int64([w.stride(d) for w in ws]) for d in (0, 1))
    args.grad_rows, args.grad_cols = (arrays.int64([g.stride(d) for g in gs]) for d in (0, 1))
    args.low_rows, args.low_cols = (arrays.int64([x.stride(d) for x in lows]) for d in (0, 1))
    _run("coordinate_add", ws[0].device, args)
