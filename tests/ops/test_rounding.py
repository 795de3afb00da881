"""The noise of stochastic rounding is of a seed and of where an entry lies in the whole tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops import bitsandbytes, cosine, native, reference
from lowrank_optim.ops.noise import Noise
from lowrank_optim.subspaces import coordinate, dct, entries
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import matrix_view
from tests.ops.rounding import LAYOUTS, positions, rounded

needs_native = pytest.mark.skipif(not native.available("cpu")[0], reason="no native library")
BACKENDS = {"reference": reference, "native": native, "bitsandbytes": bitsandbytes}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


@needs_native
@pytest.mark.parametrize("name", BACKENDS)
def test_positions_are_those_of_the_definition(name: str) -> None:
    """All layouts in one call, and numbers of all sizes."""
    draw = torch.Generator().manual_seed(0)
    count = 4000
    scale = 10.0 ** torch.randint(-30, 30, (len(LAYOUTS), count), generator=draw)
    xs = list((torch.randn(len(LAYOUTS), count, generator=draw) * scale).unbind())
    outs = [torch.empty(count, dtype=torch.bfloat16) for _ in xs]
    seeds = [17 * i + 2**31 for i in range(len(xs))]
    columns = [list(x) for x in zip(*LAYOUTS.values(), strict=True)]
    BACKENDS[name].stochastic_round_(xs, outs, seeds, *columns)
    for x, out, seed, place in zip(xs, outs, seeds, LAYOUTS.values(), strict=True):
        assert torch.equal(bits(out), bits(rounded(x, seed, positions(count, *place)))), place


@needs_native
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layout_that_is_none_is_refused(name: str) -> None:
    module: ModuleType = BACKENDS[name]
    x, out = torch.ones(4), torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a row has at least one entry"):
        module.stochastic_round_([x], [out], [1], [0], [0], [0], [1])
    with pytest.raises(ValueError, match="2 offsets for 1 tensors"):
        module.stochastic_round_([x], [out], [1], [0, 0], [4], [0], [1])
    assert not out.any()


@given(st.data())
def test_a_piece_rounds_as_in_the_whole(data: st.DataObject) -> None:
    """Any box of any tensor, transposed or not."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    whole = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = ops.stochastic_round(whole, Noise.over(9, shape))
    flat = rounded(whole, 9, range(math.prod(shape)))
    assert torch.equal(bits(expected), bits(flat))
    corner, box = [], []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        corner.append(start)
        box.append(slice(start, data.draw(st.integers(start, size))))
    piece, noise = whole[tuple(box)], Noise.over(9, shape, corner)
    assert torch.equal(bits(ops.stochastic_round(piece, noise)), bits(expected[tuple(box)]))
    if len(shape) > 1:
        turned = ops.stochastic_round(piece.mT, noise.mT)
        assert torch.equal(bits(turned), bits(expected[tuple(box)].mT))
        if len(piece):
            one = ops.stochastic_round(piece[-1], noise.select(len(piece) - 1))
            assert torch.equal(bits(one), bits(expected[tuple(box)][-1]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 5), (4, 3, 2, 2)], ids=str)
def test_a_view_has_the_positions_of_what_is_stored(shape: tuple[int, ...], side: str) -> None:
    view = matrix_view(shape, side)
    assert view is not None
    x = 1 + torch.rand(shape)
    expected = ops.stochastic_round(x, Noise.over(3, shape))
    found = ops.stochastic_round(view.of(x), view.noise(Noise.over(3, shape)))
    assert torch.equal(bits(found), bits(view.of(expected)))


def test_merged_dimensions_that_are_no_interval_are_refused() -> None:
    view = matrix_view((4, 3, 2, 1))  # of a kernel whose last two were (2, 2)
    assert view is not None
    with pytest.raises(ValueError, match="no rows and columns"):
        view.noise(Noise(0, 0, (12, 4, 2, 1)))


# ---------------------------------------------------------------- what is applied in tiles

M, N, R = 24, 20, 3
SHAPES = {"matrix": (M, N), "experts": (2, M, N), "transposed": (N, M)}
Push = Callable[[Tensor, Tensor, Noise], None]


def whole(*shape: int, seed: int) -> Tensor:
    """Multiples of an eighth: products of them are exact in any order."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=draw).float() / 8


def pushes(batch: tuple[int, ...]) -> dict[str, Push]:
    """Everything that rounds weights, of one step of canonical ``(..., m, n)``."""
    basis, low = whole(*batch, M, R, seed=1), whole(*batch, R, N, seed=2)
    right, small = whole(*batch, N, R, seed=3), whole(*batch, R, R, seed=4)
    columns = whole(*batch, 1, N, seed=5)
    finite = torch.tensor(True)
    index = torch.tensor([1, 5, 11], dtype=torch.int32)

    def term(w: Tensor, g: Tensor, noise: Noise, own: Tensor | None) -> None:
        ops.lift_add_term_(w, g, basis, low, low, own, 0.5, 0.5, 2.0**-9, 1.0, noise, finite)

    def into(w: Tensor, g: Tensor, noise: Noise) -> Target:
        return Target(w, g, low, 2.0**-9, 0.5, noise)

    def fast(w: Tensor, g: Tensor, noise: Noise) -> None:
        space = dct.DCT(R, transform="fft", columns=None)
        at = index if not batch else index.expand(2, R)
        space.push_(into(w, g, noise), {"basis_index": at}, {"low": low}, None)

    def rows(w: Tensor, g: Tensor, noise: Noise) -> None:
        at = {"index": index if not batch else index.expand(2, R)}
        coordinate.Coordinates(R).push_(into(w, g, noise), at, {"low": low}, Term("sign", gain=0.5))

    def randk(w: Tensor, g: Tensor, noise: Noise) -> None:
        own = {"key": torch.tensor(5)}
        update = {"low": low.flatten(-2).unsqueeze(-2)}
        entries.RandK(R * N).push_(into(w, g, noise), own, update, None)

    return {
        "one side": lambda w, g, noise: ops.lift_add_(w, basis, low, None, 0.5, 2.0**-9, noise),
        "two sides": lambda w, g, noise: ops.lift_add_(w, basis, small, right, 0.5, 2.0**-9, noise),
        "scaled": lambda w, g, noise: term(w, g, noise, columns),
        "sign": lambda w, g, noise: term(w, g, noise, None),
        "rows": rows,
        "entries": randk,
        "dct": fast,
    }


NAMES = list(pushes(()))


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_tiles_do_not_show(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the tile; what is rounded is what a float32 weight would be."""
    stored = SHAPES[layout]
    view = matrix_view(stored, "right" if layout == "transposed" else "left")
    assert view is not None
    push, noise = pushes(view.batch)[name], view.noise(Noise.over(5, stored))
    start = whole(*stored, seed=7).to(torch.bfloat16)
    grad = whole(*stored, seed=8).to(torch.bfloat16)
    found = []
    for size in (1 << 18, 3 * N, 1):
        for module, key in ((ops.tiles, "TILE_ELEMENTS"), (entries, "TILE")):
            if name != "entries" or module is not entries:  # its draws are of its tiles
                monkeypatch.setattr(module, key, size)
        monkeypatch.setitem(cosine.TILE_ELEMENTS, False, size)
        w = start.clone()
        push(view.of(w), view.of(grad), noise)
        found.append(w)
    exact = start.float()
    push(view.of(exact), view.of(grad.float() if name == "dct" else grad), noise)
    expected = ops.stochastic_round(exact, Noise.over(5, stored))
    assert not torch.equal(exact, start.float())
    for w in found:
        if name == "dct":  # its products are not exact in float32
            assert (bits(w) == bits(found[0])).double().mean() > 0.99
            assert (bits(w) == bits(expected)).double().mean() > 0.99
        else:
            assert torch.equal(bits(w), bits(expected))


def test_pieces_of_equal_shape_draw_different_noise() -> None:
    x = torch.full((4, 512), 1 + 2**-8)  # midway between two numbers
    first, second = (
        ops.stochastic_round(x, Noise.over(3, (8, 512), (row, 0))).float() > 1 for row in (0, 4)
    )
    alike = float((first == second).double().mean())
    assert abs(alike - 0.5) < 5 * (0.25 / x.numel()) ** 0.5


@pytest.mark.parametrize("corner", [(0, 0), (512, 0), (0, 512), (2**20, 2**20)], ids=str)
def test_a_shard_is_rounded_without_bias(corner: tuple[int, int]) -> None:
    """Five standard errors of the mean, for shards of rows, of columns, and far in the whole."""
    for fraction, seed in itertools.product((0.1, 0.5, 0.9), range(3)):
        x = torch.full((256, 512), 1 + fraction * 2**-7)
        noise = Noise.over(seed, (2**21, 2**21), corner)
        up = (ops.stochastic_round(x, noise).double() - 1) * 2**7
        assert set(up.unique().tolist()) == {0.0, 1.0}
        error = (fraction * (1 - fraction) / x.numel()) ** 0.5
        assert abs(float(up.mean()) - fraction) < 5 * error
        for own in (up.mean(0), up.mean(1)):  # nor is any row or column of them one number
            assert float((own - fraction).abs().max()) < 8 * error * own.numel() ** 0.5
