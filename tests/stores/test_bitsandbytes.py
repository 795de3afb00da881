"""Against bitsandbytes itself: scales, codes, values, and runs of its 8-bit optimizers.

bitsandbytes 0.50 has several quantisers. All take the block's largest magnitude as scale and
compare ``u = x * (1 / scale)`` with float32 midpoints between neighbouring entries of the map:

- plain torch, for every device: the count of midpoints below ``u``; ours;
- CUDA: a binary search, which gives a midpoint itself to the even code;
- CPU, float64: the first of the nearest entries, distances in float32;
- CPU, float32, bfloat16, float16: a table of the codes of 65,536 points of [-1, 1], of which it
  takes the nearest to ``u``. Zero is not one of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW8bit, GaLoreLion, import_bitsandbytes, ops
from lowrank_optim.ops import __main__ as report
from lowrank_optim.ops import bitsandbytes as backend
from lowrank_optim.ops import dispatch, native, quant
from lowrank_optim.ops.quant import Quantized
from tests.compare import assert_close, assert_mostly_close, relative
from tests.stores.shapes import SHAPES

bitsandbytes = pytest.importorskip("bitsandbytes")
NORMAL = torch.finfo(torch.float32).tiny
"""Below it 1 / scale may overflow, and bitsandbytes' codes are those of infinities."""
NATIVE = pytest.mark.skipif(not native.available("cpu")[0], reason="no native library")


@pytest.fixture(params=["reference", pytest.param("native", marks=NATIVE)])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of our own quantisers."""
    monkeypatch.setenv(dispatch.VARIABLE, request.param)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "bitsandbytes")


def table_of(signed: bool) -> Tensor:
    return bitsandbytes.functional.create_dynamic_map(signed=signed)


def middles_of(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


@functools.cache
def inputs(signed: bool) -> dict[str, Tensor]:
    """Rows of one block: common, over eight decades, every edge there is, and extreme scales."""
    generator = torch.Generator().manual_seed(0)
    table = table_of(signed)
    middle = middles_of(table)
    edges = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), table])
    edges = torch.cat([edges, torch.zeros(1), torch.zeros(-(edges.numel() + 1) % 255)])
    normal = torch.randn(100, 256, generator=generator)
    decades = 10 ** (-8 * torch.rand(100, 256, generator=generator))
    found = {
        "normal": normal,
        "wide": normal * decades,
        "edges": torch.cat([edges.view(-1, 255), torch.ones(edges.numel() // 255, 1)], 1),
        "sparse": normal * (decades < 1e-6),
        "zero": torch.zeros(2, 256),
        "huge": normal.clamp(-3, 3) * 1e38,
        "small": normal * 1e-36,
        "denormal": normal * 1e-41,
    }
    return found if signed else {k: x.abs() for k, x in found.items()}


CASES = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
KINDS = pytest.mark.parametrize("kind", list(inputs(True)))


def quantized(x: Tensor, signed: bool) -> Quantized:
    """By the op of the backend that is chosen; moments are then kept by ``ops.quantize_``."""
    rows, cols, block = layout = quant.layout(x.shape)
    out = Quantized(torch.empty(x.shape, dtype=torch.uint8), torch.empty(layout.scales), signed)
    codes, scales = [out.codes], [out.scales]
    torch.ops.lowrank_optim.quantize_blockwise_(
        [x], codes, scales, out.map, [rows], [cols], [block]
    )
    return out


def cpu_codes(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes on the CPU, by the path of the dtype."""
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(x, table, 256)
    return codes, scales


def everywhere_codes(x: Tensor, table: Tensor) -> Tensor:
    """bitsandbytes' implementation in plain torch, which serves devices without their own."""
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, _ = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, table, 256)
    return codes


def cuda_codes(unit: Tensor, table: Tensor) -> Tensor:
    """The search of bitsandbytes' CUDA kernels: seven halvings from entry 127, then a midpoint."""
    pivot = torch.full(unit.shape, 127)
    low, high = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = unit > table[pivot]
        low, high = torch.where(above, pivot, low), torch.where(above, high, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    up = torch.where(unit > (table[high] + table[pivot]) / 2, high, pivot)
    down = torch.where(unit < (table[low] + table[pivot]) / 2, low, pivot)
    return torch.where(unit > table[pivot], up, down)


def lattice(unit: Tensor) -> Tensor:
    """The nearest of 65,536 equally spaced points from -1 to 1."""
    index = ((unit.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).to(torch.int64)
    return -1 + 2.0 * index.float() / 65535


# ---------------------------------------------------------------- quantise and dequantise


@CASES
@KINDS
def test_scales_are_bitsandbytes(ours: None, kind: str, signed: bool) -> None:
    """Bit for bit, whatever the path."""
    x, table = inputs(signed)[kind], table_of(signed)
    assert torch.equal(table, quant.dynamic_map(signed, torch.device("cpu")))
    scales = quantized(x, signed).scales
    assert torch.equal(scales, cpu_codes(x, table)[1])
    assert torch.equal(scales, cpu_codes(x.double(), table)[1])


@CASES
def test_values_are_bitsandbytes(ours: None, signed: bool) -> None:
    """Every code at every kind of scale, bit for bit, the sign of zero too."""
    scales = torch.tensor([0.0, 1e-45, 1e-40, 1e-38, 3e-20, 0.7, 1.0, 123.4, 3e38, float("inf")])
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    values = ops.dequantize([Quantized(codes, scales, signed)])[0]
    expected = torch.ops.bitsandbytes.dequantize_blockwise(
        codes, scales, table_of(signed), 256, torch.float32
    )
    lost = expected.isnan()
    assert torch.equal(lost, values.isnan())
    assert torch.equal(values.view(torch.int32)[~lost], expected.view(torch.int32)[~lost])


@CASES
@KINDS
def test_codes_are_those_of_its_exact_quantisers(ours: None, kind: str, signed: bool) -> None:
    """Equal to its plain torch for every input; on CUDA and in float64 but for exact midpoints.

    There CUDA takes the even code of the two, and the float64 path the upper one where float32
    rounded the midpoint up.
    """
    x, table = inputs(signed)[kind], table_of(signed)
    codes, scales, _ = quantized(x, signed)
    if kind == "denormal":
        best = (x.double() / scales.double()[:, None]).unsqueeze(-1) - table.double()
        taken = best.abs().gather(-1, codes.long().unsqueeze(-1))[..., 0]
        assert ((taken - best.abs().amin(-1)) <= 1e-6).all()
        return
    assert torch.equal(codes, everywhere_codes(x, table))
    if kind == "zero":
        assert (table[codes.long()] == 0).all()
        return
    unit = x * (1 / scales)[:, None]
    tie = torch.isin(unit, middles_of(table))
    even = codes.long() + codes.long() % 2
    assert torch.equal(cuda_codes(unit, table), torch.where(tie, even, codes.long()))
    wide, _ = cpu_codes(x.double(), table)
    assert torch.equal(codes[~tie], wide[~tie])
    assert kind == "edges" or not tie.double().mean() > 0.01


@CASES
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_cpu_library_is_a_lattice_before_our_quantiser(
    ours: None, kind: str, signed: bool, dtype: torch.dtype
) -> None:
    """Each of its codes is predicted: ours of the lattice point. So they differ where it says.

    Zeros of a block are the point above 0, whose code is not that of 0; a block of zeros has code
    0, and decodes to zeros all the same.
    """
    x, table = inputs(signed)[kind].to(dtype), table_of(signed)
    x = x[x.isfinite().all(-1)]
    mine = quantized(x, signed)
    codes, scales = cpu_codes(x, table)
    finite = scales >= NORMAL
    assert torch.equal(scales, mine.scales)
    assert (codes[scales == 0] == 0).all()
    if not finite.any():
        return
    unit = x[finite].float() * (1 / scales[finite])[:, None]
    points = lattice(unit)
    predicted = quantized(points, signed)
    assert (predicted.scales == 1).all()
    assert torch.equal(codes[finite], predicted.codes)
    near, theirs = (
        (table.double()[c[finite].long()] - unit.double()).abs() for c in (mine.codes, codes)
    )
    assert (near <= theirs + 2**-23 * unit.abs()).all()  # ours is nowhere the farther
    if kind == "wide":
        assert float((mine.codes != codes).double().mean()) > 0.3


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.4e-7, 1.8e-7, 1e-6, 1e-5])
def test_small_squares(ours: None, size: float) -> None:
    """Below half the smallest entry, 1.6e-7, the nearest is 0, which bitsandbytes on CUDA keeps.

    Ours, as a moment, is the smallest entry then, 3.2e-7: the denominator never vanishes, and only
    a square of 0 is 0. bitsandbytes on the CPU has no 0: whatever is below 3e-5 of the block's
    largest becomes 1.56e-5 of it.
    """
    x, table = torch.full((1, 256), size), table_of(False)
    x[0, 0] = 1.0
    kept = ops.dequantize([quantized(x, False)])[0][0, 1]
    assert (kept == 0) == (size < 1.625e-7)
    assert kept == table[cuda_codes(x, table)][0, 1]
    moment = quantized(x, False)
    ops.quantize_([x], [moment])
    assert ops.dequantize([moment])[0][0, 1] == (max(kept, table[1]) if size else 0)
    codes, _ = cpu_codes(x, table)
    assert table[codes.long()][0, 1] == pytest.approx(1.5625e-5)


# ---------------------------------------------------------------- as a backend


@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 3), (7,), (0, 300)], ids=str)
@CASES
def test_the_backend_is_its_op_on_each_of_our_blocks(
    theirs: None, shape: tuple[int, ...], signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end in a short block too, and tensors of several tiles: codes, scales, values."""
    monkeypatch.setattr("lowrank_optim.ops.tiles.TILE_ELEMENTS", 1000)
    table, x = table_of(signed), torch.randn(shape)
    x = x if signed else x.square()
    codes, scales, _ = out = quantized(x, signed)
    rows, cols, block = out.layout
    flat, count = x.reshape(rows, cols), 0
    values = ops.dequantize([out])[0].reshape(rows, cols)
    for i in range(rows):
        for j in range(0, cols, block):
            part = flat[i, j : j + block].contiguous()
            found, scale = cpu_codes(part, table)
            assert torch.equal(codes.reshape(rows, cols)[i, j : j + block], found)
            assert scales[count] == scale
            back = torch.ops.bitsandbytes.dequantize_blockwise(
                found, scale, table, 256, torch.float32
            )
            assert torch.equal(values[i, j : j + block], back)
            count += 1
    assert count == scales.numel()


def test_the_backend_is_only_used_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.backend(torch.zeros(1)) is not backend
    report.main()
    assert f"bitsandbytes yes  bitsandbytes {bitsandbytes.__version__}" in capsys.readouterr().out
    monkeypatch.setenv(dispatch.VARIABLE, "bitsandbytes")
    assert dispatch.backend(torch.zeros(1)) is backend
    assert not backend.available("meta")[0]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without bitsandbytes."""
    caches = backend.available, dispatch._choose
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_explicit_choice_never_falls_back(missing: None, theirs: None) -> None:
    with pytest.raises(RuntimeError, match=r"BACKEND=bitsandbytes cannot run.*does not import"):
        quantized(torch.randn(16, 256), True)


# ---------------------------------------------------------------- runs

OWN = {"lr": 1e-2, "weight_decay": 0.1}
RULES = {
    "AdamW": (GaLoreAdamW8bit, "AdamW8bit", {"betas": (0.9, 0.999), "eps": 1e-8}),
    "Lion": (GaLoreLion, "Lion8bit", {"betas": (0.9, 0.99)}),
}


def pair(rule: str, start: Tensor) -> tuple[Any, nn.Parameter, Any, nn.Parameter]:
    """Their optimizer and ours, each with a copy of the weights."""
    cls, name, options = RULES[rule]
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    mine = cls([{"params": [b], "rank": None}], state_dtype="8bit", **OWN, **options)
    return getattr(bitsandbytes.optim, name)([a], **OWN, **options), a, mine, b


def gradients(shape: tuple[int, ...], decades: float, count: int = 50) -> list[Tensor]:
    """Normal ones, of sizes that range over so many decades within a block."""
    generator = torch.Generator().manual_seed(1)
    size = 10 ** (-decades * torch.rand(shape, generator=generator))
    return [torch.randn(shape, generator=generator) * size for _ in range(count)]


def codes_of(state: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    keys = [k for k in ("exp_avg", "exp_avg_sq") if k in state]
    return [(state[k], other[f"state{n}"]) for n, k in enumerate(keys, 1)]


@pytest.mark.parametrize("decades", [0.0, 4.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_its_quantiser_is_its_run(theirs: None, rule: str, decades: float) -> None:
    """50 steps of its 8-bit optimizers on the CPU: only its quantiser separates us.

    The last bit of a moment decides a code in a thousandth of the elements at most (the two add up
    in different orders), and a sign of Lion's; the other weights are equal to float32 rounding.
    """
    start = torch.randn(64, 512)
    source, a, mine, b = pair(rule, start)
    for g in gradients(start.shape, decades):
        a.grad, b.grad = g.clone(), g.clone()
        source.step()
        mine.step()
    assert_mostly_close(b, a, max_error_rate=1e-3)
    assert relative(b - start, a - start) < 1e-3
    for codes, others in codes_of(mine.state[b], source.state[a]):
        assert float((codes != others).double().mean()) < 1e-3


@pytest.mark.parametrize("decades", [0.0, 4.0])
@pytest.mark.parametrize("rule", RULES)
def test_each_step_from_its_state_is_its_step(theirs: None, rule: str, decades: float) -> None:
    """Weights and state copied from it before every step: nothing accumulates, every weight agrees.

    But for Lion's signs of what is 0 within rounding.
    """
    start = torch.randn(32, 512)
    source, a, mine, b = pair(rule, start)
    for step, g in enumerate(gradients(start.shape, decades)):
        if step:
            mine.load_state_dict(import_bitsandbytes(source.state_dict(), mine))
            b.data.copy_(a.data)
            for codes, others in codes_of(mine.state[b], source.state[a]):
                assert torch.equal(codes, others)
        a.grad, b.grad = g.clone(), g.clone()
        source.step()
        mine.step()
        if rule == "Lion":
            assert_mostly_close(b, a, max_error_rate=1e-3)
        else:
            assert_close(b, a)


def test_distances_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/kernels.md reports: each quantiser's run, and float32's.

    Gradients of one size, or over one decade: both are as near to it, and the nearest codes as near
    as the lattice's. Over four decades, second moments below 1.6e-7 of their block's largest would
    be kept as 0, as by bitsandbytes on CUDA, while the first moment is not, and a step would be
    m / eps: 22 to 32 times the whole movement. Kept positive they are nearer than the lattice's.
    """
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    start = torch.randn(64, 512)
    distance: dict[float, list[float]] = {}
    for decades in (0.0, 1.0, 4.0):
        source, a, mine, b = pair("AdamW", start)
        c = nn.Parameter(start.clone())
        full = torch.optim.AdamW([c], **OWN)
        for g in gradients(start.shape, decades):
            for p, optimizer in ((a, source), (b, mine), (c, full)):
                p.grad = g.clone()
                optimizer.step()
        distance[decades] = [relative(p - start, c - start) for p in (b, a)]
    for decades, most in ((0.0, 0.05), (1.0, 0.05), (4.0, 0.3)):
        near, lattice_run = distance[decades]
        assert near < most and near < 1.02 * lattice_run
