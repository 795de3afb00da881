"""The same with ``mode="step"`` of ``attach_in_backward``."""

from __future__ import annotations

from benchmarks.gpu import train7b
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings

TITLE = f"{train7b.TITLE}, stepped in backward"


def run(section: Section, settings: Settings) -> None:
    """Every weight is stepped as soon as its gradient is complete."""
    train7b.run_mode(section, settings, "step")
