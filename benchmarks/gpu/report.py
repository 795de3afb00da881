"""The report: what each section found, in Markdown and in JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import environment, markdown_table
from lowrank_optim.memory import GIB

PACKAGES = (
    "lowrank-optim", "torch", "triton", "transformers", "bitsandbytes", "galore-torch", "fira",
    "pytorch_optimizer", "torchao", "apollo-torch",
)  # fmt: skip


class Table(NamedTuple):
    """Figures under a title."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Section:
    """What one section found, up to where it failed if it did."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    """Sentences: what was left out, and why."""
    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """The figures unrounded."""
    failures: list[str] = field(default_factory=list)
    """Sentences, and tracebacks: what makes the exit status 1."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def failed(self, what: str, error: BaseException | None = None) -> None:
        """Record a failure, with the traceback of the error if there is one."""
        text = "" if error is None else "".join(traceback.format_exception(error))
        self.failures.append(f"{what}\n{text}" if text else what)

    def add(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.table(title, header).extend(tuple(row) for row in rows)

    def table(self, title: str, header: Sequence[str]) -> list[tuple[str, ...]]:
        """Add an empty one, and give its rows: those that come in time are in the report."""
        rows: list[tuple[str, ...]] = []
        self.tables.append(Table(title, tuple(header), rows))
        return rows


class CutOff(BaseException):
    """Somebody ends the process. No error of what is measured, which a section goes on after."""


def cut_off(*_: Any) -> None:
    """Handler of SIGTERM, of the first: what has been found is written after it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise CutOff


def run_section(
    name: str, title: str, work: Callable[[Section, Any], None], settings: Any
) -> Section:
    """What ``work`` finds; an error that it raises is recorded beside what it found before.

    So is that it was cut off.
    """
    section, start = Section(name, title), time.perf_counter()
    try:
        work(section, settings)
    except CutOff:
        section.failed("The section was cut off: what is missing was not reached.")
    except Exception as error:
        section.failed(f"The section stopped with {type(error).__name__}.", error)
    section.seconds = time.perf_counter() - start
    return section


def dump(section: Section, path: Path) -> None:
    """Write a section as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(section), indent=1) + "\n")


def load(path: Path) -> Section:
    """Read what :func:`dump` wrote."""
    found = json.loads(path.read_text())
    tables = [Table(t, tuple(h), [tuple(r) for r in rows]) for t, h, rows in found.pop("tables")]
    return Section(tables=tables, **found)


# ---------------------------------------------------------------- the machine


def machine(device: torch.device) -> dict[str, Any]:
    """The environment of every benchmark, and what is known of the device."""
    found: dict[str, Any] = {**environment(), "device": str(device), "versions": versions()}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 2),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "toolkit": torch.version.cuda or torch.version.hip,
    }


def versions() -> dict[str, str]:
    """Of what is compared; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """As the vendor's tool says it."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            continue
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
    return "unknown"


# ---------------------------------------------------------------- the report


def markdown(about: dict[str, Any], sections: Sequence[Section], command: str) -> str:
    """The report as a page: the verdict first, then the machine, then the sections."""
    bad = [s.title for s in sections if not s.ok]
    verdict = f"{len(bad)} of {len(sections)} sections failed: {', '.join(bad)}." if bad else (
        f"All {len(sections)} sections passed."
    )  # fmt: skip
    lines = ["# lowrank_optim on a GPU", "", verdict, "", f"Command: `{command}`", ""]
    flat = {k: v for k, v in about.items() if not isinstance(v, dict)}
    rows = [(key.replace("_", " "), str(value)) for key, value in flat.items()]
    rows += [(f"{name} (version)", v) for name, v in about["versions"].items()]
    lines += [markdown_table(("machine", ""), rows), ""]
    for section in sections:
        lines += _section(section)
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    state = "passed" if section.ok else "FAILED"
    lines = [f"## {section.title}: {state}", "", f"Took {section.seconds:.0f} s.", ""]
    for note in section.notes:
        lines.append(f"- {note}")
    if section.notes:
        lines.append("")
    for table in section.tables:
        lines += [f"{table.title}:", "", markdown_table(table.header, table.rows), ""]
    for failure in section.failures:
        first, _, rest = failure.partition("\n")
        lines += [f"**{first}**", ""]
        if rest.strip():
            lines += ["```text", rest.rstrip(), "```", ""]
    return lines


def write(out: Path, about: dict[str, Any], sections: Sequence[Section], command: str) -> Path:
    """``report.md`` and ``report.json`` in ``out``; the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.md"
    page.write_text(markdown(about, sections, command))
    whole = {"machine": about, "command": command, "sections": [asdict(s) for s in sections]}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    return page
