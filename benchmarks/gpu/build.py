"""Is everything built: csrc with its CUDA half, and what serves the device."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.common import ROOT
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings

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
    found = backends(kind)
    rows = [(name, "yes" if ready else "no", why) for name, (ready, why) in found.items()]
    section.add(f"Backends on {kind}", ("backend", "serves", "why"), rows)
    if not any(found[name][0] for name in ("triton", "native")):
        section.failed(f"Neither triton nor native serves {kind}: everything runs in plain torch.")


ASK = """
import json, sys
from lowrank_optim.ops import dispatch
print(json.dumps({name: dispatch.available(name, sys.argv[1]) for name in dispatch.BACKENDS}))
"""


def backends(kind: str) -> dict[str, tuple[bool, str]]:
    """Which backends serve a type of device, and why or why not, as a new process finds them.

    This one was started before what it has just built.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASK, kind], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name: tuple(x) for name, x in json.loads(done.stdout.splitlines()[-1]).items()}
