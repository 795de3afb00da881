"""The CPU half of csrc under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sanitized import ROOT, pass_under_sanitizers, runtimes


@pytest.mark.slow
def test_conformance_under_sanitizers(tmp_path: Path) -> None:
    """Tests of the native ops again, on a build that stops at the first bad read or shift."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    runtimes(compiler)
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path)]
    options = ["-DLOWRANK_OPTIM_CUDA=OFF", "-DLOWRANK_OPTIM_SANITIZE=address,undefined"]
    subprocess.run([*configure, *options, f"-DCMAKE_CXX_COMPILER={compiler}"], check=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "--parallel", "2"], check=True)
    tests = [
        "tests/ops/test_native.py",
        "tests/engine/test_dct_fused.py",
        "tests/ops/test_ops_bounds.py",
        "tests/ops/test_native_fuzz.py",
    ]
    env = {"LOWRANK_OPTIM_LIBRARY": str(tmp_path), "LOWRANK_OPTIM_FUZZ": "200"}
    pass_under_sanitizers(compiler, tests, env)
