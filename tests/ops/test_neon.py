"""The CPU library on 64-bit ARM: it compiles to NEON, and gives the bits that x86 gives."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = ["dispatch", "tables", "table", "kernels_update", "kernels_block", "kernels_matrix"]
SOURCES += ["kernels_coordinate", "kernels_cosine"]
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-DLRO_ISA=baseline", "-static", "-fopenmp"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
FLAGS += ["-Wno-psabi"]
OPS = 19 + 1 - 3  # lines a format: both maps, quantise and dequantise in one; apart are APART
APART = 2  # rounding and the choice of rows

CROSS = "aarch64-linux-gnu-g++"
OBJDUMP = "aarch64-linux-gnu-objdump"
QEMU = "qemu-aarch64-static"
# a block's buffers are filled as far as they are read, which g++ 12 does not always see
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]


def build(compiler: str, out: Path) -> Path:
    sources = [str(CSRC / f"{name}.cpp") for name in SOURCES]
    driver = str(ROOT / "tests" / "ops" / "fingerprint.cpp")
    command = [compiler, *FLAGS, *WARNINGS, "-o", str(out), driver, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def needs(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.mark.slow
def test_arm_computes_the_bits_of_x86(tmp_path: Path) -> None:
    """Every op in every format, emulated; sums have a fixed order, and no product is contracted.

    ARM compilers contract `a * b + c` unless told not to, and its hardware has other NaNs: the
    first is what this holds, the second is not promised.
    """
    needs("g++", CROSS, QEMU)
    here, there = build("g++", tmp_path / "here"), build(CROSS, tmp_path / "there")
    runs = [[str(here)], [QEMU, str(there)]]
    ours, arm = (subprocess.run(r, capture_output=True, text=True, check=True).stdout for r in runs)
    lines = ours.splitlines()
    assert len(lines) == len(set(lines)) == 3 * OPS + APART
    assert all(line.split()[-2] == "0" for line in lines), "an op refused its arguments"
    assert arm == ours


@pytest.mark.slow
def test_loops_are_vectorised_for_neon(tmp_path: Path) -> None:
    """In each kernel file, four floats an instruction; and nothing fused."""
    needs(CROSS, OBJDUMP)
    for name in SOURCES[3:]:
        out = tmp_path / f"{name}.o"
        flags = [f for f in FLAGS if f != "-static"]
        subprocess.run([CROSS, *flags, "-c", "-o", str(out), str(CSRC / f"{name}.cpp")], check=True)
        code = subprocess.run([OBJDUMP, "-d", str(out)], capture_output=True, text=True, check=True)
        wide = re.findall(r"\t(f\w+)\s+v\d+\.4s", code.stdout)
        assert {"fmul", "fadd"} <= set(wide), (name, set(wide))
        assert not re.search(r"\tf(n?madd|n?msub|mla|mls)\s", code.stdout), name
