"""Every CUDA kernel compiles for every architecture, without spills, in bounded registers.

ptxas' own report is the oracle: what it says of registers and shared memory decides occupancy.
`tests/cuda_on_host` runs the kernels.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_optim.ops.native import loader
from tests.pairwise import in_turns

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = {"update": 4, "block": 5, "matrix": 5}  # kernels in each file
ARCHITECTURES = [80, 120, 75, 86, 89, 90, 100]
REGISTERS = 64  # 256 threads a block: four blocks, half occupancy, on 64K registers
SHARED = 8192  # two maps with thresholds are 4 KiB


def compiler() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to compile the CUDA half")
    return nvcc


def report(source: str, arch: int, out: Path) -> str:
    nvcc = compiler()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    if f"compute_{arch}\n" not in known.stdout:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command = [nvcc, *flags, "-o", str(out), str(CSRC / f"{source}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize(("source", "arch"), in_turns([*SOURCES], ARCHITECTURES))
def test_no_spills_and_bounded_resources(arch: int, source: str, tmp_path: Path) -> None:
    text = report(source, arch, tmp_path / "out.cubin")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", text)]
    assert len(registers) == len(spills) == SOURCES[source], text
    assert all(pair == ("0", "0") for pair in spills), text
    assert max(registers) <= REGISTERS, registers
    assert max(shared, default=0) <= SHARED, shared


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_an_error_of_the_runtime_itself_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's runtime refuses to launch: there is no device, or no driver."""
    library = tmp_path / "liblowrank_optim_cuda.so"
    flags = ["-shared", "-std=c++17", "-arch=sm_80", "-Xcompiler=-fPIC", "-o", str(library)]
    subprocess.run([compiler(), *flags, *(str(CSRC / f"{x}.cu") for x in SOURCES)], check=True)
    loaded = ctypes.CDLL(str(library))
    monkeypatch.setattr(loader, "_function", lambda op, device: getattr(loaded, f"lro_cuda_{op}"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    with pytest.raises(RuntimeError, match=r"a launch on cuda:0 failed with CUDA error \d+ "):
        loader.run("apply_scaled", torch.device("cuda", 0), loader.Apply(rows=1, cols=1))
