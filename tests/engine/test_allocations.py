"""No full-size temporary in a step (M4): what torch allocates, from its own allocator's records."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.allocations import allocations
from lowrank_optim import FiraAdamW, GaLoreAdamW, ops
from lowrank_optim.ops import devices
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases

RANK = 8
OVERSAMPLE = 8
SHAPES = {"wide": (768, 3072), "tall": (3072, 768), "experts": (2, 768, 1536)}
DTYPES = (torch.float32, torch.bfloat16)


def low_rank_bytes(shape: tuple[int, ...], proj_type: str, rank: int) -> int:
    """Bytes of one basis and one coordinate, in float32."""
    view = matrix_view(shape, proj_type)
    assert view is not None
    return 4 * rank * (view.m + view.n) * (view.batch[0] if view.batch else 1)


def full_bytes(param: Tensor) -> int:
    return param.numel() * param.element_size()


@dataclass(frozen=True)
class Case:
    shape: str
    proj_type: str
    dtype: torch.dtype

    def optimizer(self, cls: type[LowRankOptimizer] = GaLoreAdamW, **options) -> LowRankOptimizer:
        param = torch.nn.Parameter(torch.randn(SHAPES[self.shape]).to(self.dtype))
        param.grad = torch.randn(SHAPES[self.shape]).to(self.dtype)
        group = {"params": [param], "rank": RANK, "proj_type": self.proj_type}
        return cls([group], weight_decay=0.1, **options)

    def __str__(self) -> str:
        return f"{self.shape}-{self.proj_type}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(shape, proj_type, dtype)
    for shape in SHAPES
    for proj_type in ("std", "left", "right", "full")
    for dtype in DTYPES
]


@functools.cache
def product_scratch(case: Case) -> int:
    """What torch's own products take for themselves: in bfloat16 70 to 310 kB, by machine.

    That of torch 2.6 into a tile, of factors that are transposed, has a copy of it in float32.
    """
    view = matrix_view(SHAPES[case.shape], case.proj_type)
    assert view is not None
    weight = view.of(torch.zeros(SHAPES[case.shape], dtype=case.dtype))
    rank = min(RANK, view.m, view.n)

    def zeros(rows: int, cols: int) -> torch.Tensor:
        return weight.new_zeros(*view.batch, rows, cols)

    left, right, low = zeros(view.m, rank), zeros(view.n, rank), zeros(rank, view.n)
    small = zeros(rank, rank)
    factors = (left, low) if weight.stride(-1) == 1 else (low.mT, left.mT)
    tile = zeros(max(1, ops.tiles.TILE_ELEMENTS // factors[1].shape[-1]), factors[1].shape[-1])

    def products() -> None:
        torch.matmul(factors[0][..., : tile.shape[-2], :], factors[1], out=tile)
        torch.matmul(left.mT, weight, out=low)
        torch.matmul(low, right, out=small)
        torch.matmul(small, right.mT, out=low)
        if weight.dim() == 2:
            weight.addmm_(left, low)
        else:
            weight.baddbmm_(left, low)

    return allocations(products).largest


def marked(rows: Sequence[tuple[Case, bool]]) -> list[Any]:
    """ "std" is the left side of what is wide, and the right one of what is tall."""
    named = {"wide": "left", "tall": "right", "experts": "std"}
    sides = {x: [y for y in ("std", "left", "right", "full") if y != named[x]] for x in SHAPES}

    def chosen(c: Case, rounding: bool) -> bool:
        """Every shape with every side, and each of them with every format."""
        own = sides[c.shape]
        if c.proj_type not in own:
            return False
        at = [*SHAPES].index(c.shape) + own.index(c.proj_type)
        return at % 3 == DTYPES.index(c.dtype) + rounding

    return [pytest.param(*row, marks=() if chosen(*row) else pytest.mark.slow) for row in rows]


ROUNDED = marked(
    # only bfloat16 weights are rounded
    [(c, False) for c in CASES] + [(c, True) for c in CASES if c.dtype == torch.bfloat16]
)


@pytest.mark.parametrize(("case", "rounding"), ROUNDED, ids=str)
def test_a_step_allocates_what_its_low_rank_parts_do(case: Case, rounding: bool) -> None:
    """Projected gradient, direction, their casts, and copies of moments: nothing grows with W.

    The moments are copied so that a step that fails can put them back. Stochastic rounding may hold
    tiles, of a size that does not depend on the matrix either.
    """
    optimizer = case.optimizer(projector="random", stochastic_rounding=rounding)
    optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    low = low_rank_bytes(SHAPES[case.shape], case.proj_type, RANK)
    # six tiles: the new weights, their bits, the noise, and what adds, masks and selects them
    tile = 4 * ops.tiles.TILE_ELEMENTS if rounding else 0
    scratch = product_scratch(case)
    found = allocations(optimizer.step)
    assert 0 < found.largest <= max(low, scratch, tile)
    assert found.peak <= 5 * low + scratch + 6 * tile
    if not rounding:
        assert found.peak < full_bytes(param) / 4


@pytest.mark.parametrize(("case", "rounding"), ROUNDED, ids=str)
def test_the_residual_of_fira_is_never_formed(case: Case, rounding: bool) -> None:
    """Coordinates, and one tile for the product that the fused pass reads; the release forms G - E.

    Two-sided coordinates are widened to ``(r, n)`` twice, once for the direction.
    """
    options = {"projector": "random", "stochastic_rounding": rounding, "alpha_mode": "paper"}
    optimizer = case.optimizer(FiraAdamW, **options)
    optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    low = low_rank_bytes(SHAPES[case.shape], "left" if case.proj_type == "full" else "std", RANK)
    low = max(low, low_rank_bytes(SHAPES[case.shape], case.proj_type, RANK))
    tile = 4 * ops.tiles.TILE_ELEMENTS
    scratch = product_scratch(case)
    found = allocations(optimizer.step)
    assert 0 < found.largest <= max(low, scratch, tile)
    assert found.largest < full_bytes(param) or tile >= full_bytes(param)
    assert found.peak <= 6 * low + scratch + (8 if rounding else 1) * tile


@pytest.mark.parametrize(
    "case",
    [pytest.param(x.values[0], marks=x.marks) for x in marked([(c, False) for c in CASES])],
    ids=str,
)
def test_a_refresh_allocates_what_its_sketch_does(case: Case) -> None:
    """A warm randomised refresh; a 16-bit gradient is cast a tile at a time, never whole."""
    optimizer = case.optimizer(projector="rsvd", update_proj_gap=1)
    optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    found = allocations(optimizer.step)
    sketch = low_rank_bytes(SHAPES[case.shape], case.proj_type, RANK + OVERSAMPLE)
    tile = 4 * param.numel() // 8 if case.dtype == torch.bfloat16 else 0
    assert 0 < found.largest <= max(sketch, tile)
    # of sketch, image, whitened image and rotation, each one side or the other of `sketch`, beside
    # the basis and the moments as they were, for a step that fails
    assert found.peak <= 6 * sketch + tile
    assert found.peak < full_bytes(param) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accelerated", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(("state_dtype", "tiles"), [("8bit", 5), ("bfloat16", 7), ("4bit", 7)])
def test_a_dense_step_allocates_tiles(
    state_dtype: Any,
    tiles: int,
    accelerated: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile in float32 of the gradient, the direction, its product and the weights, new and old.

    Of moments in bfloat16 or in 4 bits, which are copied to be read, two tiles more. Tiles are
    those of the device, 64 times as large on an accelerator.
    """
    assert ops.tiles.ACCELERATOR_TILE_ELEMENTS == 64 * ops.tiles.TILE_ELEMENTS
    monkeypatch.setattr(devices, "HOSTS", frozenset() if accelerated else devices.HOSTS)
    small, large = (1 << 12, 1 << 15)
    monkeypatch.setattr(ops.tiles, "TILE_ELEMENTS", small)
    monkeypatch.setattr(ops.tiles, "ACCELERATOR_TILE_ELEMENTS", large)
    param = torch.nn.Parameter(torch.randn(1024, 256).to(dtype))
    param.grad = torch.randn(1024, 256).to(dtype)
    # not as torch steps: its moments are wider, or decoded
    optimizer = GaLoreAdamW([{"params": [param], "rank": None}], state_dtype=state_dtype)
    optimizer.step()
    found = allocations(optimizer.step)
    tile = 4 * (large if accelerated else small)
    scales = tile // 32 if state_dtype == "4bit" else 0  # four of each block of 128
    assert tile <= found.largest + 64 and found.largest <= tile + scales
    assert found.peak <= tiles * tile + 8192 < full_bytes(param) * (4 if dtype.itemsize == 2 else 2)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "4bit"])
@pytest.mark.parametrize("shape", [(70, 129), (9, 8, 130)], ids=str)
def test_a_tile_is_rounded_as_the_whole(
    shape: tuple[int, ...], state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a moment becomes depends on its place in the whole, and on no tile."""
    found = []
    for size in (1 << 20, 1500, 129):
        monkeypatch.setattr(ops.tiles, "TILE_ELEMENTS", size)
        param = cases.parameter(shape, torch.bfloat16)
        optimizer = GaLoreAdamW([{"params": [param], "rank": None}], state_dtype=state_dtype)
        cases.run(optimizer, [param], [[g] for g in cases.gradients(shape, 4, torch.bfloat16)])
        found.append([param.detach(), *(optimizer.state[param].values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_size_update_is_seen(dtype: torch.dtype, monkeypatch) -> None:
    """The count is not blind: ``W -= lr P N``, as the release writes it, is caught."""

    def lift_add_(param, basis, low, right, decay, alpha, rounding) -> None:
        param.mul_(decay)
        param += alpha * (basis @ low.to(param.dtype))

    case = Case("wide", "std", dtype)
    optimizer = case.optimizer(projector="random")
    optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    monkeypatch.setattr(ops, "lift_add_", lift_add_)
    found = allocations(optimizer.step)
    low = low_rank_bytes(SHAPES["wide"], "std", RANK)
    assert found.largest == full_bytes(param) > low
    assert found.peak >= 2 * full_bytes(param) > 3 * low


def test_a_gradient_cast_whole_is_seen() -> None:
    """A temporary inside an operator counts too: here the cast of a bfloat16 reduction's input."""
    grad = torch.randn(512, 2048).bfloat16()
    found = allocations(lambda: grad.float().square().sum())
    assert found.largest == 4 * grad.numel()
    assert found.peak == pytest.approx(8 * grad.numel(), rel=0.01)
    inner = allocations(lambda: torch.linalg.qr(torch.randn(64, 64)))
    assert inner.peak >= 3 * 4 * 64 * 64
