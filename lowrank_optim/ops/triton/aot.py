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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank_optim.ops.triton.variants import TARGETS, Variant, variants

SHARED_LIMIT = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
"""Shared memory that one program may have, bytes (CUDA programming guide; CDNA 3 ISA)."""


class Resources(NamedTuple):
    """What a program needs: registers of a thread, bytes spilled by it, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


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
