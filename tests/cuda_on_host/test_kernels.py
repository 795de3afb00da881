"""Every CUDA kernel, thread by thread, has the bits of the CPU's kernels (sums: the tolerances)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda_on_host.compared import compare
from tests.cuda_on_host.host import Host
from tests.ops import ops_cases as cases
from tests.pairwise import paired

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = ["quantize_blockwise_", "dequantize_blockwise_", "stochastic_round_"]
MATRIX = [*cases.APPLIES, "column_norms"]
# Empty; about a warp and a block of threads; more than a thread block's share; rows of blocks.
SIZES = [(n,) for n in (0, 1, 31, 32, 33, 255, 256, 257, 1000, 4099)]
ROWS = [(3, 300), (2, 512), (5, 1, 67), (2, 3, 40), (0, 7), (7, 0)]
SHAPES = [(0, 5), (5, 0), (1, 1), (31, 33), (33, 32), (1, 257), (257, 1), (255, 256), (2, 9, 14)]
FORWARD, BACKWARD = -1, -2
ORDERS = [FORWARD, BACKWARD, 0, 1]


@pytest.mark.parametrize(("op", "dtype"), paired(cases.ELEMENTWISE + cases.BITS8, DTYPES, marks=()))
def test_updates(host: Host, op: str, dtype: torch.dtype) -> None:
    """Eps of a tensor, and then of a row; a gradient that is not finite; other outputs."""
    for by_row in (False, True) if "adamw" in op else (False,):
        shapes = ROWS if by_row else SIZES + ROWS
        a = cases.elementwise(op, dtype, shapes=shapes, by_row=by_row, unsound=1)
        a["outs"] = [x.to(DTYPES[DTYPES.index(dtype) - 1]) for x in a["outs"]]
        compare(host, op, a)


@pytest.mark.parametrize(("op", "dtype"), paired(STORAGE, DTYPES, marks=()))
def test_storage(host: Host, op: str, dtype: torch.dtype) -> None:
    dtype = torch.float32 if op == "stochastic_round_" else dtype
    for signed in (True, False):
        compare(host, op, cases.storage(op, dtype, shapes=SIZES + ROWS, signed=signed))


def test_blocks_of_zeros_and_of_what_is_not_finite(host: Host) -> None:
    op = "quantize_blockwise_"
    a = cases.storage(op, torch.float32, shapes=[(5, 256)])
    x = a["xs"][0]
    x[0], x[1, 7], x[2, 9], x[3] = 0, torch.nan, -torch.inf, 1e-42 * torch.randn(256).sign()
    compare(host, op, a)


@pytest.mark.parametrize(
    ("op", "dtype", "how"), paired(MATRIX, DTYPES, ["rows", "columns", "slice"])
)
def test_matrices(host: Host, op: str, dtype: torch.dtype, how: str) -> None:
    """Strides, tails in both directions, and nothing written where a gradient is not finite."""
    for free in ("sign", "sgd", "none") if op == "coordinate_add_" else ("",):
        unsound = None if op == "column_norms" else 3
        compare(
            host, op, cases.matrices(op, dtype, shapes=SHAPES, how=how, free=free, unsound=unsound)
        )


@pytest.mark.parametrize("op", ["adamw_direction_", "adamw_direction_8bit_", *STORAGE])
@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_lists(host: Host, op: str, count: int) -> None:
    """A launch has the pointers of 32 tensors."""
    shapes = [(1 + i * 37 % 300,) for i in range(count)]
    make: Any = cases.storage if op in STORAGE else cases.elementwise
    compare(host, op, make(op, torch.float32, shapes=shapes))
    assert len(host.launches()) == -(-count // 32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", [*cases.BITS8, "quantize_blockwise_", "column_norms"])
def test_the_order_of_threads_changes_no_bit(host: Host, op: str, order: int) -> None:
    """Those ops whose threads wait for one another."""
    host.library.host_order(order)
    if op == "column_norms":
        for how in ("rows", "columns"):
            compare(host, op, cases.matrices(op, torch.float32, shapes=[(67, 70)], how=how))
    elif op in cases.BITS8:
        compare(host, op, cases.elementwise(op, torch.float32, shapes=ROWS))
    else:
        compare(host, op, cases.storage(op, torch.float32, shapes=ROWS))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_formats(host: Host, narrow: torch.dtype) -> None:
    """Every number of a format is read as torch reads it; float32 is written as torch rounds it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)
    random = torch.randint(-(2**31), 2**31, (2**17,), dtype=torch.int64).int().view(torch.float32)
    even = torch.cat([every.float(), (every.float() + every.roll(1).float()) / 2])  # and midpoints
    for x, out in ((every, torch.float32), (torch.cat([random, even]), narrow)):
        a = {
            "xs": [x],
            "moments": [torch.zeros(x.shape)],
            "outs": [torch.zeros(x.shape, dtype=out)],
            "decay": 0.0,
            "weight": 1.0,
            "finite": [],
        }
        there = host.place(a, 0)
        host.call("moment_", there)
        found = there["outs"][0].as_subclass(torch.Tensor)
        assert torch.equal(found.nan_to_num(0.5), x.to(out).nan_to_num(0.5))
        assert torch.equal(found.isnan(), x.isnan())
