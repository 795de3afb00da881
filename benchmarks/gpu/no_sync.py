"""Does the host ever wait for the device: every class, a step and a refresh, as torch sees it.

``torch.cuda.set_sync_debug_mode("error")`` raises where the host waits. What raises is run again
with ``"warn"``, which names every place and not the first alone. A refresh may wait where the table
of docs/performance.md says so (:mod:`benchmarks.gpu.waiting`), and a step nowhere.
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
from benchmarks.gpu.waiting import is_allowed, refresh_may_wait
from benchmarks.matrices import NEVER, linear_shapes, weights
from lowrank_optim import PROJECTORS, methods

TITLE = "No waiting"
PACKAGE = Path(lowrank_optim.__file__).parent
WAITS = "synchroniz"
"""Is in the message of torch, whether it is an error or a warning."""
NONE, RAISED = "no wait", ["it raised"]
WHERE = "which docs/performance.md, What a step on an accelerator waits for, does not list"


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
    """A table of places. Whatever waits where the documentation does not say so is a failure."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (name, {"projector": "block"} if name.startswith("Frugal") else {})
        for name in methods.__all__
    ]
    cases += [("GaLoreAdamW", {"projector": p}) for p in PROJECTORS]
    cases += [("FrugalAdamW", {"projector": p}) for p in PROJECTORS if p != "block"]
    if settings.device.type == "cuda":
        section.data["what waits"] = seen = told(settings.device)
        for what in (x for x, found in seen.items() if not found):
            section.failed(f"torch does not tell that the host waits for {what}.")
    rows = section.table("Where the host waits", ("", "a step", "a refresh"))
    for name, options in cases:
        label = " ".join([name, *options.values()])
        found = {}
        for what, gap in (("step", NEVER), ("refresh", 1)):
            try:
                found[what] = waits(name, options, gap, settings)
            except Exception as error:
                section.failed(f"{label}: a {what} raised {type(error).__name__}.", error)
                found[what] = RAISED
        if found["step"] and found["step"] != RAISED:
            section.failed(f"{label}: a step without a refresh waits at {found['step'][0]}.")
        own = refresh_may_wait(name, projector_of(name, options))
        if unknown := [x for x in found["refresh"] if [x] != RAISED and not is_allowed(x, own)]:
            section.failed(f"{label}: a refresh waits at {unknown[0]}, {WHERE}.")
        section.data[label] = found
        rows.append((label, *("; ".join(found[k]) or NONE for k in ("step", "refresh"))))


def told(device: torch.device) -> dict[str, bool]:
    """Whether torch says of what surely waits that it does: this section must not be blind."""
    x = torch.randn(64, 64, device=device)
    square = x @ x.mT
    known = {
        "a value": lambda: float(x[0, 0]),
        "a copy": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "eigh": lambda: torch.linalg.eigh(square),
        "svd": lambda: torch.linalg.svd(x),
    }
    found = {}
    for what, work in known.items():
        work()
        try:
            with watched(device, "error"):
                work()
        except RuntimeError as error:
            found[what] = WAITS in str(error)
        else:
            found[what] = False
    return found


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

    def said(message: Any, category: Any, file: str, line: int, *_: Any) -> None:
        """One wait, while what waits is on the stack."""
        if WAITS in str(message):
            inside = innermost(traceback.extract_stack())
            places.append(_short(file, line) if inside is None else inside)

    with warnings.catch_warnings(), watched(settings.device, "warn"):
        warnings.simplefilter("always")
        warnings.showwarning = said
        step()
    return list(dict.fromkeys(places))


def projector_of(name: str, options: dict[str, Any]) -> str:
    """The projector of a class, by itself or among its options."""
    group = {"params": [torch.zeros(4, 8, requires_grad=True)], **options}
    found: str = variants.ours(name, [group], 0.5, 1).param_groups[0]["projector"]
    return found


def begun(name: str, options: dict[str, Any], gap: int, settings: Settings) -> Any:
    """The step of an optimizer that has taken two: bases are there, and kernels compiled."""
    hidden, mlp, *_ = settings.sizes[0].shape
    params = weights(linear_shapes(hidden, mlp)[3:5], settings.dtype, settings.device)
    params += weights([(hidden,)], settings.dtype, settings.device)
    rank: Any = settings.sizes[0].rank
    if options.get("projector") == "block":  # a share of the blocks, and not a rank
        rank = 0.5
    # a group without a rank of its own is not projected, whatever the rank of the others
    groups: Any = [{"params": params[:2], "rank": rank}, {"params": params[2:], "rank": None}]
    optimizer = variants.ours(name, groups, rank, gap, **options)
    for _ in range(2):
        optimizer.step()
    seen = [int(own["refresh_step"]) for own in optimizer.state.values() if "refresh_step" in own]
    # layers that take turns as wholes have nothing to find
    if max(seen, default=-1) < (gap == 1) and not name.startswith(("Lisa", "BAdam")):
        raise AssertionError(f"{name}: no matrix was projected, or no basis found: {seen}")
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
    return innermost(traceback.extract_tb(trace)) or "outside the package"


def innermost(frames: traceback.StackSummary) -> str | None:
    """The last line of the package among these, with its function."""
    own = [f for f in frames if f.filename.startswith(str(PACKAGE))]
    return f"{_short(own[-1].filename, own[-1].lineno)} {own[-1].name}" if own else None


def _short(file: str, line: int | None) -> str:
    path = Path(file)
    inside = path.is_relative_to(PACKAGE)
    return f"{path.relative_to(PACKAGE.parent) if inside else path.name}:{line}"
