"""Every kernel in the forms that launchers ask for, which :mod:`.aot` compiles without a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

from lowrank_optim.ops.triton import (
    blocks,
    coordinate,
    cosine,
    direction,
    direction8,
    factors,
    lift,
    norms,
    quantize,
    rounding,
    rows,
    turns,
)
from lowrank_optim.ops.triton import cosine_kernels as kernels
from lowrank_optim.ops.triton.launch import ELEMENTS, WARPS

TARGETS = {
    **{f"sm_{a}": GPUTarget("cuda", a, 32) for a in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Variant(NamedTuple):
    """A kernel and one specialisation of it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fusion: bool
    targets: tuple[str, ...] = tuple(TARGETS)
    """Where a launcher asks for it."""


_POINTERS = {
    "table": "*i64", "grad": "*bf16", "x": "*fp32", "exp_avg": "*fp32", "exp_avg_sq": "*fp32",
    "moment": "*fp32", "out": "*fp32", "row_eps": "*fp32", "row_scale": "*fp32", "finite": "*u8",
    "codes": "*u8", "codes2": "*u8", "scales": "*fp32", "scales2": "*fp32", "entries": "*fp32",
    "signed_map": "*fp32", "unsigned_map": "*fp32",
    "signed_edges": "*fp32", "unsigned_edges": "*fp32", "w": "*bf16", "g": "*bf16", "p": "*bf16",
    "n_": "*fp32", "r_": "*fp32", "c": "*fp32", "index": "*i32", "turn": "*i64",
    "places": "*i32", "low": "*fp32", "direction": "*fp32", "norm": "*fp32", "factor": "*fp32",
    "age": "*fp32", "score": "*fp32", "source": "*i32", "usable": "*u8",
    "new": "*i32", "step": "*fp32", "shrink": "*fp32", "more": "*fp32",
    "y": "*fp32", "length": "*fp32", "move": "*bf16",
}  # fmt: skip
_NUMBERS = {"decay", "lr", "scale", "gain", "weight", "weight1", "weight2", "beta2"}
_NUMBERS |= {"tiny", "share", "noise", "limiter"}
_PLAIN = {"step": None, "shrink": None, "STEPPED": False, "DECAYED": False}
_FACTORED = {"STEPPED": True, "DECAYED": True}
_PLAIN_GAIN = {**_PLAIN, "more": None, "GAINED": False}
_FACTORED_GAIN = {**_FACTORED, "GAINED": True}
"""Step size, decay and gain from the host, and from the device."""
_ONE = {"table": None, "MANY": False, "DEPTH": 0, "ALIGNED": False}
_MANY = {"MANY": True, "DEPTH": 8, "ALIGNED": True}


def _variant(
    name: str, kernel: Any, num_warps: int = WARPS, num_stages: int = 3, *, fusion: bool = False,
    pointers: dict[str, str] | None = None, targets: tuple[str, ...] = tuple(TARGETS),
    **constants: Any,
) -> Variant:  # fmt: skip
    known = {**_POINTERS, **(pointers or {})}
    types = {}
    for arg in kernel.arg_names:
        if arg in constants:
            types[arg] = "constexpr"
        elif arg in known:
            types[arg] = known[arg]
        else:
            types[arg] = "fp32" if arg in _NUMBERS else "i32"
    return Variant(name, kernel, types, constants, num_warps, num_stages, fusion, targets)


_FLAT = {"BLOCK": ELEMENTS}
_LISTS = (("one", {**_ONE, "ALIGNED": True}), ("many", _MANY))
"""Of lists that are flat in memory: sizes of multiples of 16, as most have."""


def _cut(how: str) -> dict[str, Any]:
    """Into blocks of 8 bits."""
    whole = {"COUNT": quantize.BLOCKS, "LANES": 256, "WHOLE": how == "one"}
    return {"num_warps": quantize.WARPS, **whole}


def _directions() -> Iterator[Variant]:
    plain = {"row_eps": None, "row_scale": None, "finite": None}
    plain |= {"ROW_EPS": False, "ROW_SCALE": False, "SOUND": False}
    rows = {"ROW_EPS": True, "ROW_SCALE": True, "SOUND": True}
    for how, mode in _LISTS:
        cut = _cut(how)
        for name, given in (("", plain), (" rows", rows)):
            yield _variant(f"adamw{name}/{how}", direction.adamw_kernel, **mode, **_FLAT, **given)
            yield _variant(
                f"adamw 8bit{name}/{how}", direction8.adamw8_kernel,
                **mode, **cut, **given, FORM=1, FORM2=2,
            )  # fmt: skip
        for lion, name in ((True, "lion"), (False, "moment")):
            yield _variant(
                f"{name}/{how}", direction.moment_kernel, **mode, **_FLAT, LION=lion, SOUND=True
            )
            yield _variant(
                f"{name} 8bit/{how}", direction8.moment8_kernel,
                **mode, **cut, LION=lion, SOUND=True, FORM=1,
            )  # fmt: skip


def _storage() -> Iterator[Variant]:
    for how, mode in _LISTS:
        cut = _cut(how)
        yield _variant(f"quantize/{how}", quantize.quantize_kernel, **mode, **cut, FORM=1)
        yield _variant(f"quantize any/{how}", quantize.quantize_kernel, **mode, **cut, FORM=0)
        yield _variant(f"dequantize/{how}", quantize.dequantize_kernel, **mode, **cut)
        yield _variant(
            f"stochastic_round/{how}", rounding.stochastic_round_kernel, **mode, **_FLAT,
            pointers={"out": "*bf16"},
        )  # fmt: skip


def _factors() -> Iterator[Variant]:
    for how, mode in _LISTS:
        yield _variant(
            f"decay/{how}", factors.decay_kernel, **mode, **_FLAT, FACTORS=True, SOUND=True
        )
        yield _variant(
            f"direction_add/{how}", factors.direction_add_kernel, **mode, **_FLAT,
            STEPPED=True, DECAYED=True, pointers={"w": "*bf16"},
        )  # fmt: skip
        yield _variant(f"count/{how}", factors.count_kernel, **mode, **_FLAT, SOUND=True)
        yield _variant(
            f"row_steps/{how}", factors.row_steps_kernel, **mode, **_FLAT,
            pointers=dict.fromkeys(("log1", "log2", "eps"), "i64"),
        )  # fmt: skip
        yield _variant(
            f"residual_factors/{how}", factors.residual_factors_kernel, **mode, **_FLAT,
            SOUND=True, pointers={"grad": "*fp32"},
        )  # fmt: skip


def _turns() -> Iterator[Variant]:
    known: dict[str, Any] = {"num_warps": 16, "BLOCK": turns.COLUMNS}
    for how, mode in _LISTS:
        yield _variant(f"row_dots/{how}", turns.row_dots_kernel, **mode, **known)
        forms = ("", False, False), (" lengths", True, False), (" across", True, True)
        for name, lengths, across in forms:
            yield _variant(
                f"turn_rows{name}/{how}", turns.turn_rows_kernel, **mode, **known,
                LENGTHS=lengths, ACROSS=across, MOVES=True, pointers={"across": "*fp64"},
            )  # fmt: skip
        for name, ahead in (("", False), (" ahead", True)):
            yield _variant(
                f"step_rows{name}/{how}", turns.step_rows_kernel, **mode, **known,
                AHEAD=ahead, DECAYED=ahead, MOVES=True,
            )  # fmt: skip


def _matrices() -> Iterator[Variant]:
    for layout in ("rows", "columns"):
        down = layout == "columns"

        def unit(*names: str, down: bool = down) -> dict[str, int]:
            return {name + ("i" if down else "j"): 1 for name in names}

        bm, bn = norms._COLUMNS_CONTIGUOUS if down else norms._ROWS_CONTIGUOUS
        yield _variant(
            f"column_norms/{layout}", norms.column_norm_kernel, 8, BM=bm, BN=bn, WIDE=False,
            **unit("x"), **(_ONE if down else _MANY), fusion=True,
        )  # fmt: skip
        bm, bn = coordinate._COLUMNS_CONTIGUOUS if down else coordinate._ROWS_CONTIGUOUS
        forms = [(free, code, _PLAIN_GAIN) for free, code in coordinate.FREE.items()]
        forms += [] if down else [("sign steps", coordinate.FREE["sign"], _FACTORED_GAIN)]
        for free, code, given in forms:
            yield _variant(
                f"coordinate {free}/{layout}", coordinate.coordinate_kernel, 4, BM=bm, BN=bn,
                FREE=code, PROBES=11, WIDE=False, SOUND=not down, GROUP=8, nj=1, **unit("w", "g"),
                **given, **(_ONE if down else _MANY),
            )  # fmt: skip
        for products, form, family, b, targets in _lift_blocks():
            name, kernel = (
                ("lift_scaled", lift.lift_scaled_kernel)
                if products == 1
                else ("lift_sign", lift.lift_sign_kernel)
            )
            half = form == "bf16"
            own: dict[str, Any] = {"cj": 1, "READY": half} if products == 1 else {}
            own |= {"r_": None} if products == 1 and half else {"rj": 1}
            narrow = "*bf16" if half else "*fp32"
            forms = (_PLAIN, _FACTORED) if products == 1 else (_PLAIN_GAIN, _FACTORED_GAIN)
            for given in forms[: 1 if down else 2]:
                steps = " steps" if given["STEPPED"] else ""
                yield _variant(
                    f"{name} {form}{family}{steps}/{layout}", kernel, b.num_warps, b.num_stages,
                    fusion=True, pointers=dict.fromkeys(("w", "g", "p", "n_", "r_"), narrow),
                    HALF=half, EVEN=not down, WIDE=False, SOUND=not down, GROUP=lift.BAND,
                    BM=b.BM, BN=b.BN, BR=b.BR, PART=b.PART, pk=1, nj=1, targets=targets,
                    **given, **own, **unit("w", "g"),
                )  # fmt: skip
    bm, bn = lift.TERM
    yield _variant(
        "lift_term/rows", lift.lift_term_kernel, fusion=True, pointers={"out": "*bf16"},
        WIDE=False, BM=bm, BN=bn, nj=1, rj=1, cj=1,
    )  # fmt: skip


def _lift_blocks() -> Iterator[tuple[int, str, str, blocks.Blocks, tuple[str, ...]]]:
    """Products, format, the family that the tile is large for, tile, and its targets."""
    for (products, form), b in blocks.BLOCKS.items():
        yield products, form, "", b, tuple(TARGETS)
    for (family, products), b in blocks.LARGE.items():
        capabilities = [at for at, name in blocks.FAMILIES.items() if name == family]
        names = [f"sm_{major}{minor}" for major, minor in capabilities]
        yield products, "bf16", f" {family}", b, tuple(x for x in names if x in TARGETS)


def _cosines() -> Iterator[Variant]:
    for how, mode in (("one", _ONE), ("many", _MANY)):
        yield _variant(
            f"cosine_place/{how}", kernels.cosine_place_kernel, 4, PROBES=11, BLOCK=cosine.PLACES,
            pointers={"out": "*i32"}, **mode,
        )  # fmt: skip
    left = {"parts": "*i64"}  # what a transform leaves
    for mirror in (False, True):
        name = "mirrored" if mirror else "folded"
        mode = _MANY if mirror else _ONE
        tile = {"BC": cosine.COLUMNS, "BQ": cosine.PAIRS, "MIRROR": mirror}
        yield _variant(
            f"cosine_fold picked/{name}", kernels.cosine_fold_kernel, 4, **tile,
            DOWN=False, PICKED=True, WIDE=False, xj=1, **mode,
        )  # fmt: skip
        for layout in ("rows", "columns"):
            side = "i" if layout == "columns" else "j"
            unit: dict[str, Any] = {"x" + side: 1, "DOWN": side == "i"}
            yield _variant(
                f"cosine_fold {name}/{layout}", kernels.cosine_fold_kernel, 4, **tile,
                PICKED=False, WIDE=False, places=None, **unit, **mode,
                pointers={"x": "*bf16"},
            )  # fmt: skip
            yield _variant(
                f"cosine_add {name}/{layout}", kernels.cosine_add_kernel, 4, **tile,
                WIDE=False, SOUND=layout == "rows", DOWN=unit["DOWN"], **{"w" + side: 1},
                pointers=left, **mode,
            )  # fmt: skip
        for l1 in (False, True):
            yield _variant(
                f"cosine_score {'l1' if l1 else 'l2'}/{name}", kernels.cosine_score_kernel, 4,
                **tile, L1=l1, SPAN=cosine.SPAN, pointers=left, **mode,
            )  # fmt: skip
        yield _variant(
            f"cosine_pick/{name}", kernels.cosine_pick_kernel, 4, BC=cosine.PICKED_COLUMNS,
            BR=cosine.PICKED_ROWS, MIRROR=mirror, pointers=left, **mode,
        )  # fmt: skip


def _rows() -> Iterator[Variant]:
    for how, mode in (("one", _ONE), ("many", _MANY)):
        for size, count in ((4096, 8), (8192, 16)):
            yield _variant(
                f"top_rows {size}/{how}", rows.top_rows_kernel, count, TOLD=True, PROBES=11,
                BLOCK=size, PICKED=rows.PICKED, **mode,
            )  # fmt: skip
        for r, columns in ((256, rows.COLUMNS), (4096, rows.MOVED // 4096)):
            yield _variant(
                f"move_rows {r}/{how}", rows.move_rows_kernel, 8, BR=r, BC=columns,
                pointers={"x": "*i32"}, **mode,
            )  # fmt: skip


def variants() -> list[Variant]:
    """Every kernel, in the forms that a launcher asks for."""
    families = _directions, _storage, _factors, _turns, _matrices, _cosines, _rows
    return [own for family in families for own in family()]
