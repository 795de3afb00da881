"""Is everything built: csrc with its CUDA half, and what serves the device."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings
from lowrank_optim.ops import dispatch

TITLE = "Build"
TAIL = 20
"""Lines of a build that are kept."""


def run(section: Section, settings: Settings) -> None:
    """Install again, then say which backends serve the device and why others do not."""
    done = subprocess.run(settings.build, cwd=ROOT, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip().splitlines()
    section.data["build"] = output[-TAIL:]
    if done.returncode:
        section.failed("The build failed.\n" + "\n".join(output[-TAIL:]))
    serving = subprocess.run(
        [sys.executable, "-m", "lowrank_optim.ops"], cwd=ROOT, capture_output=True, text=True
    )
    section.data["ops"] = serving.stdout.splitlines()
    if serving.returncode:
        section.failed("`python -m lowrank_optim.ops` failed.\n" + serving.stderr)
    kind = settings.device.type
    rows = [(name, *_words(name, kind)) for name in dispatch.BACKENDS]
    section.add(f"Backends on {kind}", ("backend", "serves", "why"), rows)
    if not any(dispatch.available(name, kind)[0] for name in ("triton", "native")):
        section.failed(f"Neither triton nor native serves {kind}: everything runs in plain torch.")


def _words(backend: str, kind: str) -> tuple[str, str]:
    ready, why = dispatch.available(backend, kind)
    return "yes" if ready else "no", why
