"""Compilation without a device: every kernel as the launchers specialise it.

``python -m lowrank_optim.ops.triton.aot`` prints the resources of each on each target.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
SHARED_LIMIT = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
"""Shared memory that one program may have, bytes (CUDA programming guide; CDNA 3 ISA)."""


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


class Resources(NamedTuple):
    """What a program needs: registers of a thread, bytes spilled by it, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


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


def _lists() -> Iterator[Variant]:
    flat = {"BLOCK": ELEMENTS}
    plain = {"row_eps": None, "row_scale": None, "finite": None}
    off = {"ROW_EPS": False, "ROW_SCALE": False, "SOUND": False}
    on = {"ROW_EPS": True, "ROW_SCALE": True, "SOUND": True}
    # sizes of multiples of 16, as most have
    for how, mode in (("one", {**_ONE, "ALIGNED": True}), ("many", _MANY)):
        cut: dict[str, Any] = {
            "num_warps": quantize.WARPS, "COUNT": quantize.BLOCKS, "LANES": 256,
            "WHOLE": how == "one",
        }  # fmt: skip
        known = {"FORM": 1, "FORM2": 2}
        yield _variant(f"adamw/{how}", direction.adamw_kernel, **mode, **flat, **plain, **off)
        yield _variant(f"adamw rows/{how}", direction.adamw_kernel, **mode, **flat, **on)
        for lion, name in ((True, "lion"), (False, "moment")):
            yield _variant(
                f"{name}/{how}", direction.moment_kernel, **mode, **flat, LION=lion, SOUND=True
            )
            yield _variant(
                f"{name} 8bit/{how}", direction8.moment8_kernel,
                **mode, **cut, LION=lion, SOUND=True, FORM=1,
            )  # fmt: skip
        for name, eight in (("adamw 8bit", {**plain, **off}), ("adamw 8bit rows", on)):
            yield _variant(
                f"{name}/{how}", direction8.adamw8_kernel, **mode, **cut, **eight, **known
            )
        yield _variant(f"quantize/{how}", quantize.quantize_kernel, **mode, **cut, FORM=1)
        yield _variant(f"quantize any/{how}", quantize.quantize_kernel, **mode, **cut, FORM=0)
        yield _variant(f"dequantize/{how}", quantize.dequantize_kernel, **mode, **cut)
        yield _variant(
            f"stochastic_round/{how}", rounding.stochastic_round_kernel, **mode, **flat,
            pointers={"out": "*bf16"},
        )  # fmt: skip
        yield _variant(
            f"decay/{how}", factors.decay_kernel, **mode, **flat, FACTORS=True, SOUND=True
        )
        yield _variant(
            f"direction_add/{how}", factors.direction_add_kernel, **mode, **flat,
            STEPPED=True, DECAYED=True, pointers={"w": "*bf16"},
        )  # fmt: skip
        yield _variant(f"count/{how}", factors.count_kernel, **mode, **flat, SOUND=True)
        yield _variant(
            f"row_steps/{how}", factors.row_steps_kernel, **mode, **flat,
            pointers=dict.fromkeys(("log1", "log2", "eps"), "i64"),
        )  # fmt: skip
        yield _variant(
            f"residual_factors/{how}", factors.residual_factors_kernel, **mode, **flat, SOUND=True,
            pointers={"grad": "*fp32"},
        )  # fmt: skip
        known, wide = {"num_warps": 16, "BLOCK": turns.COLUMNS}, {"across": "*fp64"}
        yield _variant(f"row_dots/{how}", turns.row_dots_kernel, **mode, **known)
        forms = ("", False, False), (" lengths", True, False), (" across", True, True)
        for name, lengths, across in forms:
            yield _variant(
                f"turn_rows{name}/{how}", turns.turn_rows_kernel, **mode, **known, pointers=wide,
                LENGTHS=lengths, ACROSS=across, MOVES=True,
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
    return [*_lists(), *_matrices(), *_cosines(), *_rows()]


def warps_on(variant: Variant, target: GPUTarget) -> int:
    """Warps of a program, as `launch.warps` has them."""
    return int(max(1, variant.num_warps * 32 // target.warp_size))


def build(variant: Variant, target: GPUTarget) -> Any:
    """Compile to a binary of ``target``; pointers and 32-bit numbers are taken as aligned to 16."""
    names = variant.kernel.arg_names
    skip = {names[i] for i in range(len(names)) if variant.kernel.params[i].do_not_specialize}
    aligned = [
        i
        for i, name in enumerate(names)
        if name not in skip and variant.types[name].startswith(("*", "i32"))
    ]
    source = _source(variant, aligned)
    options = {
        "num_warps": warps_on(variant, target),
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fusion,
    }
    return triton.compile(source, target=target, options=options)


def _source(variant: Variant, aligned: Sequence[int]) -> ASTSource:
    """What Triton compiles; that of torch 2.6, 3.2, wants constants apart from the signature."""
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
        return ASTSource(variant.kernel, variant.types, constexprs=variant.constants, attrs=attrs)
    from triton.backends.compiler import AttrsDescriptor

    types = {name: kind for name, kind in variant.types.items() if kind != "constexpr"}
    known = {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
    attrs = AttrsDescriptor.from_dict(known)
    return ASTSource(variant.kernel, types, constants=dict(variant.constants), attrs=attrs)


def resources(compiled: Any, target: GPUTarget) -> Resources:
    """As the vendor's own assembler reports them."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {k: int(v) for k, v in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.M)}
        spilled = 4 * found["vgpr_spill_count"] + found["private_segment_fixed_size"]
        return Resources(found["vgpr_count"], spilled, compiled.metadata.shared)
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump, which triton's wheels ship")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}
    # a spill goes to the stack; what else would is an array in local memory, as bad
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def main(names: list[str]) -> None:
    """Print a table: registers / bytes spilled / bytes of shared memory."""
    for variant in variants():
        row = []
        for name in names or TARGETS:
            if name not in variant.targets:
                row.append("–")
                continue
            found = resources(build(variant, TARGETS[name]), TARGETS[name])
            row.append(f"{found.registers} / {found.spilled} / {found.shared}")
        print(f"| {variant.name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
