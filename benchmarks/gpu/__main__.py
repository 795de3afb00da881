"""``python -m benchmarks.gpu``: every section in a process of its own, then one report."""

from __future__ import annotations

import argparse
import importlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import ROOT
from benchmarks.gpu.report import (
    CutOff,
    Section,
    cut_off,
    dump,
    load,
    machine,
    run_section,
    write,
)
from benchmarks.gpu.settings import Settings, full, quick, tiny

SECTIONS = (
    "build", "checks", "no_sync", "kernels", "times", "whole", "memory", "train7b",
    "train7b_step",
)  # fmt: skip
NO_GPU = (
    "There is no GPU here that torch can use (torch.cuda.is_available() is False), and all that "
    "this command shows needs one: nothing was run."
)
GRACE = 15
"""Seconds that a section has to write what it has found, once it is told to end."""
TAIL = 4000
"""Characters of what a section printed that the report keeps where the section ended in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a section failed, or if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="fewer layers: minutes of a card")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that the code runs")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="(default: runs/gpu)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--hours", type=float, default=1.0, help="a section may take")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    settings = (tiny if args.tiny else quick if args.quick else full)(device)
    if args.section:
        dump(one(args.section, settings), args.out)
        return 0
    sections = []
    for name in args.only:
        print(f"{name} ...", flush=True)
        section, in_time = apart(name, args)
        sections.append(section)
        print(f"{name}: {'passed' if section.ok else 'FAILED'}", flush=True)
        if not in_time:
            break
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])])
    page = write(args.out, machine(device), sections, command)
    print(f"written: {page} and {page.with_suffix('.json')}")
    return 0 if all(s.ok for s in sections) else 1


def one(name: str, settings: Settings) -> Section:
    """A section in this process."""
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    return run_section(name, module.TITLE, module.run, settings)


def apart(name: str, args: argparse.Namespace) -> tuple[Section, bool]:
    """A section in a process of its own: if that dies, its last words are the failure.

    And whether there is time for more: not where somebody ends this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--out", str(path)]
        command += ["--device", args.device]
        command += [f"--{x}" for x in ("tiny", "quick") if getattr(args, x)]
        return ended(name, command, path, args.hours * 3600)


def ended(name: str, command: Sequence[str], path: Path, seconds: float) -> tuple[Section, bool]:
    """What a process wrote to ``path``, or how it ended without; whether nobody cut it off."""
    in_time = True
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            status = f"no status: it took longer than {seconds:.0f} s"
            stop(process)
        except CutOff:
            status, in_time = "no status: it was cut off", False
            stop(process)
        if path.exists():
            return load(path), in_time
        output.seek(0)
        words = output.read().decode(errors="replace")[-TAIL:]
    section = Section(name, name)
    section.failed(f"The process of this section ended with {status} and wrote nothing.\n{words}")
    return section, in_time


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let a section write what it has found."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, cut_off)
    sys.exit(main())
