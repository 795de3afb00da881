"""Which tile a lift works on: by the format of the product, the device and the number of tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """Tile of the result, step along the rank, warps of 32 lanes, stages, columns written at once.

    The last is how much of W and G is in registers beside the sums, so how many programs fit.
    """

    BM: int
    BN: int
    BR: int
    num_warps: int
    num_stages: int
    PART: int

    def tiles(self, m: int, n: int) -> int:
        """How many cover a matrix of ``(m, n)``."""
        return int(triton.cdiv(m, self.BM) * triton.cdiv(n, self.BN))


BLOCKS = {
    # (products, operand format): registers of the accumulators are products * BM * BN / threads
    (1, "bf16"): Blocks(128, 64, 32, 4, 3, 64),  # tensor cores, 64 of 255 registers
    (2, "bf16"): Blocks(64, 64, 32, 4, 3, 64),  # the same 64: two tiles of half the size
    (1, "fp32"): Blocks(64, 64, 16, 8, 2, 64),  # scalar FMAs: operands take registers as well
    (2, "fp32"): Blocks(64, 64, 16, 8, 2, 64),
}
"""Of any size on any device. fp32 products are exact (no TF32) and run on the scalar units, where 8
warps share the tile."""

LARGE = {
    ("sm_80", 1): Blocks(128, 128, 32, 4, 4, 64),  # two programs in 99 KiB of shared memory
    ("sm_80", 2): Blocks(128, 64, 32, 8, 4, 32),
    ("sm_90", 1): Blocks(128, 256, 64, 8, 3, 64),  # wgmma of m64n256k16, one program
    ("sm_90", 2): Blocks(128, 128, 64, 8, 3, 64),
}
"""Of bfloat16, where every multiprocessor gets a tile: (family, products). Operands come from L2,
and a tile twice as large in both directions asks for half the bytes."""

FAMILIES = {
    **dict.fromkeys(((8, 0), (8, 6), (8, 9), (12, 0), (12, 1)), "sm_80"),
    **dict.fromkeys(((9, 0), (10, 0), (10, 3)), "sm_90"),
}
"""Compute capabilities by their matrix units: of a warp, or of a group of them with 227 KiB."""


@functools.cache
def family(device: torch.device) -> tuple[str, int]:
    """Key into `LARGE`, and multiprocessors; no device that is not NVIDIA's is in `LARGE`."""
    if device.type != "cuda" or torch.version.hip:
        return "", 0
    found = torch.cuda.get_device_properties(device)
    return FAMILIES.get((found.major, found.minor), ""), found.multi_processor_count


def choose(products: int, half: bool, device: torch.device, batch: int, m: int, n: int) -> Blocks:
    """By size and device alone, so that a run does not depend on timings."""
    if half:
        key, processors = family(device)
        large = LARGE.get((key, products))
        if large is not None and batch * large.tiles(m, n) >= processors:
            return large
    return BLOCKS[products, "bf16" if half else "fp32"]
