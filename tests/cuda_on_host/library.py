"""csrc/*.cu as a library for the CPU, built once for the same sources and flags."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
EXTRA = "LOWRANK_OPTIM_HOST_FLAGS"
"""Environment variable with more flags: a run of the tests under sanitizers."""


def compiler() -> str:
    """g++, or the tests are skipped."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("needs g++ to compile the CUDA sources for the CPU")
    return found


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return found.hexdigest()[:16]


def build(cache: Path, sources: Path = CSRC, flags: Sequence[str] = ("-O1",)) -> Path:
    """The library of the ``.cu`` files of a folder, from the cache where it is there.

    Args:
        cache: a folder that outlives the run.
        sources: csrc, or a copy with something broken on purpose.
        flags: optimisation, and what else.
    """
    flags = [*FLAGS, *WARNINGS, *flags, *os.environ.get(EXTRA, "").split()]
    command = [compiler(), *flags, "-I", str(HERE)]
    read = [*sources.glob("*.h"), *sources.glob("*.cuh"), *HERE.glob("*.h")]
    given = _digest(compiler(), *flags, *(path.read_bytes() for path in sorted(read)))
    units = [*sorted(sources.glob("*.cu")), HERE / "runtime.cpp"]
    objects = [cache / f"{x.stem}-{_digest(given, x.read_bytes())}.o" for x in units]
    library = cache / f"{_digest(*map(str, objects))}.so"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # of several processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        calls = [
            ([*command, "-x", "c++", "-c", str(unit)], made)
            for unit, made in zip(units, objects, strict=True)
        ]
        for step in (calls, [([*command, "-shared", *map(str, objects)], library)]):
            running = [
                (subprocess.Popen([*call, "-o", f"{made}.part"], stderr=subprocess.PIPE), made)
                for call, made in step
                if not made.is_file()
            ]
            for process, made in running:
                _, said = process.communicate()
                assert process.returncode == 0, said.decode()
                os.replace(f"{made}.part", made)
    return library
