"""Block quantisation by bitsandbytes itself, for runs that must have its codes.

Quantise and dequantise are bitsandbytes' ops, in the 8-bit directions too, a tile at a time; all
other arithmetic is the reference's. Chosen by ``LOWRANK_OPTIM_BACKEND=bitsandbytes`` alone: on the
CPU its codes are not always the nearest (see docs/kernels.md), and it is slower.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import reference
from lowrank_optim.ops.reference.storage import Codec, blocked, unblocked

BLOCK = 256
"""A block size that bitsandbytes has on every device; ours are at most this long."""


def __getattr__(name: str) -> Any:
    return getattr(reference, name)


@functools.cache
def available(device_type: str) -> tuple[bool, str]:
    """Whether bitsandbytes and its library for a device load, and why not."""
    try:
        import bitsandbytes
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except Exception as error:  # its import runs much code of other packages
        return False, f"bitsandbytes does not import: {error}"
    version = f"bitsandbytes {bitsandbytes.__version__}"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return False, f"{version} did not load its library"
    if device_type != "cpu" and not (device_type == "cuda" and lib.compiled_with_cuda):
        return False, f"{version} has no library for {device_type}"
    return True, f"{version}; its own codes, on request only"


def _padded(x: Tensor, cols: int, block: int) -> Tensor:
    """A flat piece as ``(blocks, 256)``: what is shorter ends in zeros, which no maximum sees."""
    blocks = blocked(x, cols, block)
    return torch.nn.functional.pad(blocks, (0, BLOCK - block)).contiguous()


def _decode(codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int) -> Tensor:
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        _padded(codes, cols, block), scales, table, BLOCK, torch.float32
    )
    return unblocked(values[:, :block], codes.numel(), cols, block)


def _encode_(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int
) -> None:
    found, absmax = torch.ops.bitsandbytes.quantize_blockwise(_padded(x, cols, block), table, BLOCK)
    scales.copy_(absmax)
    codes.copy_(unblocked(found[:, :block], x.numel(), cols, block))


CODEC = Codec(_decode, _encode_, _encode_)

quantize_blockwise_ = functools.partial(reference.quantize_blockwise_, codec=CODEC)
dequantize_blockwise_ = functools.partial(reference.dequantize_blockwise_, codec=CODEC)
adamw_direction_8bit_ = functools.partial(reference.adamw_direction_8bit_, codec=CODEC)
lion_direction_8bit_ = functools.partial(reference.lion_direction_8bit_, codec=CODEC)
moment_8bit_ = functools.partial(reference.moment_8bit_, codec=CODEC)
