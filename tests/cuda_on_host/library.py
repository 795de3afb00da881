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


def build(
    cache: Path, sources: Path = CSRC, flags: Sequence[str] = ("-O1",), sanitize: str = ""
) -> Path:
    """The library of the ``.cu`` files of a folder, from the cache where it is there.

    Args:
        cache: a folder that outlives the run.
        sources: csrc, or a copy with something broken on purpose.
        flags: optimisation, and what else.
        sanitize: a value of ``-fsanitize=`` for a program that runs each kernel, and not a library.
    """
    flags = [*FLAGS, *WARNINGS, *flags, *os.environ.get(EXTRA, "").split()]
    watched = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    if sanitize == "thread":
        flags.append("-DHOST_RACES")
    command = [compiler(), *flags, "-I", str(HERE), "-I", str(sources)]
    read = [*sources.glob("*.h"), *sources.glob("*.cuh"), *HERE.glob("*.h")]
    given = _digest(compiler(), *flags, *watched, *(path.read_bytes() for path in sorted(read)))
    kernels, own = sorted(sources.glob("*.cu")), [HERE / "threads.cpp", HERE / "devices.cpp"]
    if sanitize:
        own.append(HERE / "drive.cpp")
    objects = [cache / f"{x.stem}-{_digest(given, x.read_bytes())}.o" for x in [*kernels, *own]]
    linked = cache / f"{_digest(*map(str, objects))}{'' if sanitize else '.so'}"
    compiling = []
    for unit, made in zip([*kernels, *own], objects, strict=True):
        # races are those of kernels: what changes fibers has no part in them
        watch = watched if unit in kernels or sanitize != "thread" else []
        compiling.append(([*command, *watch, "-x", "c++", "-c", str(unit)], made))
    linking = [*command, *(watched or ["-shared"]), *map(str, objects)]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # of several processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(compiling)
        _make([(linking, linked)])
    return linked


def _make(calls: Sequence[tuple[list[str], Path]]) -> None:
    """Run at once the calls whose file is not there; it is there when it is whole."""
    running = [
        (subprocess.Popen([*call, "-o", f"{made}.part"], stderr=subprocess.PIPE, text=True), made)
        for call, made in calls
        if not made.is_file()
    ]
    said = [process.communicate()[1] for process, _ in running]
    for (process, made), text in zip(running, said, strict=True):
        assert process.returncode == 0, text
        os.replace(f"{made}.part", made)


def broken(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in which ``new`` stands for ``old``, at the first place in ``file``."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    text = (sources / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (sources / file).write_text(text.replace(old, new, 1))
    return sources
