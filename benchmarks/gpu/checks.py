"""The tests that need an accelerator."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.common import ROOT
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings

TITLE = "Tests"


class Case(NamedTuple):
    """One test."""

    name: str
    outcome: str
    """passed, failed, error or skipped."""
    text: str
    """Why, if it did not pass."""


def run(section: Section, settings: Settings) -> None:
    """Run them; what fails is in the report whole, what is skipped with its reason."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *settings.tests, f"--junitxml={path}"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True
        )
        cases = read(path) if path.exists() else []
    judge(section, cases, done.returncode, done.stdout + done.stderr)


def read(path: Path) -> list[Case]:
    """The cases of a JUnit file."""
    found = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            child = case.find(kind)
            if child is not None:
                outcome = "failed" if kind == "failure" else kind
                text = "\n".join(filter(None, (child.get("message"), child.text)))
                break
        found.append(Case(f"{case.get('classname')}::{case.get('name')}", outcome, text))
    return found


def judge(section: Section, cases: list[Case], status: int, output: str) -> None:
    """Failures, skips and counts; that none was collected is a failure."""
    counts = {
        outcome: sum(c.outcome == outcome for c in cases)
        for outcome in ("passed", "failed", "error", "skipped")
    }
    section.data |= {"counts": counts, "status": status}
    section.add("Tests", tuple(counts), [tuple(map(str, counts.values()))])
    reasons: dict[str, int] = {}
    for case in cases:
        if case.outcome == "skipped":
            reason = case.text.splitlines()[0] if case.text else "no reason given"
            reasons[reason] = reasons.get(reason, 0) + 1
        elif case.outcome != "passed":
            section.failed(f"{case.name} {case.outcome}.\n{case.text}")
    section.notes += [f"{n} skipped: {reason}." for reason, n in sorted(reasons.items())]
    if not counts["passed"]:
        section.failed("No test passed.\n" + output[-3000:])
    elif status and section.ok:
        section.failed(f"pytest ended with status {status}.\n{output[-3000:]}")
