"""Does the host ever wait for the device: every class, a step and a refresh, as torch sees it.

``torch.cuda.set_sync_debug_mode("error")`` raises where the host waits. What raises is run again
with ``"warn"``, which names every place and not the first alone.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import lowrank_optim
from benchmarks.gpu import variants
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings
from benchmarks.matrices import NEVER, linear_shapes, weights
from lowrank_optim import PROJECTORS, methods

TITLE = "No waiting"
PACKAGE = Path(lowrank_optim.__file__).parent
WAITS = "synchroniz"
"""Is in the message of torch, whether it is an error or a warning."""
NONE = "no wait"


@contextmanager
def watched(device: torch.device, mode: str) -> Iterator[None]:
    """Let torch say where the host waits for a GPU; on a CPU it never does."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def run(section: Section, settings: Settings) -> None:
    """A table of places. A step that waits is a failure; a refresh that waits is a row."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (name, {"projector": "block"} if name.startswith("Frugal") else {})
        for name in methods.__all__
    ]
    cases += [("GaLoreAdamW", {"projector": p}) for p in PROJECTORS]
    cases += [("FrugalAdamW", {"projector": p}) for p in PROJECTORS if p != "block"]
    rows = []
    for name, options in cases:
        label = " ".join([name, *options.values()])
        found = {}
        for what, gap in (("step", NEVER), ("refresh", 1)):
            try:
                found[what] = waits(name, options, gap, settings)
            except Exception as error:
                section.failed(f"{label}: a {what} raised {type(error).__name__}.", error)
                found[what] = ["it raised"]
        if found["step"] and found["step"] != ["it raised"]:
            section.failed(f"{label}: a step without a refresh waits at {found['step'][0]}.")
        section.data[label] = found
        rows.append((label, *("; ".join(found[k]) or NONE for k in ("step", "refresh"))))
    section.add("Where the host waits", ("", "a step", "a refresh"), rows)


def waits(name: str, options: dict[str, Any], gap: int, settings: Settings) -> list[str]:
    """Places of the package where the host waits in one step: none, or all that are known."""
    step = begun(name, options, gap, settings)
    try:
        with watched(settings.device, "error"):
            step()
    except RuntimeError as error:
        first = root(error)
        if WAITS not in str(first):
            raise
        places = [place(first.__traceback__)]
    else:
        return []
    step = begun(name, options, gap, settings)
    with warnings.catch_warnings(record=True) as seen, watched(settings.device, "warn"):
        warnings.simplefilter("always")
        step()
    places += [_short(w.filename, w.lineno) for w in seen if WAITS in str(w.message)]
    return list(dict.fromkeys(places))


def begun(name: str, options: dict[str, Any], gap: int, settings: Settings) -> Any:
    """The step of an optimizer that has taken two: bases are there, and kernels compiled."""
    hidden, mlp, *_ = settings.sizes[0].shape
    params = weights(linear_shapes(hidden, mlp)[3:5], settings.dtype, settings.device)
    params += weights([(hidden,)], settings.dtype, settings.device)
    rank: Any = settings.sizes[0].rank
    if options.get("projector") == "block":  # a share of the blocks, and not a rank
        rank = 0.5
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "rank": None}]
    optimizer = variants.ours(name, groups, rank, gap, **options)
    for _ in range(2):
        optimizer.step()
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    return optimizer.step


def root(error: BaseException) -> BaseException:
    """What was raised first: what a step does about an error may raise one of its own."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def place(trace: TracebackType | None) -> str:
    """The innermost line of the package."""
    frames = [f for f in traceback.extract_tb(trace) if f.filename.startswith(str(PACKAGE))]
    return _short(frames[-1].filename, frames[-1].lineno) if frames else "outside the package"


def _short(file: str, line: int | None) -> str:
    path = Path(file)
    inside = path.is_relative_to(PACKAGE)
    return f"{path.relative_to(PACKAGE.parent) if inside else path.name}:{line}"
