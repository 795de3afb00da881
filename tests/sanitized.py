"""Tests in a process with the runtimes of AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def runtimes(compiler: str) -> list[str]:
    """The two libraries, or a skip."""
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in found):
        pytest.skip(f"{compiler} has no sanitizer runtimes")
    return found


def pass_under_sanitizers(compiler: str, tests: Sequence[str], env: Mapping[str, str]) -> None:
    """Assert that the tests pass, none skipped, and that neither sanitizer has anything to say.

    Args:
        compiler: the one that built what they load.
        tests: files.
        env: further variables, which say what that is.
    """
    done = subprocess.run(
        # `-s`: a report goes to the real stderr. Python and torch do not free what they hold.
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes(compiler)),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    tail = done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0, tail
    assert " passed" in done.stdout and "skipped" not in done.stdout, tail
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr, tail
