"""Every kernel compiled ahead of time, without a GPU, and what the vendors' assemblers report.

Code that spills runs, slowly, and nothing else says so; code that needs more shared memory than
a device has fails at its first launch. Both are known at compile time.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton

from benchmarks.occupancy import bytes_each, elements, traffic, widest
from lowrank_optim.ops.triton import OPS, aot, launch
from lowrank_optim.ops.triton.variants import TARGETS, variants
from tests.ops.interpreted import first_triton

VARIANTS = {v.name: v for v in variants()}
NVIDIA, AMD = ("sm_80", "sm_120"), "gfx942"  # the oldest and the newest, least shared memory too
FIRST = {v.kernel.__name__: v.name for v in reversed(VARIANTS.values())}
FAST = [(name, AMD) for name in [*FIRST.values()][:1]]
LAST = {v.kernel.__name__: v.name for v in VARIANTS.values() if not v.name.endswith("/columns")}
FAST += [
    (name, NVIDIA[i % 2] if NVIDIA[i % 2] in VARIANTS[name].targets else VARIANTS[name].targets[0])
    for i, name in enumerate(LAST.values())
]
"""Every kernel's last variant on one of NVIDIA's targets, one kernel's first on AMD's.

Columns are rows with the strides exchanged.
"""
FAST += [(f"cosine_{kind} folded/{x}", "sm_80") for kind in ("fold", "add")
         for x in ("rows", "columns")]  # fmt: skip
SLOW = [(name, x) for name, v in VARIANTS.items() for x in v.targets if (name, x) not in FAST]
REGISTERS = {"sm": 255, "gf": 512}  # addressable by one thread
FUSED = ("lift", "column_norms", "row_steps")  # the last by the exponential of float64
HALVES = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
PRODUCTS = {f"lift_{kind} {form}": x for kind in ("scaled", "sign")
            for form, x in (("bf16", HALVES), ("fp32", "fma.rn.f32"))}  # fmt: skip
"""bfloat16 operands reach the matrix units, float32 accumulators; float32 ones are exact."""
BYTES = {
    "adamw": 24, "adamw rows": 32, "lion": 16, "moment": 16, "stochastic_round": 6,
    "adamw 8bit": 12 + 16 / 256, "adamw 8bit rows": 20 + 16 / 256,
    "lion 8bit": 10 + 8 / 256, "moment 8bit": 10 + 8 / 256,
    "quantize": 5 + 4 / 256, "dequantize": 5 + 4 / 256, "decay": 2 * 2, "count": 8,
    "row_steps": 12,
    "lift_sign bf16": 3 * 2, "lift_sign fp32": 3 * 4,
    "lift_scaled bf16": 3 * 2 + 4 / 128, "lift_scaled fp32": 3 * 4 + 4 / 64,
    "lift_term": 4 + 4 + 2 + 4 / 32,
}  # fmt: skip
"""Bytes an element that docs/kernels.md has as the floor: nothing is read or written twice.

With rows, their eps and scale are read by every element, mostly from the first cache; of a lift
that is what is outside its products, with one factor for each column of a tile.
"""
WIDEST = {
    **dict.fromkeys(("adamw", "adamw rows", "lion", "moment", "stochastic_round"), 16), "decay": 8,
    **dict.fromkeys(("adamw 8bit", "adamw 8bit rows", "lion 8bit", "moment 8bit"), 16),
    "quantize": 16, "dequantize": 16,
}  # fmt: skip
"""Elementwise: four entries of a lane are one access, where no lane has a mask for each; of float32
but for weights. In 8 bits where all blocks are whole."""
RUN = 64
"""Bytes, two sectors of memory, that the lanes of a warp have to read or write side by side."""
SEEN = 8
"""Bytes that a lane has of a tile of two dimensions, by which one sees that the compiler has found
the one along memory. If it has not, versions of it differ in which they take."""
MMA = ("sm_80", "sm_86", "sm_89", "sm_120")  # others have matrix units of their own


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from, or left in, the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


SPILLS: dict[str, dict[tuple[str, str], int]] = {
    "3.2": {
        ("moment 8bit/many", "sm_80"): 8,
        ("lift_scaled bf16 sm_90 steps/rows", "sm_90"): 56,
    },
    "3.7": {
        **{("top_rows 4096/one", f"sm_{x}"): 8 for x in (80, 86, 89)},
        ("top_rows 4096/one", "sm_90"): 16,
    },
    "3.8": {("residual_factors/many", "sm_120"): 8},
}
"""Bytes, of versions of Triton that allot registers in their own way: 3.9 spills none. A program of
``top_rows`` holds all scores of a matrix."""


def check(name: str, target_name: str) -> None:
    if first_triton() and target_name in (AMD, "sm_120"):
        pytest.skip("Triton 3.2 needs ROCm's linker for AMD, and its LLVM aborts at sm_120")
    target = TARGETS[target_name]
    compiled = aot.build(VARIANTS[name], target)
    binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
    assert binary[:4] == b"\x7fELF"
    found = aot.resources(compiled, target)
    version = ".".join(triton.__version__.split(".")[:2])
    known = SPILLS.get(version, {}).get((name, target_name), 0)
    assert found.spilled == known, f"{name} on {target_name} spills {found}"
    assert 0 < found.registers <= REGISTERS[target_name[:2]]
    assert found.shared <= aot.SHARED_LIMIT[target_name], f"{name} on {target_name}: {found}"
    form = VARIANTS[name].constants.get("FORM", 0)
    if target.backend == "cuda" and form:
        # a search of codes is a guess and one exact comparison: only the guess is fused
        c = VARIANTS[name].constants
        lane = c["COUNT"] * c["LANES"] // (32 * VARIANTS[name].num_warps)
        searches = 1 + ("FORM2" in c)
        fused = re.findall(r"fma\.rn\.f32(x2)?", compiled.asm["ptx"])
        assert sum(2 if pair else 1 for pair in fused) == 7 * lane * searches
    elif target.backend == "cuda" and not name.startswith(FUSED):
        # each sum and product is rounded on its own, as in the C++ loops; the fused ones that
        # remain are the refinement steps of the correctly rounded division and square root,
        # which only the assembler writes
        assert "fma" not in compiled.asm["ptx"]
    wanted = BYTES.get(name.split("/")[0])
    if wanted is not None and not name.endswith("/many"):  # addresses from a table have no names
        seen = traffic(compiled.asm["ttir"])
        assert elements(VARIANTS[name]) and bytes_each(VARIANTS[name], seen) == wanted, seen
    masked = not VARIANTS[name].constants.get("WHOLE", True)
    if target.backend == "cuda" and name.split("/")[0] in WIDEST and not masked:
        assert widest(compiled.asm["ptx"]) == WIDEST[name.split("/")[0]], name
    if name.startswith("cosine_"):
        found_runs = runs(name, compiled.asm["ttgir"])
        assert all(warp >= RUN and lane >= seen for lane, warp, seen in found_runs), found_runs
    product = PRODUCTS.get(" ".join(name.split("/")[0].split(" ")[:2]))
    if product and target_name in MMA:
        assert product in compiled.asm["ptx"], name
        assert "tf32" not in compiled.asm["ptx"]
    if "bf16 sm_" in name:
        check_pipeline(compiled, target_name)


def check_pipeline(compiled: Any, target_name: str) -> None:
    """Operands go from memory to the matrix units, asynchronously, and nothing is computed of them.

    A product that waits for its own operand to be rounded ran at a fifth of an H200's rate.
    """
    text = compiled.asm["ttgir"]
    loop = text[text.index("scf.for") : text.index("scf.yield")]
    assert "tt.load" not in loop
    assert "async_copy_global_to_local" in loop
    assert {*re.findall(r"contiguity = (\d+)", loop)} <= {"8"}, "copies of 16 bytes"
    assert not re.search(r"arith\.\w+f |local_store|local_alloc", loop), "arithmetic on operands"
    if target_name == "sm_90":
        assert re.search(r"wgmma\.mma_async\S+\.m64n(128|256)k16", compiled.asm["ptx"])
        assert min(map(int, re.findall(r"pendings = (\d)", loop))) > 0, "waits for each product"


BLOCKED = re.compile(r"^(#\w+) = .*sizePerThread = (\[.*?\]), threadsPerWarp = (\[.*?\])", re.M)
TILE = re.compile(r"tt\.(load|store) .*tensor<\d+x(?:(?!1x)\d+x)?!tt\.ptr<\w*?(\d+)>, (#\w+)>")


def runs(name: str, ttgir: str) -> list[tuple[int, int, int]]:
    """Bytes side by side of each access of a cosine kernel: a lane's, a warp's, a lane's least.

    What transforms take and leave has its pairs side by side, the first dimension of a tile.
    """
    layouts = {k: (json.loads(own), json.loads(lanes)) for k, own, lanes in BLOCKED.findall(ttgir)}
    kernel, layout = name.removeprefix("cosine_").split()[0].split("/")[0], name.split("/")[1]
    found = []
    for kind, bits, at in TILE.findall(ttgir):
        own, lanes = layouts[at]
        matrix = {"fold": kind == "load", "pick": kind == "store", "add": bits == "16"}
        side = 1 if layout != "columns" and matrix.get(kernel) and len(own) == 2 else 0
        lane = own[side] * int(bits) // 8
        known = (
            len(own) == 2 and kernel != "pick" and "mirrored" not in name
        )  # others are not aligned
        found.append((lane, lane * lanes[side], SEEN if known else 1))
    assert len(found) >= 2 or kernel == "place", name
    return found


@pytest.mark.parametrize(("name", "target"), FAST)
def test_compiles_without_spills(name: str, target: str) -> None:
    check(name, target)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), SLOW)
def test_compiles_without_spills_everywhere(name: str, target: str) -> None:
    check(name, target)


def test_every_kernel_is_compiled() -> None:
    """A kernel that is added must be listed: its ``jit`` decorator is found in the sources."""
    package = Path(aot.__file__).parent
    listed = {v.kernel.__name__ for v in VARIANTS.values()}
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in package.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert listed == written
    assert len(written) < len(OPS)  # lion and moment, signed and not, share theirs


def test_compiled_for_portability() -> None:
    """No inline assembly: the kernels must compile for every vendor."""
    for path in Path(aot.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "inline_asm" not in source and "libdevice" not in source.replace("aot", ""), path


class Recorder:
    """In a kernel's place."""

    def __init__(self) -> None:
        self.aligned: list[bool] = []

    def __getitem__(self, grid: object) -> Recorder:
        return self

    def __call__(self, *args: object, ALIGNED: bool, **meta: object) -> None:
        self.aligned.append(ALIGNED)


@pytest.mark.parametrize(
    ("sizes", "offset", "expected"),
    [
        ([32], 0, [True]), ([33], 0, [False]), ([32, 48], 0, [True]), ([32, 33], 0, [False]),
        ([32, 48], 1, [False]),
    ],
)  # fmt: skip
def test_what_is_promised_to_the_compiler_is_so(
    sizes: list[int], offset: int, expected: list[bool]
) -> None:
    """Sizes, and addresses of a list, are multiples of 16; of one tensor Triton looks itself."""
    kernel, tensors = Recorder(), [torch.zeros(n + offset)[offset:] for n in sizes]
    launch.launch(kernel, [tensors, []], [sizes], [1] * len(sizes))
    assert kernel.aligned == expected
