"""The CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_host.library import CSRC, EXTRA, broken, build, compiler
from tests.sanitized import pass_under_sanitizers, runtimes


@pytest.mark.slow
def test_kernels_under_sanitizers() -> None:
    """All tests here again: no read past a tensor, no index that overflows, no table that is gone.

    Fibers change by swapcontext, as on other processors than x86.
    """
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-DHOST_UCONTEXT"]
    tests = [f"tests/cuda_on_host/test_{name}.py" for name in ("kernels", "streams", "sizes")]
    pass_under_sanitizers(compiler(), tests, {EXTRA: " ".join(flags)})


def drive(cache: Path, sanitize: str, sources: Path = CSRC) -> tuple[int, str]:
    """Run every kernel of a folder in a program with a sanitizer."""
    if sanitize == "thread":
        call = [compiler(), "-print-file-name=libtsan.so"]
        found = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{compiler()} has no ThreadSanitizer")
    else:
        runtimes(compiler())
    program = build(cache, sources, ["-O1", "-g"], sanitize)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_no_two_threads_race(cache: Path) -> None:
    """In none of three orders of the threads."""
    assert drive(cache, "thread") == (0, "done\n")


MEMORY = "address,undefined"
BROKEN = [
    ("block.cu", "__syncthreads();", "", "thread", "data race"),
    ("block.cu", "__syncwarp();", "", "thread", "data race"),
    ("matrix.cu", "__syncthreads();", "", "thread", "data race"),
    ("update.cu", "= (int64_t)blockIdx.x * blockDim.x +", "=", "thread", "data race"),
    ("update.cu", "row = i / list.width[t]", "row = i / list.width[t] + 1", MEMORY, "heap-buffer"),
    ("matrix.cu", "sums[8][33]", "sums[8][31]", MEMORY, "out of bounds"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "sanitize", "says"), BROKEN)
def test_what_is_broken_is_found(
    file: str, old: str, new: str, sanitize: str, says: str, cache: Path, tmp_path: Path
) -> None:
    sources = broken(tmp_path, file, old, new)
    status, said = drive(cache, sanitize, sources)
    assert status != 0 and says in said and str(sources) in said, said[-3000:]
