"""The C library against straight-line float64 code, bitsandbytes' codes, threads and vector widths.

Non-finite numbers: a NaN or infinite gradient makes that element of a float32 moment non-finite and
no other; in an 8-bit moment its whole block reads back as NaN (the block's scale is not finite).
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import native
from lowrank_optim.ops.native import loader
from tests import runs
from tests.ops import ops_cases, ops_cosines
from tests.ops.rounding import flat_places, nearest_codes

AVAILABLE, REASON = native.available("cpu")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Empty; below, at and above one vector of 16 and of 64; tails; more than one task of 2**15.
SIZES = [(0,), (1,), (15,), (16,), (65,), (3, 257), (5, 1, 67), (129, 300)]


def dynamic_map(signed: bool) -> Tensor:
    """The dynamic map of 8-bit optimizers by its definition: decades of 2^i (2^(i+1)) means."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1, dtype=torch.float32)
        means = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def layout_of(shape: tuple[int, ...], block: int = 256) -> tuple[int, int, int]:
    """Rows, cols and block of a shape: long rows one by one, short ones grouped."""
    numel, last = torch.Size(shape).numel(), shape[-1]
    if last >= 256:
        return numel // last, last, block
    return 1, numel, max(1, 256 // max(last, 1)) * max(last, 1)


def blocks_of(x: Tensor, layout: tuple[int, int, int]) -> list[Tensor]:
    rows, cols, block = layout
    return [b for row in x.reshape(rows, cols) for b in row.split(block)] if x.numel() else []


def quantize(x: Tensor, table: Tensor, layout: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Straight line, in float32 as it is defined: bisect ``x * (1 / absmax)`` among midpoints."""
    bounds = (table[1:] + table[:-1]) * 0.5
    codes, scales = [], []
    for block in blocks_of(x, layout):
        absmax = block.abs().max()
        unit = torch.zeros_like(block) if absmax == 0 else block * (1 / absmax)
        codes.append(torch.bucketize(unit, bounds).to(torch.uint8))
        scales.append(absmax)
    if not codes:
        return x.new_zeros(x.shape, dtype=torch.uint8), x.new_zeros(0)
    return torch.cat(codes).reshape(x.shape), torch.stack(scales)


def dequantize(
    codes: Tensor, scales: Tensor, table: Tensor, layout: tuple[int, int, int]
) -> Tensor:
    parts = [table[c.long()] * s for c, s in zip(blocks_of(codes, layout), scales, strict=True)]
    return torch.cat(parts).reshape(codes.shape) if parts else codes.float()


def close(actual: Tensor, expected: Tensor, scale: Tensor | float = 0.0) -> None:
    """Within 1e-6 of ``scale`` and 1e-5 of the value for float32; a unit of narrow formats."""
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[actual.dtype]
    floor = 6e-8 if actual.dtype == torch.float16 else 1e-38
    bound = unit * expected.abs() + 1e-6 * torch.as_tensor(scale).double() + floor
    a, e = actual.double(), expected.double()
    wrong = ~(((a - e).abs() <= bound) | (a == e) | (a.isnan() & e.isnan()))
    assert not wrong.any(), (a[wrong][:4], e[wrong][:4], int(wrong.sum()))


def adamw64(g: Tensor, m: Tensor, v: Tensor, eps: Tensor | float, scale: Tensor | float = 1.0):
    g, m, v = g.double(), m.double(), v.double()
    m = m + 0.1 * (g - m)
    v = 0.999 * v + 0.001 * g * g
    return m, v, scale * m / (v.sqrt() + eps)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_direction(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    grads = [torch.randn(s).to(dtype) for s in SIZES]
    m, v = [torch.randn(s) for s in SIZES], [torch.rand(s) for s in SIZES]
    outs = [torch.empty(s, dtype=out_dtype) for s in SIZES]
    expected = [adamw64(g, a, b, 1e-3) for g, a, b in zip(grads, m, v, strict=True)]
    native.adamw_direction_(grads, m, v, outs, 0.9, 0.999, [1e-3] * len(SIZES), [], [], [])
    for a, b, out, (m64, v64, out64) in zip(m, v, outs, expected, strict=True):
        close(a, m64, 1.0)
        close(b, v64)
        close(out, out64, 1.0)


@pytest.mark.parametrize("bits", [8, 32])
def test_adamw_direction_per_row_and_unsound(bits: int) -> None:
    """Each row its own eps and scale; an unsound gradient (here NaN) leaves the state, out is 0."""
    shapes = [(7, 33), (4, 300), (6, 40)]
    grads = [torch.randn(s) for s in shapes]
    grads[2].fill_(float("nan"))
    eps = [torch.rand(s[0]) + 1e-3 for s in shapes]
    scale = [torch.rand(s[0]) for s in shapes]
    finite = [torch.tensor(True), torch.tensor(True), torch.tensor(False)]
    outs = [torch.full(s, 9.0) for s in shapes]
    m, v = [torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes]
    if bits == 32:
        old = [x.clone() for x in m]
        native.adamw_direction_(grads, m, v, outs, 0.9, 0.999, [], eps, scale, finite)
        kept = torch.equal(m[2], old[2])
    else:
        layouts = [layout_of(s) for s in shapes]
        c1, s1 = map(list, zip(*map(lambda x, y: quantize(x, SIGNED, y), m, layouts), strict=True))
        c2, s2 = map(
            list, zip(*map(lambda x, y: quantize(x, UNSIGNED, y), v, layouts), strict=True)
        )
        old = [dequantize(c, s, SIGNED, y) for c, s, y in zip(c1, s1, layouts, strict=True)]
        v = [dequantize(c, s, UNSIGNED, y) for c, s, y in zip(c2, s2, layouts, strict=True)]
        before = c1[2].clone()
        rcb = [list(x) for x in zip(*layouts, strict=True)]
        native.adamw_direction_8bit_(
            grads, c1, s1, c2, s2, outs, SIGNED, UNSIGNED, *rcb, 0.9, 0.999, [], eps, scale, finite
        )
        kept = torch.equal(c1[2], before)
        for k in range(2):
            *_, out64 = adamw64(grads[k], old[k], v[k], eps[k][:, None], scale[k][:, None])
            close(outs[k], out64, 1.0)
    if bits == 32:
        m0 = old
        m64, _, _ = adamw64(grads[0], m0[0], v[0], 1.0)
        close(m[0], m64, 1.0)
        row = m[0].double() * scale[0][:, None] / (v[0].double().sqrt() + eps[0][:, None])
        close(outs[0], row, 1.0)
    assert kept
    assert torch.equal(outs[2], torch.zeros(shapes[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lion_and_moment(dtype: torch.dtype) -> None:
    grads = [torch.randn(s).to(dtype) for s in SIZES]
    start = [torch.randn(s) for s in SIZES]
    m, outs = [x.clone() for x in start], [torch.empty(s, dtype=dtype) for s in SIZES]
    native.lion_direction_(grads, m, outs, 0.9, 0.99, [])
    for g, a, b, out in zip(grads, start, m, outs, strict=True):
        look = a.double() + (1 - 0.9) * (g.double() - a.double())
        firm = look.abs() > 1e-6  # a sign within rounding of zero may be either
        assert torch.equal(out.double()[firm], look.sign()[firm])
        close(b, a.double() + (1 - 0.99) * (g.double() - a.double()), 1.0)
    m = [x.clone() for x in start]
    native.moment_(grads, m, outs, 0.5, 2.0, [])
    for g, a, b, out in zip(grads, start, m, outs, strict=True):
        close(b, 0.5 * a.double() + 2.0 * g.double(), 4.0)
        assert torch.equal(out, b.to(dtype))  # one rounding, to nearest even, as torch's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_8bit_updates_are_decode_update_encode(dtype: torch.dtype) -> None:
    """Same bits as the three steps apart, with the float32 op between: one pass changes nothing."""
    shapes = [s for s in SIZES if s != (0,)]
    layouts = [layout_of(s) for s in shapes]
    rcb = [list(x) for x in zip(*layouts, strict=True)]
    grads = [torch.randn(s).to(dtype) for s in shapes]
    starts = [torch.randn(s) * 10 ** torch.randn(s) for s in shapes]
    pairs = [quantize(x, SIGNED, y) for x, y in zip(starts, layouts, strict=True)]
    pairs2 = [quantize(x.square(), UNSIGNED, y) for x, y in zip(starts, layouts, strict=True)]
    for name in ("adamw", "lion", "moment"):
        c, s = [x.clone() for x, _ in pairs], [x.clone() for _, x in pairs]
        c2, s2 = [x.clone() for x, _ in pairs2], [x.clone() for _, x in pairs2]
        m = [dequantize(a, b, SIGNED, y) for a, b, y in zip(c, s, layouts, strict=True)]
        v = [dequantize(a, b, UNSIGNED, y) for a, b, y in zip(c2, s2, layouts, strict=True)]
        outs, wide = ([torch.empty(x, dtype=dtype) for x in shapes] for _ in range(2))
        eps = [1e-8] * len(shapes)
        if name == "adamw":
            native.adamw_direction_(grads, m, v, wide, 0.9, 0.999, eps, [], [], [])
            native.adamw_direction_8bit_(
                grads, c, s, c2, s2, outs, SIGNED, UNSIGNED, *rcb, 0.9, 0.999, eps, [], [], []
            )
        elif name == "lion":
            native.lion_direction_(grads, m, wide, 0.9, 0.99, [])
            native.lion_direction_8bit_(grads, c, s, outs, SIGNED, *rcb, 0.9, 0.99, [])
        else:
            native.moment_(grads, m, wide, 0.9, 1.0, [])
            native.moment_8bit_(grads, c, s, outs, SIGNED, *rcb, 0.9, 1.0, [])
        for k, y in enumerate(layouts):
            assert torch.equal(outs[k], wide[k])
            codes, scales = quantize(m[k], SIGNED, y)
            assert torch.equal(c[k], codes) and torch.equal(s[k], scales)
            if name == "adamw":
                codes, scales = quantize(v[k], UNSIGNED, y)
                codes = torch.where((codes == 0) & (v[k] > 0), 1, codes)  # no square vanishes
                assert torch.equal(c2[k], codes) and torch.equal(s2[k], scales)


def hard_data(table: Tensor, kind: str) -> Tensor:
    """Rows of 256 whose largest entry is 1, so that normalised values are the data itself."""
    if kind == "random":
        return torch.randn(64, 256)
    if kind == "heavy":
        return torch.randn(64, 256) * torch.exp(4 * torch.randn(64, 256))
    if kind == "constant":
        return torch.tensor([1.0, -1.0, 0.0, 1e30, -1e30, 3e-39, 1e-45])[:, None].expand(7, 256)
    if kind == "spread":
        return torch.randn(64, 256) * 10.0 ** torch.randint(-30, 30, (64, 1))
    middles = (table[1:] + table[:-1]) * 0.5
    steps = [middles]
    for towards in (2.0, -2.0):
        x = middles
        for _ in range(3):
            x = torch.nextafter(x, torch.tensor(towards))
            steps.append(x)
    near = torch.cat(steps)
    near = torch.cat([near, near.new_zeros(-near.numel() % 255)]).reshape(-1, 255)
    return torch.cat([torch.ones(len(near), 1), near], 1)


@pytest.mark.parametrize("kind", ["random", "heavy", "constant", "spread", "midpoints"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_are_nearest(signed: bool, kind: str) -> None:
    """Exact on ties and next to them: a tie takes the lower code."""
    table = SIGNED if signed else UNSIGNED
    x = hard_data(table, kind)
    x = (x if signed else x.abs()).contiguous()
    rows, cols = x.shape
    for width in (256, 250, 67):  # whole vectors, and tails of 58 and 3
        part = x[:, :width].contiguous()
        codes, scales = torch.empty(part.shape, dtype=torch.uint8), torch.empty(rows)
        native.quantize_blockwise_([part], [codes], [scales], table, [rows], [width], [256])
        ours, back = codes, torch.empty(part.shape)
        assert torch.equal(scales, part.abs().amax(1))
        normal = scales >= 1.2e-38  # below, 1 / scale overflows: straight-line float32 cannot say
        expected, _ = quantize(part, table, (rows, width, 256))
        assert torch.equal(ours[normal], expected[normal])
        unit = part.double() / scales.double().clamp_min(1e-300)[:, None]
        gap = (unit[..., None] - table.double()).abs()
        best = gap.min(-1).values
        taken = gap.gather(-1, ours.long()[..., None])[..., 0]
        assert ((taken - best) <= 1e-6 * unit.abs()).all()
        native.dequantize_blockwise_([ours], [scales], [back], table, [rows], [width], [256])
        assert torch.equal(back, table[ours.long()] * scales[:, None])
    assert cols == 256


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_equal_bitsandbytes(signed: bool) -> None:
    """Scales are equal to bitsandbytes' and codes to its exact search.

    Its CPU kernel for float32 (0.50) rounds x to 65536 uniform bins of [-1, 1] first, so 0 does not
    keep the code of 0 and 10-16 % of codes are not nearest; its path for other dtypes (reached here
    with float64) takes the nearest entry. Ours is the latter, and of the former within one bin.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.create_dynamic_map(signed=signed)
    assert torch.equal(table, SIGNED if signed else UNSIGNED)
    for kind in ("random", "heavy", "midpoints"):
        x = hard_data(table, kind)
        x = (x if signed else x.abs()).contiguous()
        rows = x.shape[0]
        codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(rows)
        native.quantize_blockwise_([x], [codes], [scales], table, [rows], [256], [256])
        theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), table, 256)
        assert torch.equal(scales, absmax)
        by_definition = nearest_codes(x, table, 256)
        assert torch.equal(theirs.view(-1), by_definition[0]) and torch.equal(
            absmax, by_definition[1]
        )
        unit = x.double() / scales.double()[:, None]
        middles = (table[1:].double() + table[:-1].double()) / 2
        near = (unit[..., None] - middles).abs().amin(-1) <= 1e-6 * unit.abs()
        assert torch.equal(codes[~near], theirs[~near])
        binned, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, table, 256)
        assert torch.equal(scales, absmax)
        bin_width = 1.01 / 65535
        low = torch.bucketize((unit - bin_width).float(), middles.float())
        high = torch.bucketize((unit + bin_width).float(), middles.float())
        assert ((binned.long() >= low) & (binned.long() <= high)).all()
        assert ((codes.long() >= low) & (codes.long() <= high)).all()


def test_bitsandbytes_float32_path_is_a_lattice() -> None:
    """Why codes are compared with bitsandbytes' float64 path.

    Its CPU library rounds ``x / scale`` to the nearest of 65,536 points of [-1, 1] and looks the
    code of that point up. Zero is not such a point: 0 in a block of scale 1 becomes 1.5e-5, and
    everything below 3e-5 of the scale loses the exponents the map has for it. So a nearest code is
    never further from the value, and 4 in 10 of these differ.
    """
    pytest.importorskip("bitsandbytes")
    x = torch.randn(64, 256) * torch.exp(3 * torch.randn(64, 256))
    x[0, :2] = torch.tensor([0.0, 1.0])
    theirs, scales = torch.ops.bitsandbytes.quantize_blockwise(x, SIGNED, 256)
    exact = nearest_codes(x, SIGNED, 256)[0].view(x.shape)
    unit = x * (1 / scales)[:, None]
    point = (((unit.clamp(-1, 1) + 1) * 0.5) * 65535 + 0.5).int() / 65535 * 2 - 1
    nearest = (point.reshape(-1, 1) - SIGNED).abs().argmin(1).view(x.shape)
    assert torch.equal(theirs.int(), nearest.int())
    gap = [(SIGNED[c.long()] - unit).abs() for c in (exact, theirs)]
    assert (gap[0] <= gap[1] + 1e-7).all() and float((exact != theirs).float().mean()) > 0.2


def test_blocks_of_zeros_and_of_nonfinite() -> None:
    x = torch.randn(4, 256)
    x[0] = 0
    x[1, 7] = float("nan")
    x[2, 9] = float("-inf")
    codes, scales = torch.empty(4, 256, dtype=torch.uint8), torch.empty(4)
    native.quantize_blockwise_([x], [codes], [scales], SIGNED, [4], [256], [256])
    assert scales[0] == 0 and (codes[0] == 127).all() and SIGNED[127] == 0
    assert scales[1].isnan() and scales[2] == float("inf")
    back = torch.empty(4, 256)
    native.dequantize_blockwise_([codes], [scales], [back], SIGNED, [4], [256], [256])
    assert back[0].eq(0).all() and back[1:3].isnan().all() and back[3].isfinite().all()


def test_a_map_that_is_not_dynamic() -> None:
    """Any sorted map works: dense near zero, the tables do not fit and a search takes over."""
    table = torch.cat([torch.linspace(-1e-3, 1e-3, 255), torch.ones(1)])
    x = torch.cat([torch.ones(3, 1), torch.randn(3, 255) * 1e-3], 1)
    codes, scales = torch.empty(3, 256, dtype=torch.uint8), torch.empty(3)
    native.quantize_blockwise_([x], [codes], [scales], table, [3], [256], [256])
    assert torch.equal(codes, quantize(x, table, (3, 256, 256))[0])


def test_huge_and_denormal() -> None:
    """1e30 squared overflows float32: v is infinite and out 0, as the formula has it."""
    g = torch.tensor([1e30, 1e-30, 1e-42, 0.0, float("inf"), float("nan")])
    m, v, out = torch.zeros(6), torch.zeros(6), torch.empty(6)
    native.adamw_direction_([g], [m], [v], [out], 0.9, 0.999, [1e-8], [], [], [])
    close(m[:4], 0.1 * g[:4].double(), 1e-38)
    assert v[0] == float("inf") and out[0] == 0 and out[3] == 0
    assert m[4] == float("inf") and out[4].isnan() and out[5].isnan()
    close(out[1:2], m[1:2].double() / 1e-8)


def test_stochastic_rounding_is_the_hash() -> None:
    def reference(x: Tensor, seed: int) -> Tensor:
        mask = 0xFFFFFFFF
        h = (torch.arange(x.numel()) ^ (seed & mask)) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            h = h ^ (h >> shift)
            h = (((h >> 16) * factor << 16) + (h & 0xFFFF) * factor) & mask
        bits = (x.view(torch.int32).long() & mask) + (h & 0xFFFF)
        high = (bits >> 16) & 0xFFFF
        narrow = torch.where(high > 32767, high - 65536, high).to(torch.int16).view(torch.bfloat16)
        return torch.where(x.isfinite(), narrow, x.to(torch.bfloat16))

    xs = [torch.randn(n) * 10.0 ** torch.randint(-30, 30, (n,)) for n in (0, 1, 17, 40000)]
    xs[2][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    outs = [torch.empty(x.shape, dtype=torch.bfloat16) for x in xs]
    seeds = [1, 2**31 + 5, -3, 12345]
    native.stochastic_round_(xs, outs, seeds, *flat_places(xs))
    for x, out, seed in zip(xs, outs, seeds, strict=True):
        expected = reference(x, seed)
        finite = x.isfinite()
        assert torch.equal(out[finite].view(torch.int16), expected[finite].view(torch.int16))
        assert torch.equal(out[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0))
    ones = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    out = torch.empty(ones.shape, dtype=torch.bfloat16)
    native.stochastic_round_([ones], [out], [7], *flat_places([ones]))
    assert abs(float((out > 1).double().mean()) - 0.125) < 5 * (0.125 * 0.875 / 200_000) ** 0.5


def views(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """One matrix in every layout: rows, columns, a slice of each, and every other column."""
    m, n = shape
    return [
        torch.randn(m, n).to(dtype),
        torch.randn(n, m).to(dtype).T,
        torch.randn(m + 2, n + 3).to(dtype)[1:-1, :n],
        torch.randn(n + 3, m + 2).to(dtype)[:n, 1:-1].T,
        torch.randn(m, 2 * n).to(dtype)[:, ::2],
    ]


MATRICES = [(1, 1), (17, 33), (33, 17), (70, 520), (520, 70)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_column_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    xs = views(shape, dtype)
    xs.append(torch.randn(2, 3, *shape).to(dtype))
    if dtype == torch.float32:
        xs.append(torch.randn(shape) * 1e30)  # squares beyond float32
    for x, norms in zip(xs, native.column_norms(xs), strict=True):
        assert norms.shape == (*shape[:0], *x.shape[:-2], 1, shape[1])
        close(norms, x.double().square().sum(-2, keepdim=True).sqrt())


def low_rank(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = shape
    r = max(1, min(m, n) // 4)
    basis = torch.linalg.qr(torch.randn(m, r))[0].to(dtype)
    return basis, torch.randn(r, n), torch.randn(r, n), torch.rand(1, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_fused_applies(shape: tuple[int, int], dtype: torch.dtype, monkeypatch) -> None:
    """Every layout of W; G as W, or in the other order; tiles smaller than the matrix."""
    monkeypatch.setattr(native.matrices, "TILE_ELEMENTS", 700)
    p, n, r, c = low_rank(shape, dtype)
    decay, lr, scale, gain = 0.99, 0.1, 0.25, 0.5
    # The GEMM's operands and result are rounded to W's format, W once more at the end.
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for w, g in zip(views(shape, dtype), reversed(views(shape, dtype)), strict=True):
        old, g64 = w.double(), g.double()
        native.lift_add_scaled_([w], [g], [p], [n], [r], [c], decay, lr, scale)
        low = p.double() @ (scale * (n.double() - r.double() * c))
        expected = decay * old - lr * (low + g64 * c)
        assert ((w.double() - expected).abs() <= unit * (1 + expected.abs())).all()

        old = w.double()
        native.lift_add_sign_([w], [g], [p], [n], [r], decay, lr, scale, gain)
        inside = p.double() @ r.to(dtype).double()
        firm = (g64 - inside).abs() > 8 * unit * (1 + inside.abs())
        expected = decay * old - lr * (
            scale * (p.double() @ n.double()) + gain * (g64 - inside).sign()
        )
        assert ((w.double() - expected).abs() <= unit * (1 + expected.abs()))[firm].all()
        assert firm.double().mean() > 0.5 or firm.numel() == 1


@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coordinate_add(dtype: torch.dtype, free: str) -> None:
    f = {"sign": torch.sign, "sgd": lambda x: x, "none": torch.zeros_like}[free]
    for shape in [*MATRICES, (2100, 5)]:  # more picked rows than one buffer of saved values
        for w, g in zip(views(shape, dtype), reversed(views(shape, dtype)), strict=True):
            k = max(1, shape[0] * 3 // 5)
            index = torch.randperm(shape[0])[:k].sort().values
            low, old = torch.randn(k, shape[1]), w.double()
            native.coordinate_add_([w], [g], [index.int()], [low], 0.99, 0.1, 0.25, 0.5, free)
            expected = 0.99 * old - 0.1 * 0.5 * f(g.double())
            expected[index] = 0.99 * old[index] - 0.1 * 0.25 * low.double()
            close(w, expected, 1.0)


def test_batches_of_matrices() -> None:
    """`(..., m, n)` is each matrix by itself."""
    w, g = torch.randn(3, 8, 12), torch.randn(3, 8, 12)
    p, n, r = torch.randn(3, 8, 2), torch.randn(3, 2, 12), torch.randn(3, 2, 12)
    c = torch.rand(3, 1, 12)
    for op, more in (("scaled", ([c], 0.9, 0.1, 0.5)), ("sign", (0.9, 0.1, 0.5, 1.0))):
        call = getattr(native, f"lift_add_{op}_")
        batch, single = w.clone(), w.clone()
        call([batch], [g], [p], [n], [r], *more)
        for k in range(3):
            part = ([c[k]], *more[1:]) if op == "scaled" else more
            call([single[k]], [g[k]], [p[k]], [n[k]], [r[k]], *part)
        assert torch.equal(batch, single)


@pytest.mark.parametrize("op", ops_cases.APPLIES)
def test_factors_on_a_device_are_declined(op: str) -> None:
    """Kernels take numbers of the host: what is not read must not be ignored."""
    for name in set(ops_cases.FACTORS) & set(ops_cases.names(op)):
        a = ops_cases.matrices(op, torch.float32, factors=(name,))
        before = [w.clone() for w in a["params"]]
        with pytest.raises(TypeError, match=f"{name} must be empty"):
            getattr(native, op)(*a.values())
        assert all(map(torch.equal, a["params"], before))


def test_strides_are_never_read_as_flat_memory() -> None:
    g, out, m = torch.randn(40, 30).T, torch.empty(30, 40), torch.zeros(30, 40)
    with pytest.raises(ValueError, match="contiguous gradients"):
        native.moment_([g], [m], [out], 0.9, 1.0, [])
    with pytest.raises(ValueError, match="contiguous first"):
        native.moment_([m], [g], [out], 0.9, 1.0, [])
    with pytest.raises(ValueError, match="contiguous outs"):
        native.moment_([m], [m], [g], 0.9, 1.0, [])


def test_what_the_library_does_not_take_raises() -> None:
    x, m = torch.randn(4), torch.zeros(4)
    with pytest.raises(TypeError, match="float64"):
        native.moment_([x.double()], [m], [m.clone()], 0.9, 1.0, [])
    with pytest.raises(TypeError, match="float32"):
        native.moment_([x], [m.double()], [m.clone()], 0.9, 1.0, [])
    with pytest.raises(ValueError, match="beside"):
        native.moment_([x], [torch.zeros(5)], [m.clone()], 0.9, 1.0, [])
    codes, scales = torch.zeros(4, dtype=torch.uint8), torch.zeros(1)
    with pytest.raises(ValueError, match="layout"):
        native.quantize_blockwise_([x], [codes], [scales], SIGNED, [1], [8], [256])
    with pytest.raises(RuntimeError, match="block size"):
        native.quantize_blockwise_([x], [codes], [scales], SIGNED, [1], [4], [5000])
    assert native.available("mps")[0] is False


WRITTEN = ("params", "outs", "exp_avgs", "exp_avg_sqs")


def fingerprint() -> str:
    """A hash over the bits of every op's results on fixed data."""
    torch.manual_seed(1)
    digest = hashlib.sha256()
    shape = (257, 301)
    layout = [[257], [301], [256]]
    for dtype in DTYPES:
        g = [(torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)]
        m, v, out = [torch.randn(shape)], [torch.rand(shape)], [torch.empty(shape, dtype=dtype)]
        c, s = [torch.randint(0, 256, shape).byte()], [torch.rand(514)]
        c2, s2 = [torch.randint(0, 256, shape).byte()], [torch.rand(514)]
        native.adamw_direction_(g, m, v, out, 0.9, 0.999, [1e-8], [], [], [])
        results = [*out, *m, *v]
        out = [torch.empty(shape, dtype=dtype)]
        native.adamw_direction_8bit_(
            g, c, s, c2, s2, out, SIGNED, UNSIGNED, *layout, 0.9, 0.999, [1e-8], [], [], []
        )
        results += [*out, *c, *s, *c2, *s2]
        wide = [torch.empty(shape, dtype=torch.bfloat16)]
        native.stochastic_round_(m, wide, [3], [5], [7], [90], [2])
        results += wide
        for w in views(shape, dtype):
            results += native.column_norms([w])
            index = torch.arange(0, 257, 3).int()
            low = torch.randn(86, 301)
            native.coordinate_add_([w], [g[0]], [index], [low], 0.9, 0.1, 0.3, 0.7, "sign")
            results.append(w.contiguous())
            moments = [torch.randn(86, 301)], [torch.rand(86, 301)]
            factors = 0.9, 0.999, [1e-8], [0.1], [0.01], 0.99, "sign"
            native.coordinate_adamw_([w], [g[0]], [index], *moments, *factors)
            results += [w.contiguous(), *moments[0], *moments[1]]
            across = g[0].mT.contiguous().mT  # stored as w is where that is by columns
            native.coordinate_adamw_([w], [across], [index], *moments, *factors)
            results += [w.contiguous(), *moments[0], *moments[1]]
        for op in ops_cosines.COSINES:
            for i, (n, basis) in enumerate(
                ((35, "dct2"), (62, "dct3"), (256, "dct2"), (192, "dct3"))
            ):  # each length in each layout, over the three formats
                how = ("rows", "columns", "slice")[(i + DTYPES.index(dtype)) % 3]
                a = ops_cosines.arguments(op, dtype, n=n, basis=basis, how=how)
                results += ops_cases.call(op, a) or []
                results += [x for k in WRITTEN if k in a for x in a[k]]
        for x in results:
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def by_one_thread() -> str:
    """Of this process, which has one: for threads and for instruction sets."""
    assert torch.get_num_threads() == 1
    return fingerprint()


def test_results_do_not_depend_on_threads() -> None:
    with runs.threads(3):
        several = fingerprint()
    assert several == by_one_thread()


LIBRARY = "liblowrank_optim.so"


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_results_do_not_depend_on_the_instruction_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baseline, AVX2 and AVX-512 give the same bits: one source, and no fused multiply-add.

    A library chooses when it is loaded, and a copy of it is another one.
    """
    if native.isa() in ("baseline", name):
        pytest.skip(f"{native.isa()} is what this process has loaded")
    expected = by_one_thread()
    path = next(x for x in loader._paths(LIBRARY) if x.is_file())
    shutil.copy(path, tmp_path / LIBRARY)
    monkeypatch.setenv("LOWRANK_OPTIM_LIBRARY", str(tmp_path))
    monkeypatch.setenv("LOWRANK_OPTIM_ISA", name)
    for kept in ("_load", "_function"):
        own = getattr(loader, kept).__wrapped__
        monkeypatch.setattr(loader, kept, functools.cache(own))
    assert native.isa() == name
    assert fingerprint() == expected
    assert loader._function.cache_info().currsize  # found in the copy
