"""What is said of compiled kernels, by hand: limits of multiprocessors, and accesses of a program.

That every kernel reads and writes each element once is in ``test_triton_aot.py``, which compiles.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.occupancy import LIMITS, ROWS, TARGETS, Resources, occupancy, traffic, widest
from lowrank_optim.ops.triton.variants import variants

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "share", "limit"),
    [
        ("sm_80", 32, 0, 8, 8, 1.0, "warps"),
        ("sm_89", 32, 0, 8, 6, 1.0, "warps"),
        # 215 registers are 27 units of 256 a warp: 9 warps in 65536, of which 8 in four quarters
        ("sm_80", 215, 53248, 4, 2, 8 / 64, "registers"),
        # 52 KiB and 1 KiB of the driver: one of 100 KiB
        ("sm_86", 194, 53248, 4, 1, 4 / 48, "shared memory"),
        ("sm_90", 33, 128, 8, 6, 48 / 64, "registers"),
        ("sm_86", 16, 0, 1, 16, 16 / 48, "programs"),
        # 260 registers leave one wave to a SIMD, and four to a compute unit
        ("gfx942", 260, 0, 2, 2, 4 / 32, "registers"),
        ("gfx942", 255, 20480, 2, 3, 6 / 32, "shared memory"),
        ("gfx942", 64, 0, 4, 8, 1.0, "warps"),
    ],
)
def test_occupancy_by_hand(
    target: str, registers: int, shared: int, warps: int, programs: int, share: float, limit: str
) -> None:
    found = occupancy(Resources(registers, 0, shared), warps, LIMITS[target])
    assert found == (programs, pytest.approx(share), limit)


PROGRAM = """
  tt.func public @k(%grad: !tt.ptr<bf16> loc("grad"(#loc)), %w: !tt.ptr<f32> loc("w"(#loc))) {
    %a = tt.addptr %grad, %start : !tt.ptr<bf16>, i64 loc(#loc1)
    %b = tt.splat %a : !tt.ptr<bf16> -> tensor<8x4x!tt.ptr<bf16>> loc(#loc1)
    %c = tt.load %b, %mask, %zero : tensor<8x4x!tt.ptr<bf16>> loc(#loc1)
    %flag = tt.load %finite : !tt.ptr<i8> loc(#loc1)
    %loop:2 = scf.for %k = %c0 to %n step %c1 iter_args(%p = %q) -> (tensor<8xf32>)  : i32 {
      %d = tt.load %p, %mask : tensor<8x2x!tt.ptr<f32>> loc(#loc1)
      %s = "tt.reduce"(%d) <{axis = 1 : i32}> ({
      ^bb0(%x: f32, %y: f32):
        %z = arith.addf %x, %y : f32 loc(#loc1)
        tt.reduce.return %z : f32 loc(#loc1)
      }) : (tensor<8x2xf32>) -> tensor<8xf32> loc(#loc1)
      %e = arith.mulf %d, %d : tensor<8x2xf32> loc(#loc1)
      scf.yield %e : tensor<8xf32> loc(#loc1)
    } loc(#loc1)
    %f = tt.splat %w : !tt.ptr<f32> -> tensor<8x4x!tt.ptr<f32>> loc(#loc1)
    %g = tt.addptr %f, %at : tensor<8x4x!tt.ptr<f32>>, tensor<8x4xi32> loc(#loc1)
    %h = arith.mulf %c, %c : tensor<8x4xf32> loc(#loc1)
    %i = tt.precise_divf %h, %c : tensor<8x4xf32> loc(#loc1)
    %j = arith.mulf %lr, %lr : f32 loc(#loc1)
    tt.store %g, %i, %mask : tensor<8x4x!tt.ptr<f32>> loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
"""


def test_accesses_are_counted_by_argument() -> None:
    """Through offsets and broadcasts, outside loops; not single numbers."""
    found = traffic(PROGRAM)
    assert found.read == Counter(grad=32) and found.written == Counter(w=32)
    assert found.flops == 64 and found.sizes == {"grad": 2, "w": 4}


def test_the_widest_access() -> None:
    assert widest("@%p1 ld.global.v4.b32 {..}\nst.global.b16 [..]") == 16
    assert widest("@%p1 ld.global.b32 { %r1 }, [..]\nst.shared.v4.b32") == 4
    assert widest("cp.async.cg.shared.global [ %r1 ], [ %rd2 ], 0x10, %r3;") == 16


def documented() -> list[list[str]]:
    """Rows of the table of the documentation."""
    text = DOCS.read_text(encoding="utf-8").split("### Occupancy")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_documentation_has_every_kernel_and_target() -> None:
    header, _, *rows = documented()
    assert tuple(header[4:]) == TARGETS
    assert tuple(row[0] for row in rows) == ROWS
    kernels = {v.name: v.kernel.__name__ for v in variants()}
    assert {kernels[name] for name in ROWS} == set(kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(ROWS)))
def test_the_documented_row_is_what_is_compiled(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.occupancy import row

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = {v.name: v for v in variants()}
    assert documented()[2 + at] == list(row(known[ROWS[at]]))
