"""Grids of more than 65,535 blocks, and tensors of more than 2^31 elements.

The large ones are addresses without memory: a page of them is there once it is written. A block of
a grid visits elements from the first to the last, so few blocks are run, all of whose addresses are
real. What they write is compared with the CPU's kernels on those elements alone.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import native
from lowrank_optim.ops.native import loader, matrices
from lowrank_optim.ops.quant import dynamic_map
from tests.compare import assert_close
from tests.cuda_on_host.compared import compare, same_bits
from tests.cuda_on_host.host import END, Host
from tests.ops import ops_cases as cases

LIMIT = 65535  # of gridDim.y
NORESERVE = 0x4000
HUGE = (2**19 + 1, 4096)  # 2^31 + 4096 elements
WIDE = (LIMIT + 9, 32776)  # as many, of more rows than a grid has
STEP = 4096 * 256  # threads of the largest grid of an update
FORMAT = torch.bfloat16


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def every(step: int, first: int, length: int) -> Tensor:
    """The elements of HUGE that a block visits: runs of ``length``, ``step`` apart."""
    starts = torch.arange(first, HUGE[0] * HUGE[1] - length + 1, step)
    return (starts[:, None] + torch.arange(length)).flatten()


class Part:
    """Some elements of a large tensor, random, and the large tensor on the device."""

    def __init__(self, host: Host, at: Tensor, dtype: torch.dtype, values: Tensor) -> None:
        self.at, self.few = at, values.to(dtype)
        whole = sparse(HUGE, dtype)
        whole.view(-1)[at] = self.few
        self.whole = host.mark(whole, 0)

    def check(self, what: str) -> None:
        same_bits(self.whole.as_subclass(Tensor).view(-1)[self.at], self.few, what)


def test_rows_of_moments_beyond_2_31(host: Host) -> None:
    """The last 256 elements, and all others of that block."""
    at = every(STEP, HUGE[1] - 256, 256)
    assert int(at[-1]) == HUGE[0] * HUGE[1] - 1 > 2**31
    g, out = (Part(host, at, FORMAT, torch.randn(len(at))) for _ in range(2))
    m, v = (Part(host, at, torch.float32, torch.rand(len(at))) for _ in range(2))
    eps, scale = torch.rand(HUGE[0]) + 0.1, torch.rand(HUGE[0])
    block = HUGE[1] // 256 - 1
    with host.blocks(x=(block, block + 1)):
        rows = [host.place([x], 0) for x in (eps, scale)]
        large = [[x.whole] for x in (g, m, v, out)]
        host.call("adamw_direction_", dict(enumerate([*large, 0.9, 0.99, [], *rows, []])))
    rows = [[x[(at // HUGE[1])[::256]]] for x in (eps, scale)]
    native.adamw_direction_(
        *[[x.few.view(-1, 256)] for x in (g, m, v, out)], 0.9, 0.99, [], *rows, []
    )
    for what, part in (("m", m), ("v", v), ("out", out)):
        part.check(what)


def test_8bit_moments_beyond_2_31(host: Host) -> None:
    """Block 0 of threads has the eight blocks of codes that begin at 2^31, too."""
    blocks = HUGE[0] * HUGE[1] // 256
    runs = every(2048 * 8 * 256, 0, 8 * 256)
    assert int(runs[-1]) >= 2**31
    at = runs.view(-1, 256)[:, 0] // 256  # entries of scales
    g, out = (Part(host, runs, FORMAT, torch.randn(len(runs))) for _ in range(2))
    codes = [
        Part(host, runs, torch.uint8, torch.randint(256, (len(runs),), dtype=torch.uint8))
        for _ in range(2)
    ]
    scales = [torch.rand(blocks) for _ in range(2)]
    few = [x[at] for x in scales]
    large = [host.place([x], 0) for x in scales]
    maps = [dynamic_map(signed, torch.device("cpu")) for signed in (True, False)]
    numbers = [0.9, 0.99, [1e-3], [], [], []]
    with host.blocks(x=(0, 1)):
        moments = [[codes[0].whole], large[0], [codes[1].whole], large[1]]
        layout = [[HUGE[0]], [HUGE[1]], [256]]
        given = [[g.whole], *moments, [out.whole], *host.place(maps, 0), *layout, *numbers]
        host.call("adamw_direction_8bit_", dict(enumerate(given)))
    moments = [[codes[0].few], [few[0]], [codes[1].few], [few[1]]]
    layout = [[1], [len(runs)], [256]]
    native.adamw_direction_8bit_([g.few], *moments, [out.few], *maps, *layout, *numbers)
    for what, part in (("codes", codes[0]), ("codes2", codes[1]), ("out", out)):
        part.check(what)
    for own, expected in zip(large, few, strict=True):
        same_bits(own[0].as_subclass(Tensor)[at], expected, "scales")


def test_rounding_beyond_2_31(host: Host) -> None:
    """Positions as the CPU has them, from the offset of each run."""
    at = every(STEP, 0, 256)
    x, out = Part(host, at, torch.float32, torch.randn(len(at))), Part(host, at, FORMAT, at * 0)
    with host.blocks(x=(0, 1)):
        places = [[5], [7], [2**40], [3], [11]]
        host.call("stochastic_round_", dict(enumerate([[x.whole], [out.whole], *places])))
    runs = [list(y.view(-1, 256)) for y in (x.few, out.few)]
    count = len(runs[0])
    offsets = [(7 + 11 * int(i)) % 2**32 for i in at[::256]]
    same = [[2**40] * count, [3] * count, [11] * count]
    native.stochastic_round_(*runs, [5] * count, offsets, *same)
    out.check("out")


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_coordinates_beyond_2_31(host: Host, by_column: bool) -> None:
    """Stored rows 8 and 65,543, their last entries: the second is that of a stride of the grid."""
    last = slice(WIDE[1] - 8, None)
    runs = torch.tensor([8, LIMIT + 8])
    w, g = sparse(WIDE, FORMAT), sparse(WIDE, FORMAT)
    few = [torch.randn(2, 8).to(FORMAT) for _ in range(2)]
    for whole, own in zip((w, g), few, strict=True):
        whole[runs, last] = own
    low = torch.randn(2, WIDE[0] if by_column else WIDE[1])
    index = torch.tensor([5, WIDE[1] - 2] if by_column else [8, LIMIT + 1], dtype=torch.int32)
    numbers = [0.98, 0.1, 0.25, 0.5, "sign", []]
    turned = [host.mark(x.t() if by_column else x, 0) for x in (w, g)]
    # N is stored as W is, or Python cuts W into strips
    own = low.t().contiguous().t() if by_column else low
    with host.blocks(x=((WIDE[1] - 1) // 256, END), y=(8, 9)):
        arguments = [[turned[0]], [turned[1]], host.place([index], 0), host.place([own], 0)]
        host.call("coordinate_add_", dict(enumerate([*arguments, *numbers])))
    if by_column:
        there = [x.t() for x in few]
        picked, part = index[1:] - (WIDE[1] - 8), low[1:, runs]
    else:
        there, picked, part = few, index[:1] - 8, low[:1, last]
    native.coordinate_add_([there[0]], [there[1]], [picked.int()], [part.contiguous()], *numbers)
    same_bits(w[runs, last], few[0], "W")


@pytest.mark.parametrize("op", ["apply_scaled", "apply_sign"])
def test_applies_beyond_2_31(host: Host, op: str) -> None:
    """The same entries, through the C interface: Python cuts a matrix into tiles."""
    last = slice(WIDE[1] - 8, None)
    runs = torch.tensor([8, LIMIT + 8])
    large = [sparse(WIDE, FORMAT) for _ in range(4)]
    few = [torch.randn(2, 8).to(FORMAT) for _ in range(4)]
    for whole, own in zip(large, few, strict=True):
        host.mark(whole, 0)
        whole[runs, last] = own
    c = torch.rand(WIDE[1])
    host.mark(c, 0)

    def arguments(tensors: list[Tensor], factor: Tensor) -> Any:
        args = loader.Apply(decay=0.98, lr=0.1, scale=0.25, gain=0.5)
        args.rows, args.cols = tensors[0].shape
        args.weight_dtype = args.grad_dtype = args.low_dtype = 1
        args.weight, args.grad, args.low, args.other = (x.data_ptr() for x in tensors)
        args.weight_row = args.grad_row = args.low_row = args.cols
        args.weight_col = args.grad_col = 1
        args.factor, args.factor_row, args.factor_col = factor.data_ptr(), 0, 1
        return args

    with host.blocks(x=((WIDE[1] - 1) // 256, END), y=(8, 9)):
        host.run(op, 0, arguments(large, c))
    end = c[last].contiguous()
    loader.run(op, torch.device("cpu"), arguments(few, end))
    same_bits(large[0][runs, last], few[0], "W")


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_norms_beyond_2_31(host: Host, by_column: bool) -> None:
    """The last columns, in the first and in the last row."""
    shape = WIDE[::-1] if by_column else WIDE
    x = sparse(WIDE, FORMAT)
    x = x.t() if by_column else x
    ends = torch.randn(2, 8).to(FORMAT)
    x[0, -8:], x[-1, -8:] = ends
    first = (shape[1] - 1) // (8 if by_column else 32)
    with host.blocks(x=(first, END)):
        (found,) = host.call("column_norms", {"xs": [host.mark(x, 0)]})
    expected = ends.double().square().sum(0).sqrt()
    assert_close(found.as_subclass(Tensor)[0, -8:], expected, torch.float32)


# ---------------------------------------------------------------- grids


def of_rows(op: str, rows: int) -> dict[str, Any]:
    """A matrix of three columns, every third row of it picked."""
    if op != "coordinate_add_":
        return cases.matrices(op, torch.float32, shapes=[(rows, 3)])
    index = torch.arange(0, rows, 3, dtype=torch.int32)
    return {
        **cases.matrices(op, torch.float32, shapes=[(1, 3)]),
        **{name: [torch.randn(rows, 3)] for name in ("params", "grads")},
        "indices": [index],
        "updates": [torch.randn(len(index), 3)],
    }


def of_columns(op: str, columns: int) -> dict[str, Any]:
    """The same, stored by columns."""
    a = cases.matrices(op, torch.float32, shapes=[(3, columns)], how="columns")
    if op == "coordinate_add_":  # N as W, or Python cuts W into strips
        a["updates"] = [x.t().contiguous().t() for x in a["updates"]]
    return a


WHOLE = [pytest.param(True, marks=pytest.mark.slow, id="whole"), pytest.param(False, id="few")]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("make", [of_rows, of_columns])
@pytest.mark.parametrize("op", cases.APPLIES)
def test_more_rows_than_a_grid_has(
    host: Host, op: str, make: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many stored rows: a block each, and the last five for the first blocks again."""
    monkeypatch.setattr(matrices, "TILE_ELEMENTS", 2**20)  # one launch
    a = make(op, LIMIT + 5)
    here, there = cases.on("cpu", a), host.place(a, 0)
    getattr(native, op)(*here.values())
    with host.blocks(y=(0, END if whole else 7)):
        host.call(op, there)
    assert [x.grid[1] for x in host.launches()] == [LIMIT]
    found, wanted = (x["params"][0].as_subclass(Tensor) for x in (there, here))
    if make is of_columns:
        found, wanted = found.t(), wanted.t()
    few = torch.tensor([*range(7), *range(LIMIT, LIMIT + 5)])
    same_bits(found[few], wanted[few], op)
    if whole:
        same_bits(found, wanted, op)


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_more_columns_than_65535_blocks_have(host: Host, by_column: bool, whole: bool) -> None:
    a_block = 8 if by_column else 32
    first = 0 if whole else LIMIT - 2
    x = torch.randn(2, (LIMIT + 2) * a_block + 3)
    x = x.t().contiguous().t() if by_column else x
    (wanted,) = native.column_norms([x])
    with host.blocks(x=(first, END)):
        (found,) = host.call("column_norms", {"xs": [host.mark(x, 0)]})
    part = slice(first * a_block, None)
    assert_close(found.as_subclass(Tensor)[:, part], wanted[:, part], torch.float32)
    assert host.launches()[0].grid[0] == LIMIT + 3


@pytest.mark.slow
def test_more_elements_than_the_largest_grid(host: Host) -> None:
    shape = (STEP * 5 + 3,)
    compare(host, "lion_direction_", cases.elementwise("lion_direction_", FORMAT, shapes=[shape]))
    x, out = torch.randn(shape), torch.zeros(shape, dtype=FORMAT)
    compare(host, "stochastic_round_", dict(enumerate([[x], [out], [5], [7], [33], [70], [3]])))


@pytest.mark.slow
def test_more_blocks_of_codes_than_the_largest_grid(host: Host) -> None:
    """Short ones: 81,920 and a rest for 2048 blocks of eight warps."""
    n = 2048 * 8 * 5 + 3
    codes, scales = torch.zeros(n, 3, dtype=torch.uint8), torch.zeros(n)
    table = dynamic_map(True, torch.device("cpu"))
    layout = [[n], [3], [3]]
    given = [[torch.randn(n, 3)], [codes], [scales], table, *layout]
    compare(host, "quantize_blockwise_", dict(enumerate(given)))
