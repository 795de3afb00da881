"""Every op through the dispatcher, on each backend of the CPU, against float64 code.

``test_native.py`` and ``test_triton.py`` test the kernels; this is what they have in common.
"""

from __future__ import annotations

import os
import runpy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops import dispatch, native, reference, schema
from lowrank_optim.ops.cosine import CosineTransform
from lowrank_optim.ops.quant import Quantized, layout, zero_code
from lowrank_optim.ops.schema import SCHEMAS
from tests.compare import assert_close
from tests.ops import ops_cases as cases
from tests.ops import ops_cosines, ops_factors, ops_turns
from tests.ops.checks import check_stored, run
from tests.ops.interpreted import INTERPRETED, first_triton
from tests.ops.rounding import flat_places
from tests.pairwise import paired

READY, REASON = native.available("cpu")
needs_native = pytest.mark.skipif(not READY, reason=REASON)


def test_the_library_is_there_where_it_could_be_built() -> None:
    """An install whose csrc fails to build succeeds without it, and native tests would all skip."""
    wanted = os.environ.get("LOWRANK_OPTIM_NATIVE") != "0"
    if wanted and shutil.which(os.environ.get("CXX", "c++")):
        assert READY, REASON


BACKENDS = ["triton"] if INTERPRETED else ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HOW = ["rows", "columns", "slice"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op: str) -> None:
    """Schema: what is declared mutated is what changes. Fake: shapes, dtypes and mutation agree.

    AOT dispatch does not functionalise ops that mutate lists, and no op has a gradient.
    """
    a = cases.example(op)
    call = getattr(torch.ops.lowrank_optim, op).default
    tests = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(call, [a[n] for n in cases.names(op)], test_utils=tests)
    assert found == dict.fromkeys(tests, "SUCCESS")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("op", cases.ELEMENTWISE + cases.BITS8)
def test_directions(backend: str, op: str, how: str, dtype: torch.dtype) -> None:
    run(op, cases.elementwise(op, dtype, how=how))


@pytest.mark.parametrize("op", cases.ELEMENTWISE + cases.BITS8)
def test_guarded_and_by_row(backend: str, op: str) -> None:
    """A NaN gradient that is said to be unsound changes nothing; rows have steps of their own.

    Rows of ``(E, k, n)`` are counted over both leading dimensions: the reference indexed the first
    alone in 8 bits, and the others indexed both.
    """
    run(op, cases.elementwise(op, torch.float32, by_row="adamw" in op, unsound=4))
    a = cases.elementwise(op, torch.float32, unsound=6)
    before = {k: x[6].clone() for k, x in a.items() if k[:4] in ("code", "scal", "exp_", "mome")}
    cases.call(op, a)
    assert all(torch.equal(a[k][6], x) for k, x in before.items())
    assert torch.equal(a["outs"][6], torch.zeros(cases.FLAT[6]))


@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
@pytest.mark.parametrize("op", cases.ELEMENTWISE + cases.BITS8)
def test_extreme_directions(backend: str, op: str, magnitude: float) -> None:
    """Squares of 1e-30 and 1e30 are numbers of float32, and so are a hundredth of them."""
    run(op, cases.elementwise(op, torch.float32, magnitude=magnitude))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("op", [*cases.APPLIES, "column_norms"])
def test_matrices(backend: str, op: str, how: str, dtype: torch.dtype) -> None:
    """A batch is each matrix alone: the reference took the coordinates of experts for experts."""
    for free in ("sign", "sgd", "none") if op == "coordinate_add_" else ("sign",):
        run(op, cases.matrices(op, dtype, how=how, free=free))


@pytest.mark.parametrize(
    ("op", "factors", "dtype", "how"),
    paired(cases.APPLIES, [("steps",), ("decays",), ("gains",), cases.FACTORS], DTYPES, HOW),
)
def test_factors_on_the_device(
    backend: str, op: str, factors: tuple[str, ...], dtype: torch.dtype, how: str
) -> None:
    """Of step size, decay and gain, each matrix its own: one of them alone, or all.

    One that is not finite keeps its bits. Native kernels take numbers of the host: the reference
    serves in their place.
    """
    for free in ("sign", "sgd", "none") if op == "coordinate_add_" else ("sign",):
        run(op, cases.matrices(op, dtype, how=how, free=free, factors=factors))
        a = cases.matrices(op, dtype, how=how, free=free, factors=factors, unsound=2)
        kept = a["params"][2].clone()
        run(op, a)
        assert torch.equal(a["params"][2], kept)


@pytest.mark.parametrize("op", cases.APPLIES)
def test_factors_of_no_step(backend: str, op: str) -> None:
    """As many as matrices, ``()``, of float32 or float64: kernels read one number, unasked."""
    a = cases.matrices(op, torch.float32, factors=cases.FACTORS)
    for wrong, why in (
        (a["steps"][1:], "steps has 3 tensors, not 4"),
        ([x.reshape(1) for x in a["steps"]], r"steps must be .* \(\), got torch.float32 \(1,\)"),
        ([x.half() for x in a["steps"]], r"steps must be float32 .* got torch.float16 \(\)"),
    ):
        before = [w.clone() for w in a["params"]]
        with pytest.raises(ValueError, match=why):
            cases.call(op, {**a, "steps": wrong})
        assert all(map(torch.equal, a["params"], before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_coordinate_steps(backend: str, how: str, dtype: torch.dtype) -> None:
    """More picked rows than one buffer holds, fewer than are packed by masks, none, and all."""
    shapes = [*cases.MATRICES, (1101, 35), (0, 5), (5, 0)]
    for free in ("sign", "sgd", "none"):
        run("coordinate_adamw_", cases.coordinate_steps(dtype, shapes=shapes, how=how, free=free))
    for k in (0, 3, 130):
        a = cases.coordinate_steps(dtype, shapes=[(130, 19)], how=how)
        drawn = torch.randperm(130)[:k].sort().values.int()
        a["indices"] = [drawn]
        for name in ("exp_avgs", "exp_avg_sqs"):
            a[name] = [torch.rand(k, 19)]
        run("coordinate_adamw_", a)


BASES = ["dct2", "dct3"]


@pytest.mark.parametrize(
    ("op", "basis", "how", "dtype"),
    paired(ops_cosines.COSINES, BASES, ["rows"], [torch.float32])
    if INTERPRETED
    else paired(ops_cosines.COSINES, BASES, HOW, DTYPES),
)
def test_cosines(backend: str, op: str, basis: str, how: str, dtype: torch.dtype) -> None:
    """Every kind of factor, tiles and their tails; with rows' own steps and moves, and without."""
    # 97: no native kernel has a stage for it; test_triton_cosine.py has the lengths of Triton's
    for n in (12,) if INTERPRETED else (1, 2, 12, 35, 64, 97):
        for flag in (False, True):
            keys = {"by_row": flag, "moved": flag, "ranking": ("l1", "l2")[flag]}
            run(op, ops_cosines.arguments(op, dtype, n=n, how=how, basis=basis, **keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_directions_that_are_added(backend: str, how: str, dtype: torch.dtype) -> None:
    """Step sizes and decays on the device and not; weights and directions of any strides."""
    for factors in (True, False):
        a = ops_factors.arguments("direction_add_", dtype, how=how, factors=factors)
        run("direction_add_", a)
    a["updates"] = [cases.strided(x, how) for x in a["updates"]]
    run("direction_add_", a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_decays_of_matrices(backend: str, how: str, dtype: torch.dtype) -> None:
    """With a factor on the device and without; one that is not finite keeps its bits."""
    for factors in (True, False):
        a = ops_factors.arguments("decay_", dtype, how=how, factors=factors, unsound=3)
        kept = a["params"][3].clone()
        run("decay_", a)
        assert torch.equal(a["params"][3], kept)
        run("decay_", ops_factors.arguments("decay_", dtype, how=how, factors=factors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_products_with_factors_on_the_device(backend: str, how: str, dtype: torch.dtype) -> None:
    """Weights and operands of any strides; without columns, and of one entry."""
    run("addmm_", ops_factors.arguments("addmm_", dtype, how=how))


def test_factors_of_matrices_and_columns(backend: str) -> None:
    """Limits that bite and that do not, a residual of rounding alone, and a gradient of NaN."""
    run("row_steps_", ops_factors.arguments("row_steps_", torch.float32))
    for share in (0.4375, 1.0):
        run(
            "residual_factors_",
            ops_factors.arguments("residual_factors_", torch.float32, share=share),
        )
    a = ops_factors.arguments("residual_factors_", torch.float32, share=1.0)
    a["grads"] = [x.clone() for x in a["lows"]]
    run("residual_factors_", a)
    assert [x.max() for x in a["norms"]] == [0, 0, 0, 0]
    a = ops_factors.arguments("residual_factors_", torch.float32, unsound=2)
    before = a["norms"][2].clone()
    cases.call("residual_factors_", a)
    assert torch.equal(a["norms"][2], before)
    assert all(x.isfinite().all() for i, x in enumerate(a["norms"] + a["outs"]) if i != 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unsound_lift_writes_nothing(backend: str, dtype: torch.dtype) -> None:
    for unsound in (0, 3):
        a = ops_cosines.arguments("cosine_lift_add_", dtype, unsound=unsound)
        before = [w.clone() for w in a["params"]]
        run("cosine_lift_add_", a)
        for i, (w, old) in enumerate(zip(a["params"], before, strict=True)):
            assert torch.equal(w, old) == (i == unsound)


def test_top_rows(backend: str) -> None:
    """Among equals the lowest; with nothing to choose, and with everything."""
    if INTERPRETED and first_triton():
        pytest.skip("the interpreter of Triton 3.2 takes no range up to what a kernel computes")
    for _ in range(4 if INTERPRETED else 20):
        run("top_rows_", ops_cosines.top(torch.float32))
    a = ops_cosines.top(torch.float32)
    a["indices"] = [torch.arange(x.numel()).int() for x in a["scores"]]
    a["sources"] = [torch.full_like(x, 77) for x in a["indices"]]
    run("top_rows_", a)
    a["indices"], a["sources"] = ([x[:0] for x in a[k]] for k in ("indices", "sources"))
    run("top_rows_", a)
    for _ in range(1 if INTERPRETED else 3):
        run("top_rows_", ops_cosines.told(torch.float32))


def test_top_rows_of_what_says_nothing_stay(backend: str) -> None:
    """Indices keep their bits, beside others that are chosen; flags say which, and why."""
    a = ops_cosines.told(torch.float32)
    before = [x.clone() for x in a["indices"]]
    cases.call("top_rows_", a)
    for n, (x, old) in enumerate(zip(a["indices"], before, strict=True)):
        fine, zero = n % 5 == 0, n % 5 == 1
        assert (bool(a["finite"][n]), bool(a["usable"][n])) == (fine or zero, fine)
        assert fine or torch.equal(x, old)


def test_top_coefficients_of_what_says_nothing(backend: str) -> None:
    """The old ones stay, and their coefficients are taken, beside others that are chosen."""
    a = ops_cosines.arguments("cosine_top_project_", torch.float32, unsound=1)
    a["grads"][2].zero_()
    before = [x.clone() for x in a["indices"]]
    cases.call("cosine_top_project_", a)
    for n, (index, old, source, low) in enumerate(
        zip(a["indices"], before, a["sources"], a["outs"], strict=True)
    ):
        assert (bool(a["finite"][n]), bool(a["usable"][n])) == (n != 1, n not in (1, 2))
        if n in (1, 2):
            assert torch.equal(index, old) and source.tolist() == [*range(old.numel())]
        lost = torch.zeros_like(low, dtype=torch.bool)
        lost[:, :1] = n == 1
        assert torch.equal(low.isnan(), lost) and (n != 2 or not low.any())


def test_top_rows_that_move(backend: str) -> None:
    """In any order, of every format and width."""
    for _ in range(1 if INTERPRETED else 3):
        run("move_rows_", ops_cosines.moves())
    long = torch.arange(3000.0).view(1000, 3)
    source = torch.randperm(1000).int()
    given = {"xs": [long.clone()], "sources": [source], "fills": [0]}
    run("move_rows_", given)
    assert torch.equal(given["xs"][0], long[source.long()])


def test_flags_decide_what_is_counted(backend: str) -> None:
    """One more, of nothing but what is finite."""
    run("count_", ops_factors.arguments("count_", torch.float32))
    run("count_", ops_factors.arguments("count_", torch.float32, unsound=2))


@pytest.mark.parametrize("across", [False, True], ids=["", "across"])
@pytest.mark.parametrize("lengths", [False, True], ids=["turns", "lengths"])
def test_rows_that_turn(backend: str, lengths: bool, across: bool) -> None:
    """Directions and moves of every format; a row that does not move keeps its bits."""
    for narrow, moves in ((None, torch.bfloat16), (torch.bfloat16, torch.float32), (None, None)):
        own = {"lengths": lengths, "across": across, "narrow": narrow, "moves": moves}
        a = ops_turns.arguments("turn_rows_", torch.float32, **own)
        run("turn_rows_", a)
        for n, (x, out) in enumerate(zip(a["xs"], a["outs"], strict=True)):
            still = (a["directions"][n] == 0).all(-1)
            if across:
                still = a["across"][n][1] == 0
            assert torch.equal(out[still], x[still])
        run("row_dots_", ops_turns.arguments("row_dots_", torch.float32, narrow=narrow))


@pytest.mark.parametrize("on_device", [False, True], ids=["", "decays"])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_rows_that_step(backend: str, ahead: bool, on_device: bool) -> None:
    """Directions and moves of every format, or none."""
    for narrow, moves in ((None, torch.bfloat16), (torch.bfloat16, torch.float32), (None, None)):
        own = {"ahead": ahead, "on_device": on_device, "narrow": narrow, "moves": moves}
        run("step_rows_", ops_turns.arguments("step_rows_", torch.float32, **own))


@pytest.mark.parametrize(
    ("op", "own"),
    [
        ("turn_rows_", {"lengths": True}),
        ("turn_rows_", {"lengths": False, "across": True}),
        ("step_rows_", {"ahead": True}),
        ("step_rows_", {"ahead": False, "on_device": True}),
    ],
    ids=str,
)
def test_rows_are_stepped_where_they_lie(backend: str, op: str, own: dict[str, Any]) -> None:
    """New rows over the old ones, and what the weights move by: to the bit as apart from them."""
    a = ops_turns.arguments(op, torch.float32, **own)
    b = cases.on("cpu", a)
    b["outs"] = b["xs"]
    cases.call(op, a)
    cases.call(op, b)
    for key in ("outs", "moves"):
        assert all(map(torch.equal, a[key], b[key]))


def test_a_row_that_is_not_finite_is_alone(backend: str) -> None:
    """NaN and infinity reach all of their row, and nothing of another."""
    a = ops_turns.arguments("turn_rows_", torch.float32)
    a["directions"][2][0, 7], a["directions"][2][2, 1] = torch.nan, torch.inf
    cases.call("turn_rows_", a)
    assert a["outs"][2].isfinite().all(-1).tolist() == [False, True, False, True, True]
    assert not bool(a["outs"][2][0].isfinite().any())
    assert all(x.isfinite().all() for n, x in enumerate(a["outs"] + a["moves"]) if n % 6 != 2)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["rows", "columns"])
def test_a_coordinate_step_is_its_parts_to_the_bit(how: str, dtype: torch.dtype) -> None:
    """Directions of the gathered rows, then their apply: the same arithmetic in one pass."""
    a = cases.coordinate_steps(dtype, shapes=[(1101, 35), (70, 64)], how=how)
    b = cases.on("cpu", a)
    cases.call("coordinate_adamw_", a)
    for i, (w, g, index) in enumerate(zip(b["params"], b["grads"], b["indices"], strict=True)):
        low, out = g[index.long()].contiguous(), torch.empty_like(b["exp_avgs"][i])
        moments = [b["exp_avgs"][i]], [b["exp_avg_sqs"][i]]
        betas = cases.BETA1, cases.BETA2
        native.adamw_direction_([low], *moments, [out], *betas, [b["eps"][i]], [], [], [])
        gain = b["free_steps"][i] / b["steps"][i]
        step = b["steps"][i]
        native.coordinate_add_([w], [g], [index], [out], cases.DECAY, step, 1.0, gain, "sign")
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            assert torch.equal(a[name][i], b[name][i]), name


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", cases.APPLIES)
def test_an_unsound_matrix_keeps_its_bits(
    backend: str, op: str, dtype: torch.dtype, how: str
) -> None:
    """No host waits for a device to say that a gradient is NaN: the apply itself must not write.

    Neither decay nor update reaches W; a batch has one flag; its neighbours in the list move.
    """
    for free in ("sign", "sgd", "none") if op == "coordinate_add_" else ("sign",):
        for unsound in (0, 2):
            shapes = cases.MATRICES[1:]
            a = cases.matrices(op, dtype, shapes=shapes, how=how, free=free, unsound=unsound)
            before = [w.clone() for w in a["params"]]
            run(op, a)
            for i, (w, old) in enumerate(zip(a["params"], before, strict=True)):
                assert torch.equal(w, old) == (i == unsound)


def test_flags_are_bools(backend: str) -> None:
    a = cases.matrices("lift_add_sign_", torch.float32, unsound=1)
    with pytest.raises(ValueError, match=r"finite must be torch\.bool"):
        cases.call("lift_add_sign_", {**a, "finite": [s.float() for s in a["finite"]]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_of_zero_add_exactly_nothing(backend: str, dtype: torch.dtype) -> None:
    """Where c is 0, bits do not depend on G and R: Fira's guard for a column whose R is zero."""
    a = cases.matrices("lift_add_scaled_", dtype)
    for c in a["columns"]:
        c[..., ::2] = 0.0
    b = cases.on("cpu", a)
    for name in ("grads", "lows"):
        for x in b[name]:
            x[..., ::2] = 1e3 * torch.randn_like(x[..., ::2])
    run("lift_add_scaled_", a)
    cases.call("lift_add_scaled_", b)
    for w, other in zip(a["params"], b["params"], strict=True):
        assert torch.equal(w, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_basis_of_no_directions_leaves_the_scaled_gradient(
    backend: str, dtype: torch.dtype
) -> None:
    """APOLLO's step: the product is empty, and ``W <- decay W - lr G o c``."""
    a = cases.matrices("lift_add_scaled_", dtype)
    a["bases"] = [x[..., :0] for x in a["bases"]]
    for name in ("updates", "lows"):
        a[name] = [x[..., :0, :] for x in a[name]]
    parts = zip(a["params"], a["grads"], a["columns"], strict=True)
    want = [cases.DECAY * w.double() - cases.LR * g.double() * c.double() for w, g, c in parts]
    run("lift_add_scaled_", a)
    for w, expected in zip(a["params"], want, strict=True):
        assert_close(w, expected, dtype)


@pytest.mark.parametrize("op", [*cases.APPLIES, "column_norms"])
def test_matrices_of_no_elements_and_of_huge_ones(backend: str, op: str) -> None:
    run(op, cases.matrices(op, torch.float32, shapes=[(0, 5), (5, 0), (3, 4), (0, 3, 4)]))
    run(op, cases.matrices(op, torch.float32, magnitude=1e15))


@pytest.mark.parametrize("op", SCHEMAS)
def test_no_tensors(backend: str, op: str) -> None:
    """An empty list is nothing to do, on every backend: it was an IndexError in the dispatcher."""
    a = {k: [] if isinstance(x, list) else x for k, x in cases.example(op).items()}
    assert cases.call(op, a) == ([] if op in schema.FOUND else None)


@pytest.mark.parametrize("op", [o for o in SCHEMAS if "8bit" not in o and "blockwise" not in o])
def test_float64(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checks: the reference serves float64 to float64's precision."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    if op in cases.ELEMENTWISE:
        run(op, cases.elementwise(op, torch.float64, by_row="adamw" in op))
    elif op == "coordinate_adamw_":
        run(op, cases.coordinate_steps(torch.float64))
    elif op == "top_rows_":
        run(op, ops_cosines.top(torch.float64))
        run(op, ops_cosines.told(torch.float64))
    elif op == "move_rows_":
        run(op, ops_cosines.moves())
    elif op in ops_cosines.COSINES:
        run(op, ops_cosines.arguments(op, torch.float64))
    elif op in ops_factors.OPS:
        run(op, ops_factors.arguments(op, torch.float64))
    elif op != "stochastic_round_":
        run(op, cases.matrices(op, torch.float64))
        if op in cases.APPLIES:
            run(op, cases.matrices(op, torch.float64, factors=cases.FACTORS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantise_and_back(backend: str, signed: bool, dtype: torch.dtype) -> None:
    for how in HOW:
        a = cases.storage("quantize_blockwise_", dtype, signed=signed, how=how)
        cases.call("quantize_blockwise_", a)
        for x, codes, scales in zip(a["xs"], a["codes"], a["scales"], strict=True):
            check_stored(codes, scales, x.double(), signed, how)
    run("dequantize_blockwise_", cases.storage("dequantize_blockwise_", dtype, signed=signed))


def tiny() -> list[Tensor]:
    """Blocks whose largest entry is denormal, zero, or next to float32's largest."""
    scales = torch.tensor([1e-45, 3e-42, 1e-39, 2e-38, 0.0, 1e-30, 3e38])
    unit = torch.cat([torch.ones(1), torch.zeros(1), torch.linspace(-1, 1, 298)])
    return [scales[:, None] * unit]


def test_denormal_blocks(backend: str) -> None:
    """Zero stays zero beside 1e-45: 1 / scale overflowed in the reference, and 0 inf is NaN."""
    (x,) = tiny()
    codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(14)
    ops.quantize_([x], [Quantized(codes, scales, True)])
    (back,) = ops.dequantize([Quantized(codes, scales, True)])
    tops = [b.abs().amax(-1) for b in x.split(256, -1)]
    assert torch.equal(scales, torch.stack(tops, -1).ravel())
    assert torch.equal(back[:, 1], torch.zeros(7)) and torch.equal(back[:, 0], x[:, 0])
    normal = scales.reshape(7, 2).amax(1) > 2e-38
    check_stored(codes[normal], scales.reshape(7, 2)[normal].ravel(), x[normal].double(), True, "")


@needs_native
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_reference_and_native_give_the_same_codes(signed: bool) -> None:
    """Bit for bit, tails, denormal blocks, zeros and all."""
    xs = [torch.randn(s) * 10.0 ** torch.randint(-20, 20, s) for s in cases.FLAT] + tiny()
    xs += [torch.randn(300_000), torch.randn(3, 100_001)]
    xs = xs if signed else [x.abs() for x in xs]
    found = []
    for module in (reference, native):
        stored = [
            Quantized(torch.full(x.shape, 9, dtype=torch.uint8), torch.full((n,), 9.0), signed)
            for x in xs
            for n in [layout(x.shape).scales]
        ]
        layouts = [list(part) for part in zip(*(q.layout for q in stored), strict=True)]
        codes, scales = [q.codes for q in stored], [q.scales for q in stored]
        module.quantize_blockwise_(xs, codes, scales, stored[0].map, *layouts)
        found.append(codes + scales)
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@needs_native
def test_reference_and_native_round_alike() -> None:
    """The noise is a hash of position and seed, so every backend draws the same."""
    xs = [torch.randn(s) * 10.0 ** torch.randint(-38, 38, s) for s in cases.FLAT]
    xs.append(torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf]))
    found = []
    for module in (reference, native):
        outs = [torch.zeros(x.shape, dtype=torch.bfloat16) for x in xs]
        module.stochastic_round_(xs, outs, [17 * i for i in range(len(xs))], *flat_places(xs))
        found.append(outs)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_no_square_of_a_direction_vanishes(backend: str) -> None:
    """Gradients over ten decades within a block: v is 0 where every gradient was, and only there.

    A block with an infinity still reads back as no number.
    """
    for shape in ((4, 512), (3, 700), (40, 7)):
        grad = torch.randn(shape) * 10 ** (-10 * torch.rand(shape))
        grad[torch.rand(shape) < 0.2] = 0
        first, second = (
            Quantized(
                torch.full(shape, zero_code(signed), dtype=torch.uint8),
                torch.zeros(layout(shape).scales),
                signed,
            )
            for signed in (True, False)
        )
        out = torch.empty(shape)
        for _ in range(3):
            ops.adamw_direction_([grad], [first], [second], [out], 0.9, 0.999, [1e-30])
            values = ops.dequantize([second])[0]
            assert torch.equal(values > 0, grad.square() > 0)
            assert bool(out.isfinite().all())
        grad[0, 0] = float("inf")
        ops.adamw_direction_([grad], [first], [second], [out], 0.9, 0.999, [1e-30])
        assert not ops.dequantize([second])[0][0, : min(256, shape[1])].isfinite().any()


# ---------------------------------------------------------------- the dispatcher


def test_default_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best that is there; float64, and devices without kernels, get the reference."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.backend(torch.empty(0)) is (native if READY else reference)
    assert dispatch.backend(torch.empty(0, dtype=torch.float64)) is reference
    assert dispatch.backend(torch.empty(0, device="meta")) is reference
    assert dispatch.ORDER["cuda"][-1] == dispatch.ORDER["cpu"][-1] == "reference"


@pytest.mark.parametrize(
    "forced,dtype,why",
    [
        pytest.param("native", torch.float64, "float64", marks=needs_native),
        ("triton", torch.float32, "TRITON_INTERPRET|not installed"),
    ],
)
def test_a_forced_backend_that_cannot_run_raises(
    forced: str, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a silent fall-back, and the message says why."""
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    x = torch.randn(4, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"{forced} cannot run on cpu: .*({why})"):
        ops.moment_([x], [torch.zeros_like(x)], [torch.zeros_like(x)], 0.9, 0.1)


def test_an_unknown_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"LOWRANK_OPTIM_BACKEND must be one of .*'cuda'"):
        ops.column_norms([torch.randn(3, 4)])


def test_lists_of_unequal_length_and_wrong_dtypes_raise(backend: str) -> None:
    a = cases.elementwise("moment_8bit_", torch.float32)
    with pytest.raises(ValueError, match="codes has 6 tensors, not 7"):
        cases.call("moment_8bit_", {**a, "codes": a["codes"][1:]})
    with pytest.raises(ValueError, match=r"codes must be torch\.uint8"):
        cases.call("moment_8bit_", {**a, "codes": [c.int() for c in a["codes"]]})


def test_names_that_no_op_knows_raise(backend: str) -> None:
    """The reference took any basis but "dct2" for "dct3", and any ranking but "l1" for "l2"."""
    x, device = torch.randn(6, 5), torch.device("cpu")
    plan = CosineTransform.make(6, "dct2", torch.float32, device).plan
    low, index = torch.randn(2, 5), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="basis must be one of 'dct2', 'dct3', got 'dct4'"):
        ops.cosine_scores([x], plan, "dct4", "l2")
    with pytest.raises(ValueError, match="ranking must be one of 'l2', 'l1', got 'max'"):
        ops.cosine_scores([x], plan, "dct2", "max")
    with pytest.raises(ValueError, match="basis must be one of"):
        ops.cosine_project_([x], [index], [low], plan, "dct4")
    with pytest.raises(ValueError, match="basis must be one of"):
        ops.cosine_lift_add_([x], [index], [low], plan, "dct4", 1.0, [1.0], [])
    with pytest.raises(ValueError, match="basis must be one of"):
        CosineTransform.make(6, "dct4", torch.float32, device)
    with pytest.raises(ValueError, match=r"free must be one of .*'sign'.*, got 'cubic'"):
        ops.coordinate_add_([x], [x.clone()], [index], [low], 1.0, 0.1, 1.0, 1.0, "cubic")


def test_the_command_names_backends_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m lowrank_optim.ops``: what serves, and for each backend why or why not."""
    runpy.run_module("lowrank_optim.ops", run_name="__main__")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    chosen = dispatch._choose.__wrapped__(None, "cpu", False).__name__.rsplit(".", 1)[-1]
    assert f"cpu, float32: {chosen}" in printed or "not set" not in lines[0]
    assert "cpu, float64: reference" in printed or "not set" not in lines[0]
    for name in dispatch.BACKENDS:
        (line,) = [x for x in lines if x.split()[:1] == [name]][:1]
        assert line.split()[1] in ("yes", "no")
        assert len(line.split()) > 2, f"no reason given: {line}"
