"""The CPU half of csrc under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_conformance_under_sanitizers(tmp_path: Path) -> None:
    """Tests of the native ops again, on a build that stops at the first bad read or shift."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizer runtimes")
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path)]
    options = ["-DLOWRANK_OPTIM_CUDA=OFF", "-DLOWRANK_OPTIM_SANITIZE=address,undefined"]
    subprocess.run([*configure, *options, f"-DCMAKE_CXX_COMPILER={compiler}"], check=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "--parallel", "2"], check=True)
    done = subprocess.run(
        # `-s`: a report goes to the real stderr. Python and torch do not free what they hold.
        [
            sys.executable,
            "-m",
            "pytest",
            "-s",
            "-p",
            "no:cacheprovider",
            "tests/ops/test_native.py",
            "tests/engine/test_dct_fused.py",
            "tests/ops/test_ops_bounds.py",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "LOWRANK_OPTIM_LIBRARY": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    tail = done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0, tail
    assert " passed" in done.stdout and "skipped" not in done.stdout, tail
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr, tail
