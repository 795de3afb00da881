"""The Triton kernels against straight-line torch, in float64.

Kernels run interpreted, on CPU tensors, in a process of their own: Triton reads TRITON_INTERPRET
when it is imported, and other modules compile in this one. The same tests run on a GPU where there
is one (mark ``gpu``). What the interpreter cannot say: it truncates float32 to bfloat16 where
hardware rounds, so bfloat16 outputs are held to one unit in the last place, and it cannot multiply
bfloat16 matrices, so the launchers give it float32 products.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowrank_optim.ops import triton as ops
from lowrank_optim.ops.quant import dynamic_map
from lowrank_optim.ops.triton import blocks, lift, matrices, quantize
from tests.compare import assert_close, assert_mostly_close
from tests.ops.interpreted import INTERPRETED, crossed
from tests.ops.rounding import LAYOUTS, flat_places, nearest_codes, positions, rounded

DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BETA1, BETA2 = 0.9, 0.99
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TILES = [
    pytest.param(
        part, rank, dtype,
        marks=pytest.mark.slow
        if INTERPRETED and (part, rank, i) not in ((64, 32, 0), (32, 33, 1), (16, 32, 2)) else (),
    )
    for part in (64, 32, 16)
    for rank in (32, 33)
    for i, dtype in enumerate(FLOATS)
]  # fmt: skip
"""Whole tiles, halves and quarters; interpreted, the default run has each once."""


def test_available_names_the_reason() -> None:
    """Interpreted kernels take CPU tensors only, compiled ones never do."""
    assert ops.available("cpu")[0] is INTERPRETED
    assert "TRITON_INTERPRET=1" in ops.available("cpu")[1]
    assert not ops.available("meta")[0]
    if INTERPRETED or not torch.cuda.is_available():
        assert not ops.available("cuda")[0]


def test_every_op_has_its_launcher() -> None:
    """Names resolve lazily; a wrong one is an AttributeError like any module's."""
    assert all(callable(getattr(ops, name)) for name in ops.OPS)
    with pytest.raises(AttributeError, match="no attribute 'lift'"):
        ops.__getattr__("lift")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def spread(*shape: int) -> Tensor:
    """Magnitudes over many decades: what moments look like."""
    return randn(*shape) * torch.exp(3 * randn(*shape))


def blank(like: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs full of NaN: an entry that is not written shows."""
    return [torch.full(x.shape, float("nan"), dtype=dtype, device=DEVICE) for x in like]


def sounds(count: int) -> list[Tensor]:
    """Every tensor but the second one."""
    return [torch.tensor(i != 1, device=DEVICE) for i in range(count)]


# one element; less than, exactly, just above one program of 1024; empty; a matrix; a cube
SHAPES = [(1,), (1023,), (32, 32), (1025,), (0,), (7, 300), (3, 5, 11)]


def lists(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, dtype=dtype) for shape in shapes]


def rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1] if x.dim() else 1
    return x.numel() // max(1, width), width


def adamw64(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    g, m, v = g.double(), m.double(), v.double()
    return BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g


class TestDirections:
    pytestmark = [] if INTERPRETED else MARKS

    @pytest.mark.parametrize(
        ("shapes", "by_row", "guarded", "formats"),
        crossed(
            [[(7, 300)], SHAPES], [False, True], [False, True],
            [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)],
        ),
    )  # fmt: skip
    def test_adamw(
        self, shapes: list[tuple[int, ...]], by_row: bool, guarded: bool,
        formats: tuple[torch.dtype, torch.dtype],
    ) -> None:  # fmt: skip
        grad, out = formats
        gs, ms = lists(shapes, grad), lists(shapes, torch.float32)
        vs = [x.abs() for x in lists(shapes, torch.float32)]
        outs, count = blank(gs, out), len(gs)
        eps = [10.0 ** -(i + 3) for i in range(count)]
        row_eps = [torch.rand(rows(g)[0], device=DEVICE) + 0.1 for g in gs] if by_row else []
        row_scale = [torch.rand(rows(g)[0], device=DEVICE) for g in gs] if by_row else []
        finite = sounds(count) if guarded else []
        expected = []
        for i, (g, m, v) in enumerate(zip(gs, ms, vs, strict=True)):
            m64, v64 = adamw64(g, m, v)
            shape = rows(g)
            e = row_eps[i].double()[:, None] if by_row else eps[i]
            s = row_scale[i].double()[:, None] if by_row else 1.0
            d = (s * (m64.reshape(shape) / (v64.reshape(shape).sqrt() + e))).reshape(g.shape)
            skip = guarded and i == 1
            expected.append((m, v, d * 0) if skip else (m64, v64, d))
        expected = [tuple(x.double().clone() for x in e) for e in expected]
        ops.adamw_direction_(gs, ms, vs, outs, BETA1, BETA2, eps, row_eps, row_scale, finite)
        for m, v, o, (m64, v64, d) in zip(ms, vs, outs, expected, strict=True):
            assert_close(m, m64, torch.float32)
            assert_close(v, v64, torch.float32)
            assert_close(o, d, out)

    @pytest.mark.parametrize(
        ("shapes", "guarded", "dtype"), crossed([[(1025,)], SHAPES], [False, True], FLOATS)
    )
    def test_lion_and_moment(
        self, shapes: list[tuple[int, ...]], guarded: bool, dtype: torch.dtype
    ) -> None:
        gs, ms = lists(shapes, dtype), lists(shapes, torch.float32)
        lions, outs, low = [m.clone() for m in ms], blank(gs), blank(gs, dtype)
        before = [m.double() for m in ms]
        finite = sounds(len(gs)) if guarded else []
        ops.lion_direction_(gs, lions, outs, BETA1, BETA2, finite)
        ops.moment_(gs, ms, low, 0.8, 0.3, finite)
        for i, (g, m) in enumerate(zip(gs, before, strict=True)):
            g = g.double()
            direction, lion = (m + 0.1 * (g - m)).sign(), m + 0.01 * (g - m)
            moment = 0.8 * m + 0.3 * g
            out = moment
            if guarded and i == 1:
                direction, lion, moment, out = m * 0, m, m, m * 0
            assert_mostly_close(outs[i], direction, max_error_rate=1e-3)
            assert_close(lions[i], lion, torch.float32)
            assert_close(ms[i], moment, torch.float32)
            assert_close(low[i], out, dtype)

    def test_list_equals_loop_bit_for_bit(self) -> None:
        """One launch over a table of addresses computes what one launch per tensor does.

        ``x[1:]`` is aligned to 4 bytes only: the table must not promise 16.
        """
        gs = [x[1:] for x in lists([(2000,), (5,), (1025,)], torch.float32)]
        ms, vs = [randn(*g.shape) for g in gs], [randn(*g.shape).square() for g in gs]
        state = [[x.clone() for x in group] for group in (ms, vs)]
        outs, alone = blank(gs), blank(gs)
        scalars = (BETA1, BETA2, [1e-8] * 3, [], [], [])
        ops.adamw_direction_(gs, ms, vs, outs, *scalars)
        for g, m, v, o in zip(gs, *state, alone, strict=True):
            ops.adamw_direction_([g], [m], [v], [o], BETA1, BETA2, [1e-8], [], [], [])
        for a, b in zip((ms, vs, outs), (*state, alone), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_extreme_gradients(self) -> None:
        """1e18 does not overflow v, 1e-30 gives g / eps, a transposed gradient is read right."""
        g = torch.tensor([[1e18, -1e18, 0.0], [1e-30, 1e-40, -1e-30]], device=DEVICE)
        for grad in (g, g.mT.contiguous().mT):
            m, v, out = torch.zeros_like(g), torch.zeros_like(g), torch.empty_like(g)
            ops.adamw_direction_([grad], [m], [v], [out], BETA1, BETA2, [1e-8], [], [], [])
            m64, v64 = adamw64(g, g * 0, g * 0)
            expected = m64 / (v64.sqrt() + 1e-8)
            # at 1e-41 a subnormal m has few bits: half a unit of it over eps is 7e-38
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-37)

    def test_nan_reaches_the_direction(self) -> None:
        """Lion's sign of NaN is NaN: a lost gradient must not look like a step of zero."""
        g, m, out = randn(3), randn(3), torch.empty(3, device=DEVICE)
        g[1] = float("nan")
        ops.lion_direction_([g], [m], [out], BETA1, BETA2, [])
        assert out.isnan().tolist() == m.isnan().tolist() == [False, True, False]

    def test_written_tensors_must_be_contiguous(self) -> None:
        x = randn(4, 6)
        with pytest.raises(ValueError, match="outs must be contiguous"):
            ops.moment_([x.mT], [randn(6, 4)], [x.mT], 0.9, 0.1, [])
        with pytest.raises(ValueError, match="outs has 2 tensors, moments has 1"):
            ops.moment_([x], [x.clone()], [x, x], 0.9, 0.1, [])


def maps() -> tuple[Tensor, Tensor]:
    device = torch.tensor(0.0, device=DEVICE).device
    return dynamic_map(True, device), dynamic_map(False, device)


def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows of at least 256 are cut into blocks of 256; shorter ones are grouped whole."""
    n = shape[-1]
    size = torch.Size(shape).numel()
    return (size // n, n, 256) if n >= 256 else (1, size, 256 // n * n)


def blocks_of(shape: tuple[int, ...]) -> int:
    r, c, b = layout(shape)
    return r * -(-c // b)


# long rows with a tail and without; short rows with tail blocks; one element; more blocks than 4
BLOCKED = [(3, 300), (2, 512), (37, 5), (1, 1), (11, 100), (2, 3, 257)]


def columns() -> list[list[int]]:
    return [list(x) for x in zip(*map(layout, BLOCKED), strict=True)]


def dequantized(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """``map[code] * scale`` in float32, straight from the definition of the layout."""
    r, c, b = layout(tuple(codes.shape))
    block = torch.arange(c, device=DEVICE) // b
    per_row = -(-c // b)
    index = torch.arange(r, device=DEVICE)[:, None] * per_row + block
    return (table[codes.reshape(r, c).long()] * scales[index]).reshape(codes.shape)


def assert_quantized(x: Tensor, size: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> None:
    """Scales are block maxima, codes nearest entries but for 1e-6 of the value about midpoints.

    A second moment above 0 takes the nearest of those above 0: as 0 it would let the next step
    divide by eps alone.
    ``size`` sums the magnitudes that ``x`` was added up from: float32 errs by 2e-7 of it.
    """
    r, c, b = layout(tuple(x.shape))
    flat, sizes, kept = x.double().reshape(r, c), size.double().reshape(r, c), codes.reshape(r, c)
    parts = [(i, slice(j, j + b)) for i in range(r) for j in range(0, c, b)]
    for at, scale in zip(parts, scales.double(), strict=True):
        v, error, code = flat[at], 2e-7 * sizes[at], kept[at]
        top = v.abs().max()
        assert (scale - top).abs() <= 1e-6 * top + error.max()
        unit = v / top if top > 0 else v
        distance = (unit[:, None] - table.double()).abs()
        if bool((table >= 0).all()):
            assert (table[code[v > error].long()] > 0).all()
            distance[:, 0] = torch.where(v > error, torch.inf, distance[:, 0])
            assert table[0] == 0
        chosen = distance.gather(1, code.long()[:, None])[:, 0]
        slack = 1e-6 * unit.abs() + 2 * error / top.clamp(min=1e-300)
        assert (chosen <= distance.min(1).values + slack).all()


def eight_bit(table: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Moments over many decades, quantised: values, codes, scales."""
    codes, scales = [], []
    for shape in BLOCKED:
        x, (r, c, b) = spread(*shape), layout(shape)
        x = x if table[0] < 0 else x.abs()
        found = [nearest_codes(row, table, b) for row in x.reshape(r, c)]
        codes.append(torch.cat([f[0] for f in found]).view(shape))
        scales.append(torch.cat([f[1] for f in found]))
    values = [dequantized(*x, table) for x in zip(codes, scales, strict=True)]
    return values, codes, scales


class TestEightBit:
    pytestmark = [] if INTERPRETED else MARKS

    @pytest.mark.parametrize("signed", [True, False])
    def test_codes_by_one_probe_are_those_of_the_search(self, signed: bool) -> None:
        """About every edge, at the ends, and of random numbers, evenly and over ten decades."""
        table = dynamic_map(signed, torch.tensor(0.0, device=DEVICE).device)
        kind, edges = quantize.form(table)
        assert kind == (1 if signed else 2)
        assert quantize.form(table.clone())[0] == 0
        about = edges[:-1].view(torch.int32)[:, None] + torch.arange(-3, 4, device=DEVICE)
        ends = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-7, 1e-7, 1.0, -1.0, -0.9921875, -0.9921876]
        drawn = torch.rand(40_000, device=DEVICE) * 2 - 1
        small = drawn.sign() * 10 ** (-10 * torch.rand(40_000, device=DEVICE))
        x = torch.cat(
            [about.int().view(torch.float32).flatten(), torch.tensor(ends, device=DEVICE), drawn,
             small, -table]
        )  # fmt: skip
        x = torch.nn.functional.pad(x.clamp(-1, 1), (0, -len(x) % 4095)).view(-1, 4095)
        x = torch.nn.functional.pad(x, (1, 0), value=1.0)  # the scale of each block is 1
        lost = torch.full((3, 4096), float("nan"), device=DEVICE)
        lost[1:, 1:], lost[1, 0], lost[2, 0] = 1.0, float("inf"), 1e-40
        found = []
        for values in (x, lost):
            for entries in (table, table.clone()):
                codes = torch.full(values.shape, 77, dtype=torch.uint8, device=DEVICE)
                scales = torch.zeros(len(values), device=DEVICE)
                cut = [len(values)], [4096], [4096]
                ops.quantize_blockwise_([values], [codes], [scales], entries, *cut)
                found.append((codes, scales))
        for one, other in (found[:2], found[2:]):
            assert torch.equal(one[0], other[0])
            torch.testing.assert_close(one[1], other[1], rtol=0, atol=0, equal_nan=True)
        assert (found[0][1] == 1).all() and len(found[0][0].unique()) == 256

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("signed", [True, False])
    def test_quantize_gives_the_nearest_codes(self, signed: bool, dtype: torch.dtype) -> None:
        table = maps()[0 if signed else 1]
        xs = [spread(*s).clamp(-6e4, 6e4).to(dtype) for s in BLOCKED]
        xs = xs if signed else [x.abs() for x in xs]
        codes = [torch.zeros(s, dtype=torch.uint8, device=DEVICE) for s in BLOCKED]
        scales = [torch.full((blocks_of(s),), -1.0, device=DEVICE) for s in BLOCKED]
        ops.quantize_blockwise_(xs, codes, scales, table, *columns())
        for x, code, scale, shape in zip(xs, codes, scales, BLOCKED, strict=True):
            r, c, b = layout(shape)
            found = [nearest_codes(row, table, b) for row in x.reshape(r, c)]
            assert torch.equal(code.view(r, c), torch.stack([f[0] for f in found]))
            assert torch.equal(scale, torch.cat([f[1] for f in found]))

    def test_ties_and_edges(self) -> None:
        """A midpoint takes the lower code, its neighbours the nearest."""
        for table in maps():
            middle = (table[1:] + table[:-1]) / 2
            x = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1),
                           table, torch.tensor([1.0, -1.0, 0.0], device=DEVICE)])  # fmt: skip
            x = x.clamp(0 if table[0] == 0 else -1)
            whole = torch.cat([x, x.new_ones(-x.numel() % 255)]).view(-1, 255)
            whole = torch.cat([whole, torch.ones_like(whole[:, :1])], 1).contiguous()
            codes = torch.zeros(whole.shape, dtype=torch.uint8, device=DEVICE)
            scales = torch.zeros(whole.shape[0], device=DEVICE)
            ops.quantize_blockwise_(
                [whole], [codes], [scales], table, [whole.shape[0]], [256], [256]
            )
            assert torch.equal(codes.view(-1), nearest_codes(whole, table, 256)[0])

    def test_zero_tiny_and_lost_blocks(self) -> None:
        """Zeros are code 0 at scale 0, subnormals keep their ratios, NaN shows in the scale."""
        signed, unsigned = maps()
        x = torch.zeros(4, 256, device=DEVICE)
        x[1, :3] = torch.tensor([1e-40, 5e-41, -1e-40])
        x[2, 5], x[3, 7] = float("nan"), float("inf")
        x[2, 6] = 1.0
        for table in (signed, unsigned):
            codes = torch.full(x.shape, 9, dtype=torch.uint8, device=DEVICE)
            scales = torch.full((4,), -1.0, device=DEVICE)
            y = x if table is signed else x.abs()
            ops.quantize_blockwise_([y], [codes], [scales], table, [4], [256], [256])
            zero = int((table == 0).nonzero())
            assert scales[0] == 0 and (codes[0] == zero).all()
            assert scales[1] == y[1].max() and (codes[1, 3:] == zero).all()
            unit = table[codes[1, :3].long()]
            torch.testing.assert_close(unit[:2].cpu(), torch.tensor([1.0, 0.5]), rtol=0, atol=8e-3)
            assert scales[2].isnan() and scales[3].isinf()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dequantize(self, dtype: torch.dtype) -> None:
        signed, _ = maps()
        values, codes, scales = eight_bit(signed)
        outs = blank(values, dtype)
        ops.dequantize_blockwise_(codes, scales, outs, signed, *columns())
        for value, out in zip(values, outs, strict=True):
            if dtype == torch.float32:
                assert torch.equal(out, value)
            else:  # float16 overflows where the value does
                fits = value.abs() < 6e4
                assert_close(out[fits], value[fits], dtype)

    @pytest.mark.parametrize(("by_row", "guarded", "single"), crossed(*[(False, True)] * 3))
    def test_adamw(self, by_row: bool, guarded: bool, single: bool) -> None:
        signed, unsigned = maps()
        ms, codes, scales = eight_bit(signed)
        vs, codes2, scales2 = eight_bit(unsigned)
        gs = [spread(*s) for s in BLOCKED]
        outs, count = blank(gs), len(gs)
        row_eps = [torch.rand(rows(g)[0], device=DEVICE) + 0.1 for g in gs] if by_row else []
        row_scale = [torch.rand(rows(g)[0], device=DEVICE) for g in gs] if by_row else []
        finite = sounds(count) if guarded else []
        state = (codes, scales, codes2, scales2)
        before = [[x.clone() for x in part] for part in state]
        args = [gs, *state, outs, *columns(), [1e-6] * count, row_eps, row_scale, finite]

        def call(g, c, s, c2, s2, o, r, n, b, e, re, rs, ok) -> None:
            ops.adamw_direction_8bit_(
                g, c, s, c2, s2, o, signed, unsigned, r, n, b, BETA1, BETA2, e, re, rs, ok
            )

        if single:  # the same through launches of one tensor
            for i in range(count):
                call(*(x[i : i + 1] for x in args))
        else:
            call(*args)
        for i, g in enumerate(gs):
            if guarded and i == 1:
                assert all(torch.equal(a[i], b[i]) for a, b in zip(state, before, strict=True))
                assert not outs[i].any()
                continue
            m, v = adamw64(g, ms[i], vs[i])
            e = row_eps[i].double()[:, None] if by_row else 1e-6
            s = row_scale[i].double()[:, None] if by_row else 1.0
            d = s * (m.reshape(rows(g)) / (v.reshape(rows(g)).sqrt() + e))
            assert_close(outs[i], d.reshape(g.shape), torch.float32)
            size = BETA1 * ms[i].abs() + (1 - BETA1) * g.abs()
            assert_quantized(m, size, codes[i], scales[i], signed)
            assert_quantized(v, v, codes2[i], scales2[i], unsigned)

    @pytest.mark.parametrize("lion", [False, True])
    @pytest.mark.parametrize("guarded", [False, True])
    def test_lion_and_moment(self, lion: bool, guarded: bool) -> None:
        signed, _ = maps()
        ms, codes, scales = eight_bit(signed)
        before = [[x.clone() for x in part] for part in (codes, scales)]
        gs = [spread(*s).bfloat16() for s in BLOCKED]
        outs = blank(gs)
        finite = sounds(len(gs)) if guarded else []
        op = ops.lion_direction_8bit_ if lion else ops.moment_8bit_
        op(gs, codes, scales, outs, signed, *columns(), BETA1, BETA2, finite)
        for i, (g, m) in enumerate(zip(gs, ms, strict=True)):
            if guarded and i == 1:
                assert torch.equal(codes[i], before[0][i]) and torch.equal(scales[i], before[1][i])
                assert not outs[i].any()
                continue
            g, m = g.double(), m.double()
            new = m + (1 - BETA2) * (g - m) if lion else BETA1 * m + BETA2 * g
            out = (m + (1 - BETA1) * (g - m)).sign() if lion else new
            if lion:
                assert_mostly_close(outs[i], out, torch.float32, max_error_rate=1e-3)
            else:  # terms that nearly cancel leave the rounding of either
                size = BETA1 * m.abs() + BETA2 * g.abs()
                assert_close((outs[i] - out) / size, torch.zeros_like(out), torch.float32)
            assert_quantized(new, m.abs() + g.abs(), codes[i], scales[i], signed)


def hashed(count: int, seed: int) -> Tensor:
    """lowbias32 of ``i ^ seed``, in int64."""
    mask = 0xFFFFFFFF
    x = torch.arange(count, device=DEVICE) ^ (seed & mask)
    x = (x ^ (x >> 16)) * 0x7FEB352D & mask
    x = (x ^ (x >> 15)) * 0x846CA68B & mask
    return x ^ (x >> 16)


class TestRounding:
    pytestmark = [] if INTERPRETED else MARKS

    def test_bits(self) -> None:
        """The bits that the hash defines, whatever the seed's sign and width."""
        xs = [spread(*s) for s in [(5000,), (3, 7), (0,), (1025,)]]
        xs[0][:4] = torch.tensor([1e-40, -1e-45, 3e38, 0.0])
        seeds = [0, 2**31 + 5, 1, -3]
        for count in (1, 4):
            outs = blank(xs[:count], torch.bfloat16)
            ops.stochastic_round_(xs[:count], outs, seeds[:count], *flat_places(xs[:count]))
            for x, out, seed in zip(xs, outs, seeds, strict=False):
                bits = x.reshape(-1).view(torch.int32).long() & 0xFFFFFFFF
                bits = bits + (hashed(x.numel(), seed) & 0xFFFF) >> 16
                assert torch.equal(out.view(torch.int16).reshape(-1), bits.to(torch.int16))

    @pytest.mark.parametrize("many", [False, True])
    def test_positions(self, many: bool) -> None:
        """Pieces of a whole: rows shorter and longer than a program, turned, and past 2^32."""
        places = list(LAYOUTS.values())
        xs = [1 + torch.rand(4000, device=DEVICE) for _ in places]
        outs = blank(xs, torch.bfloat16)
        seeds = [2**31 + 17 * i for i in range(len(xs))]
        for at in [slice(None)] if many else [slice(i, i + 1) for i in range(len(xs))]:
            columns = [list(x) for x in zip(*places[at], strict=True)]
            ops.stochastic_round_(xs[at], outs[at], seeds[at], *columns)
        for x, out, seed, place in zip(xs, outs, seeds, places, strict=True):
            wanted = rounded(x, seed, positions(x.numel(), *place))
            assert torch.equal(out.view(torch.int16), wanted.view(torch.int16)), place

    def test_not_finite(self) -> None:
        """Inf and NaN pass through, even a NaN whose payload is in the bits that are dropped."""
        x = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000], dtype=torch.int32, device=DEVICE)
        x = torch.cat([x, x | -(2**31)]).view(torch.float32)
        out = torch.empty(6, dtype=torch.bfloat16, device=DEVICE)
        ops.stochastic_round_([x], [out], [77], *flat_places([x]))
        assert out[[0, 3]].tolist() == [float("inf"), -float("inf")]
        assert out[[1, 2, 4, 5]].isnan().all()

    def test_unbiased(self) -> None:
        """The mean of many roundings is the number: 5 standard errors of a two-valued variable."""
        x = torch.full((1 << 14,), 1 + 0.3 * 2**-7, device=DEVICE)
        out = torch.empty_like(x, dtype=torch.bfloat16)
        ops.stochastic_round_([x], [out], [1], *flat_places([x]))
        up = (out.double() - 1) * 2**7
        assert set(up.unique().tolist()) == {0.0, 1.0}
        assert abs(float(up.mean()) - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5


def view(x: Tensor, how: str) -> Tensor:
    """The same numbers: as they are, stored transposed, or spaced out in a larger tensor."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "strided":
        larger = torch.empty(*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1], dtype=x.dtype,
                             device=x.device)  # fmt: skip
        part = larger[..., ::2, ::3]
        part.copy_(x)
        return part
    return x.clone()


VIEWS = ["plain", "transposed", "strided"]
# (batch, m, n, r): below one tile; tails in every dimension of 64 x 64 tiles; a batch of tiles
# with tails; two batch dims; a single column; rank 0
MATRICES = [((), 5, 9, 3), ((), 70, 130, 33), ((2,), 65, 64, 16), ((2, 2), 9, 17, 4),
            ((), 40, 1, 2), ((), 6, 8, 0)]  # fmt: skip


class TestMatrices:
    pytestmark = [] if INTERPRETED else MARKS

    @pytest.mark.parametrize("how", VIEWS)
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_column_norms(self, how: str, dtype: torch.dtype) -> None:
        shapes = [(5, 9), (300, 40), (2, 129, 33), (2, 2, 3, 5), (0, 4), (4, 0), (1, 1)]
        xs = [view(randn(*s, dtype=dtype), how) for s in shapes]
        for x, norm in zip(xs, ops.column_norms(xs), strict=True):
            expected = x.double().square().sum(-2, keepdim=True).sqrt()
            assert norm.dtype == torch.float32
            assert_close(norm, expected, torch.float32)

    def test_column_norms_of_extremes(self) -> None:
        """Squares are summed in float32: norms between 1e-19 and 1e19 are exact."""
        x = torch.tensor([[3e18, 3e-18, 0.0], [4e18, 4e-18, 0.0]], device=DEVICE)
        expected = torch.tensor([[5e18, 5e-18, 0.0]], device=DEVICE)
        torch.testing.assert_close(ops.column_norms([x])[0], expected, rtol=1e-6, atol=0)
        x[0, 2] = float("nan")
        assert ops.column_norms([x])[0].isnan().tolist() == [[False, False, True]]

    @staticmethod
    def operands(case: tuple[tuple[int, ...], int, int, int], how: str, dtype: torch.dtype):
        batch, m, n, r = case
        w, g = (view(randn(*batch, m, n, dtype=dtype), how) for _ in range(2))
        p = (randn(*batch, m, r) / max(1, m) ** 0.5).to(dtype)
        return w, g, p, randn(*batch, r, n), randn(*batch, r, n)

    @pytest.mark.parametrize(("case", "how", "dtype"), crossed(MATRICES, VIEWS, FLOATS))
    def test_lift_add_scaled(
        self, case: tuple[tuple[int, ...], int, int, int], how: str, dtype: torch.dtype
    ) -> None:
        w, g, p, term, low = self.operands(case, how, dtype)
        c = torch.rand(*w.shape[:-2], 1, w.shape[-1], device=DEVICE)
        w64, g64, p64, n64, r64, c64 = (x.double() for x in (w, g, p, term, low, c))
        expected = 0.9 * w64 - 0.1 * (p64 @ (0.5 * n64 - 0.5 * r64 * c64) + g64 * c64)
        ops.lift_add_scaled_([w], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
        assert_close(w, expected, dtype)

    @pytest.mark.parametrize(("case", "how", "dtype"), crossed(MATRICES, VIEWS, FLOATS))
    def test_lift_add_sign(
        self, case: tuple[tuple[int, ...], int, int, int], how: str, dtype: torch.dtype
    ) -> None:
        w, g, p, term, low = self.operands(case, how, dtype)
        w64, g64, p64, n64, r64 = (x.double() for x in (w, g, p, term, low))
        rest = (g64 - p64 @ r64).sign()
        expected = 0.9 * w64 - 0.1 * (0.5 * p64 @ n64 + 0.3 * rest)
        ops.lift_add_sign_([w], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
        # on a GPU bfloat16 operands round R by 2^-9: signs within that of zero may differ
        rate = 1e-2 if dtype == torch.bfloat16 and not INTERPRETED else 1e-3
        assert_mostly_close(w, expected, dtype, max_error_rate=rate)

    @pytest.mark.parametrize(
        ("case", "how", "free"), crossed(MATRICES, VIEWS, ("sign", "sgd", "none"))
    )
    def test_coordinate_add(
        self, case: tuple[tuple[int, ...], int, int, int], how: str, free: str
    ) -> None:
        w, g, _, term, _ = self.operands(case, how, torch.float32)
        batch, m, _, r = case
        drawn = torch.rand(*batch, m, device=DEVICE).argsort(-1)[..., :r].sort(-1).values
        f = {"sign": torch.sign, "sgd": lambda x: x, "none": torch.zeros_like}[free]
        update = 0.3 * f(g.double())
        wide = drawn.unsqueeze(-1).expand(*batch, r, w.shape[-1])
        update.scatter_(-2, wide, 0.5 * term.double())
        expected = 0.9 * w.double() - 0.1 * update
        ops.coordinate_add_([w], [g], [drawn.int()], [term], 0.9, 0.1, 0.5, 0.3, free)
        assert_close(w, expected)

    def test_coordinate_names_its_choices(self) -> None:
        with pytest.raises(
            ValueError, match="free must be one of 'none', 'sgd', 'sign', got 'drop'"
        ):
            ops.coordinate_add_([], [], [], [], 1.0, 0.1, 1.0, 1.0, "drop")

    def test_offsets_beyond_32_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Strides so large that a tile overruns 2^31 use 64-bit offsets: same numbers."""
        assert not matrices.wide(128, torch.empty(4096, 4096, device="meta"))
        assert matrices.wide(128, torch.empty(2, 2**25, device="meta"))
        results = []
        for span in (2**31 - 1, 0):
            monkeypatch.setattr(matrices, "_SPAN", span)
            torch.manual_seed(1)
            w, g, p, term, low = self.operands(MATRICES[1], "transposed", torch.float32)
            c = torch.rand(1, w.shape[-1], device=DEVICE)
            index = torch.arange(0, 66, 2, dtype=torch.int32, device=DEVICE)
            ops.lift_add_scaled_([w], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
            ops.lift_add_sign_([w], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
            ops.coordinate_add_([w], [g], [index], [term], 0.9, 0.1, 0.5, 0.3, "sign")
            results.append((w, ops.column_norms([w])[0]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_large_and_lost_gradients(self) -> None:
        """A NaN stays in its entry, and 1e30 does not overflow on the way."""
        w, g, p, term, low = self.operands(MATRICES[1], "plain", torch.float32)
        g[3, 4], g[5, 6] = float("nan"), 1e30
        low = low * 0
        c = torch.ones(1, w.shape[-1], device=DEVICE)
        for kind in ("scaled", "sign", "rows"):
            x = w.clone()
            if kind == "scaled":
                ops.lift_add_scaled_([x], [g], [p], [term], [low], [c], 1.0, 1.0, 1.0)
                assert float(x[5, 6]) == pytest.approx(-1e30, rel=1e-6)
            elif kind == "sign":
                ops.lift_add_sign_([x], [g], [p], [term], [low], 1.0, 1.0, 1.0, 1.0)
            else:
                index = torch.tensor([0, 69], dtype=torch.int32, device=DEVICE)
                ops.coordinate_add_([x], [g], [index], [term], 1.0, 1.0, 1.0, 1.0, "sign")
            assert x.isnan().nonzero().tolist() == [[3, 4]]

    @pytest.mark.parametrize(("part", "rank", "dtype"), TILES)
    def test_tiles_that_are_written_in_parts(
        self, part: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each group of columns meets its own G, W and factors, whatever the tile.

        Two matrices of two tiles by two, the last of either side not full.
        """
        case = ((2,), 33, 90, rank)
        w, g, p, term, low = self.operands(case, "transposed", dtype)
        c = torch.rand(2, 1, 90, device=DEVICE)
        plain = [w.clone(), w.clone()]
        ops.lift_add_scaled_([plain[0]], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
        ops.lift_add_sign_([plain[1]], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
        tile = blocks.Blocks(32, 64, 16, 4, 2, part)
        monkeypatch.setattr(lift, "choose", lambda *_: tile)
        parts = [w.clone(), w.clone()]
        ops.lift_add_scaled_([parts[0]], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
        ops.lift_add_sign_([parts[1]], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
        assert_close(parts[0], plain[0], dtype)
        assert_mostly_close(parts[1], plain[1], dtype, max_error_rate=1e-3)

    def test_an_operand_is_rounded_once(self) -> None:
        """A basis in bfloat16: ``a N - a R o c`` is rounded after the difference, W is not."""
        w, g, p, term, low = self.operands(((2,), 9, 50, 8), "plain", torch.bfloat16)
        w, g = w.float(), g.float()
        c = torch.rand(2, 1, 50, device=DEVICE)
        ready = (0.5 * term - 0.5 * low * c).bfloat16()
        expected = 0.9 * w.double() - 0.1 * (p.double() @ ready.double() + g.double() * c.double())
        ops.lift_add_scaled_([w], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
        # the interpreter rounds to bfloat16 towards zero
        assert_close(w, expected, torch.bfloat16 if INTERPRETED else torch.float32)

    def test_blocks_are_fixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In-place kernels are not autotuned: format, device and size decide."""
        assert set(blocks.BLOCKS) == {(k, f) for k in (1, 2) for f in ("bf16", "fp32")}
        assert {key for key, _ in blocks.LARGE} == set(blocks.FAMILIES.values())
        cpu, large = torch.device("cpu"), blocks.LARGE["sm_90", 1]
        small = blocks.BLOCKS[1, "bf16"]
        assert blocks.choose(1, True, cpu, 1, 4096, 4096) == small
        monkeypatch.setattr(blocks, "family", lambda device: ("sm_90", 132))
        assert blocks.choose(1, True, cpu, 1, 4096, 4096) == large
        assert blocks.choose(1, True, cpu, 1, 33 * 128, 4 * 256) == large  # 132 tiles
        assert blocks.choose(1, True, cpu, 1, 32 * 128, 4 * 256) == small
        assert blocks.choose(1, True, cpu, 2, 32 * 128, 4 * 256) == large
        assert blocks.choose(1, False, cpu, 1, 4096, 4096) == blocks.BLOCKS[1, "fp32"]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
class TestDevice:
    """What only a device can show."""

    @staticmethod
    def state() -> list[list[Tensor]]:
        gs = lists([(7, 300), (1025,), (64, 64)], torch.float32)
        return [gs, [torch.zeros_like(g) for g in gs], [torch.zeros_like(g) for g in gs], blank(gs)]

    @pytest.mark.parametrize("rank", [128, 100])
    @pytest.mark.parametrize("how", ["plain", "transposed"])
    def test_large_tiles(self, how: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of this device, with tails in every dimension, against the smaller ones."""
        w, g, p, term, low = TestMatrices.operands(((), 300, 600, rank), how, torch.bfloat16)
        c = torch.rand(1, 600, device=DEVICE)
        found = []
        for large in (False, True):
            if large:
                family = blocks.family(w.device)[0]
                if not family:
                    pytest.skip("no larger tiles for this device")
                monkeypatch.setattr(lift, "choose", lambda k, *_, f=family: blocks.LARGE[f, k])
            found.append((w.clone(), w.clone()))
            ops.lift_add_scaled_([found[-1][0]], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
            ops.lift_add_sign_([found[-1][1]], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
        assert_close(found[1][0], found[0][0], torch.bfloat16)
        assert_mostly_close(found[1][1], found[0][1], torch.bfloat16, max_error_rate=1e-3)

    def test_graph_replay_equals_eager(self) -> None:
        """A captured list op reads no host memory at replay, and sees new gradients."""
        first, second = self.state(), self.state()
        scalars = (BETA1, BETA2, [1e-8] * 3, [], [], [])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compile outside of the capture
            ops.adamw_direction_(*[x[:1] for x in self.state()], BETA1, BETA2, [1e-8], [], [], [])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.adamw_direction_(*first, *scalars)
        for x in first[1] + first[2]:
            x.zero_()
        for _ in range(3):
            for a, b in zip(first[0], second[0], strict=True):
                b.normal_()
                a.copy_(b)
            graph.replay()
            ops.adamw_direction_(*second, *scalars)
        for a, b in zip(first[1:], second[1:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_no_host_synchronisation(self) -> None:
        w, g, p, term, low = TestMatrices.operands(MATRICES[1], "plain", torch.float32)
        c = torch.rand(1, w.shape[-1], device=DEVICE)
        index = torch.arange(0, 66, 2, dtype=torch.int32, device=DEVICE)
        state = self.state()
        halves = blank(state[0], torch.bfloat16)

        def step() -> None:
            ops.adamw_direction_(*state, BETA1, BETA2, [1e-8] * 3, [], [], [])
            ops.stochastic_round_(state[3], halves, [1, 2, 3], *flat_places(halves))
            ops.column_norms([w])
            ops.lift_add_scaled_([w], [g], [p], [term], [low], [c], 0.9, 0.1, 0.5)
            ops.lift_add_sign_([w], [g], [p], [term], [low], 0.9, 0.1, 0.5, 0.3)
            ops.coordinate_add_([w], [g], [index], [term], 0.9, 0.1, 0.5, 0.3, "sign")

        step()  # compiles and loads
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(x.isfinite().all() for x in state[3])
