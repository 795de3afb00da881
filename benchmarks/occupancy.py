"""What the compilers say of the Triton kernels: occupancy, bytes and flops an element.

Run as ``python -m benchmarks.occupancy``; no device is needed. Registers and shared memory are
those of the vendors' assemblers (:mod:`lowrank_optim.ops.triton.aot`). Occupancy is the share of a
multiprocessor's warps that these let reside. Bytes and flops are counted in the compiled program,
before it is laid out in instructions: every load and store with the argument that it is of.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lowrank_optim.ops.triton import aot
from lowrank_optim.ops.triton.aot import Resources
from lowrank_optim.ops.triton.variants import TARGETS as KNOWN
from lowrank_optim.ops.triton.variants import Variant, variants

TARGETS = ("sm_86", "sm_89", "sm_90", "sm_100", "gfx942")


class Multiprocessor(NamedTuple):
    """Limits of NVIDIA's: CUDA C++ programming guide, technical specifications by capability."""

    warps: int
    programs: int
    shared: int
    """Bytes, of which each program takes 1 KiB more than it asks for."""
    registers: int = 65536
    unit: int = 256
    """Registers that a warp is given at once."""
    reserved: int = 1024


class ComputeUnit(NamedTuple):
    """Limits of AMD's: CDNA 3 instruction set architecture, sections 3.6 and 3.10."""

    simds: int = 4
    waves: int = 8
    """Of one SIMD."""
    registers: int = 512
    """Vector registers that a wave's lanes share out among the waves of a SIMD."""
    unit: int = 8
    shared: int = 64 << 10


LIMITS: dict[str, Multiprocessor | ComputeUnit] = {
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
    "gfx942": ComputeUnit(),
}


class Occupancy(NamedTuple):
    """Of one kernel on one target."""

    programs: int
    """That reside on a multiprocessor together."""
    share: float
    """Of the warps that could."""
    limit: str
    """What does not let more reside."""


def occupancy(found: Resources, warps: int, limits: Multiprocessor | ComputeUnit) -> Occupancy:
    """How many programs of ``warps`` warps a multiprocessor holds."""
    if isinstance(limits, ComputeUnit):
        each = -(-found.registers // limits.unit) * limits.unit
        most = limits.simds * limits.waves
        by = {
            "registers": limits.simds * (limits.registers // each) // warps,
            "shared memory": limits.shared // found.shared if found.shared else most,
            "warps": most // warps,
        }
    else:
        each = -(-found.registers * 32 // limits.unit) * limits.unit
        most = limits.warps
        resident = limits.registers // each // 4 * 4  # four schedulers have a quarter each
        shared = -(-found.shared // 128) * 128 + limits.reserved
        by = {
            "registers": resident // warps,
            "shared memory": limits.shared // shared,
            "warps": most // warps,
            "programs": limits.programs,
        }
    programs = min(by.values())
    limit = min(("warps", *by), key=lambda name: by[name])
    return Occupancy(programs, programs * warps / most, limit)


# ---------------------------------------------------------------- bytes and flops


class Traffic(NamedTuple):
    """Elements that one program reads and writes of each argument, and flops; no loop is in it.

    Single numbers, such as a flag, are left out.
    """

    read: Counter[str]
    written: Counter[str]
    flops: int
    sizes: dict[str, int]
    """Bytes of an element of each argument."""


_RESULT = re.compile(r"^%([\w#]+)(?::\d+)? = (\S+) %([\w#]+)")
_FOLLOWS = {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast"}
_ACCESS = re.compile(r"(?:tt\.load|tt\.store) %([\w#]+).*: tensor<([\dx]+)x!tt\.ptr<(\w+)>")
_ARITHMETIC = r"arith\.(?:addf|subf|mulf|divf)|tt\.precise_(?:sqrt|divf)|math\.sqrt"
_FLOPS = re.compile(rf"= (?:{_ARITHMETIC}) .*: tensor<([\dx]+)x")
_SIZES = {"i8": 1, "i1": 1, "bf16": 2, "f16": 2, "i32": 4, "f32": 4, "i64": 8}


def traffic(ttir: str) -> Traffic:
    """What is outside loops: of a lift, all but the operands of its product."""
    base: dict[str, str] = {}
    read, written, sizes = Counter[str](), Counter[str](), dict[str, int]()
    flops = 0
    for line in _outside_loops(ttir):
        result = _RESULT.match(line)
        if result is not None and result[2] in _FOLLOWS:
            source = result[3]
            base[result[1]] = base.get(source, source)
        if access := _ACCESS.search(line):
            name = base.get(access[1], access[1])
            count = math.prod(map(int, access[2].split("x")))
            (written if line.startswith("tt.store") else read)[name] += count
            sizes[name] = _SIZES[access[3]]
        if work := _FLOPS.search(line):
            flops += math.prod(map(int, work[1].split("x")))
    return Traffic(read, written, flops, sizes)


def _outside_loops(ttir: str) -> Iterator[str]:
    open_blocks: list[bool] = []
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}") and open_blocks:
            open_blocks.pop()
        loop = re.search(r"\bscf\.(for|while)\b", line) is not None
        if not any(open_blocks) and not loop:
            yield line
        if re.search(r"\{( loc\(.*\))?$", line):
            open_blocks.append(loop)


MAPS = ("signed_map", "unsigned_map", "signed_edges", "unsigned_edges", "entries")
"""Tables of 1 KiB that stay in the first cache: what is looked up there crosses no memory."""


SEARCHES = (
    "residual_factors_kernel", "cosine_place_kernel", "top_rows_kernel", "row_dots_kernel",
    "turn_rows_kernel", "step_rows_kernel",
)  # fmt: skip
"""What loops over an argument, or looks up in it."""


def elements(variant: Variant) -> int | None:
    """Elements of the matrix or list that a program works on; None where it loops or searches."""
    c = variant.constants
    if variant.kernel.__name__ in SEARCHES:
        return None
    if "BLOCK" in c and "MANY" in c:
        return int(c["BLOCK"])
    if "COUNT" in c:
        return int(c["COUNT"] * c["LANES"])
    if variant.kernel.__name__.startswith(("lift", "coordinate")):
        return int(c["BM"] * c["BN"])
    return None


def bytes_each(variant: Variant, found: Traffic) -> float | None:
    """Bytes an element that cross memory, gradients counted as float32 where weights are not there.

    Maps are left out.
    """
    count = elements(variant)
    if count is None:
        return None
    total = 0
    for way in (found.read, found.written):
        for name, n in way.items():
            if name not in MAPS:
                total += n * (4 if name == "grad" else found.sizes[name])
    return total / count


ACCESSES = re.compile(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)")


def widest(ptx: str) -> int:
    """Bytes of the widest access of a lane to memory."""
    found = [int(vector or 1) * int(bits) // 8 for vector, bits in ACCESSES.findall(ptx)]
    return max([*found, *(16 for _ in re.finditer(r"cp\.async.*0x10", ptx))], default=0)


# ---------------------------------------------------------------- the table


ROWS = (
    "adamw/one", "adamw rows/one", "lion/one", "moment/one", "adamw 8bit/one", "lion 8bit/one",
    "moment 8bit/one", "quantize/one", "dequantize/one", "stochastic_round/one", "decay/one",
    "direction_add/one",
    "count/one", "row_steps/one", "residual_factors/one", "row_dots/one", "turn_rows lengths/one",
    "step_rows/one",
    "column_norms/rows", "coordinate sign/rows", "lift_term/rows", "lift_scaled bf16/rows",
    "lift_scaled bf16 sm_80/rows", "lift_scaled bf16 sm_90/rows", "lift_sign bf16/rows",
    "lift_sign bf16 sm_80/rows", "lift_sign bf16 sm_90/rows", "lift_scaled fp32/rows",
    "lift_sign fp32/rows", "cosine_place/one", "cosine_fold folded/rows",
    "cosine_score l2/mirrored", "cosine_pick/mirrored", "cosine_add folded/rows",
    "top_rows 4096/one", "move_rows 256/one",
)  # fmt: skip
"""One variant of each kernel, of lifts each tile; the notes have the resources of all."""
PLAIN = "sm_89"
"""Where bytes and flops are read: they are of the program, not of a target."""


def row(variant: Variant, targets: Sequence[str] = TARGETS) -> tuple[str, ...]:
    """Cells: bytes and flops an element, widest access, and occupancy on each target."""
    cells, figures = [], ("–", "–", "–")
    for name in targets:
        if name not in variant.targets:
            cells.append("–")
            continue
        target = KNOWN[name]
        compiled = aot.build(variant, target)
        warps = aot.warps_on(variant, target)
        found = occupancy(aot.resources(compiled, target), warps, LIMITS[name])
        cells.append(f"{100 * found.share:.0f} % ({found.limit})")
        if name == PLAIN or PLAIN not in variant.targets:
            seen, count = traffic(compiled.asm["ttir"]), elements(variant)
            if count is not None:
                each = f"{bytes_each(variant, seen):.4g}", f"{seen.flops / count:.3g}"
                figures = (*each, str(widest(compiled.asm["ptx"])))
            else:
                figures = ("–", "–", str(widest(compiled.asm["ptx"])))
    return (variant.name, *figures, *cells)


HEADER = ("kernel", "bytes", "flops", "widest access")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of docs/kernels.md."""
    parser = argparse.ArgumentParser(description="Occupancy of the Triton kernels, compiled here.")
    parser.add_argument("--targets", nargs="+", choices=LIMITS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", default=list(ROWS), metavar="NAME")
    args = parser.parse_args(arguments)
    known = {v.name: v for v in variants()}
    if unknown := [name for name in args.kernels if name not in known]:
        parser.error(f"--kernels: no kernel is called {unknown[0]!r}; there are {', '.join(known)}")
    header = (*HEADER, *args.targets)
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name in args.kernels:
        print(f"| {' | '.join(row(known[name], args.targets))} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
