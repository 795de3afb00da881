"""Step and refresh times, side by side in one process: ours, torch's AdamW and other packages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.gpu import variants
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings, Size
from benchmarks.matrices import NEVER, gemm_floor, linear_shapes, weights
from benchmarks.timing import Work, device_clock, host_clock, interleaved, ratio
from lowrank_optim import PROJECTORS

TITLE = "Step and refresh times"
FUSED, FLOOR = "torch AdamW fused", "GEMM floor"
STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "GaLoreAdamW": ("GaLoreAdamW", NEVER, {}),
    "GaLoreAdamW8bit": ("GaLoreAdamW8bit", NEVER, {}),
    "GaLoreAdamW, moments on host": ("GaLoreAdamW", NEVER, {"state_device": "cpu"}),
    "GaLoreAdamW8bit, moments on host": ("GaLoreAdamW8bit", NEVER, {"state_device": "cpu"}),
    "FiraAdamW": ("FiraAdamW", NEVER, {}),
    "FrugalAdamW rsvd": ("FrugalAdamW", NEVER, {"projector": "rsvd"}),
    "FrugalAdamW columns": ("FrugalAdamW", NEVER, {"projector": "columns"}),
    "DCTAdamW gap 1": ("DCTAdamW", 1, {}),
    "SSTAdamW active": ("SSTAdamW", NEVER, {}),
    "SwitchLoRAAdamW": ("SwitchLoRAAdamW", NEVER, {}),
}
"""Ours: a class, its gap and its options."""
CAPTURED = (
    "GaLoreAdamW", "GaLoreAdamW8bit", "FiraAdamW", "FrugalAdamW columns", "DCTAdamW gap 1",
    "SSTAdamW active",
)  # fmt: skip
"""Those of them that are timed once more as a CUDA graph, which a host replays in one call."""
REFRESHES = ("svd", "rsvd", "random", "dct", "columns")
"""Projectors of GaLoreAdamW whose refresh is timed."""
EXACT = {"svd"}
"""Those that factorise whole matrices, as low-rank peers do."""
assert set(REFRESHES) <= set(PROJECTORS)


def run(section: Section, settings: Settings) -> None:
    """Two tables for each size."""
    makers, missing = variants.peers()
    section.notes += missing
    for label in () if settings.compiled else variants.COMPILED & makers.keys():
        del makers[label]
        section.notes.append(f"{label} is not timed: its first step compiles for a minute.")
    for size in settings.sizes:
        steps(section, settings, size, makers)
        refreshes(section, settings, size, makers if size.exact else {})
    if quick := [x.name for x in settings.sizes if not x.exact]:
        section.notes.append(
            f"Of {', '.join(quick)} no refresh that factorises whole matrices is timed: neither "
            "svd nor those of other packages. Steps of optimizers whose first one does that, "
            "SSTAdamW among them, begin with any basis."
        )


def steps(
    section: Section, settings: Settings, size: Size, makers: Mapping[str, variants.Make]
) -> None:
    """One step without a refresh, of some layers."""
    params = weights(linear_shapes(*size.shape[:2]) * size.layers, settings.dtype, settings.device)
    works: dict[str, Work] = {
        FLOOR: gemm_floor(params, size.rank),
        FUSED: torch.optim.AdamW(params, lr=variants.LR, fused=True).step,
        "torch AdamW foreach": torch.optim.AdamW(params, lr=variants.LR, foreach=True).step,
    }
    with nullcontext() if size.exact else any_basis():
        for label, (name, gap, options) in STEPS.items():
            make = partial(variants.ours, name, params, size.rank, gap, **options)
            tried(section, works, params, label, make)
        for label in CAPTURED if settings.device.type == "cuda" else ():
            name, gap, options = STEPS[label]
            make = partial(variants.ours, name, params, size.rank, gap, capturable=True, **options)
            tried(section, works, params, f"{label}, captured", partial(Captured, make))
        for label, other in makers.items():
            make = partial(other, params, size.rank, NEVER)
            tried(section, works, params, label, make, theirs=True)
    title = f"One step, {size.layers} layers of {size.name}, rank {size.rank}"
    measure(section, settings, title, works, FUSED, settings.rounds)


@contextmanager
def any_basis() -> Iterator[None]:
    """Let ``torch.linalg.svd`` give any orthonormal vectors: a later step takes as long with them.

    Those of a shape are drawn once, as matrices of a layer share their shapes.
    """

    @cache
    def orthonormal(n: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.linalg.qr(torch.randn(n, k, device=device, dtype=dtype)).Q

    def svd(x: Tensor, full_matrices: bool = True, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch, (m, n), k = x.shape[:-2], x.shape[-2:], min(x.shape[-2:])
        u, v = (
            orthonormal(own, own if full_matrices else k, x.device, x.dtype).expand(*batch, -1, -1)
            for own in (m, n)
        )
        return u.clone(), x.new_ones(*batch, k), v.mT.clone()

    honest, torch.linalg.svd = torch.linalg.svd, svd
    try:
        yield
    finally:
        torch.linalg.svd = honest


class Captured:
    """An optimizer whose step is a CUDA graph."""

    def __init__(self, make: Callable[[], Optimizer]) -> None:
        optimizer = make()
        for _ in range(2):  # finds bases, then compiles and loads what a step without one needs
            optimizer.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            optimizer.step()
        self.optimizer, self.state = optimizer, optimizer.state

    def step(self) -> None:
        """Replay it."""
        self.graph.replay()


def refreshes(
    section: Section, settings: Settings, size: Size, makers: Mapping[str, variants.Make]
) -> None:
    """A step that refreshes, of one matrix of each shape, beside one that does not."""
    shapes = list(dict.fromkeys(linear_shapes(*size.shape[:2])))
    params = weights(shapes, settings.dtype, settings.device)
    works: dict[str, Work] = {}
    plain = "no refresh"
    own = partial(variants.ours, "GaLoreAdamW", params, size.rank)
    tried(section, works, params, plain, partial(own, NEVER))
    for projector in (x for x in REFRESHES if size.exact or x not in EXACT):
        make = partial(own, 1, projector=projector)
        tried(section, works, params, f"GaLoreAdamW {projector}", make)
    for label, other in makers.items():
        if variants.is_low_rank(label):
            make = partial(other, params, size.rank, 1)
            tried(section, works, params, label, make, theirs=True)
    title = f"One step with a refresh, {len(shapes)} matrices of {size.name}, rank {size.rank}"
    if plain in works:
        measure(section, settings, title, works, plain, settings.refresh_rounds)


def tried(
    section: Section,
    works: dict[str, Work],
    params: Sequence[Tensor],
    label: str,
    make: Callable[[], Optimizer | Captured],
    *,
    theirs: bool = False,
) -> None:
    """Add the step of an optimizer after one step of it; one that raises is not timed.

    Of ours that is a failure, of a peer a sentence. galore-torch puts other tensors in the place
    of weights while it steps, and in 8 bits leaves a projected gradient behind: after each step of
    a peer all is as it was.
    """
    kept = [(p, p.data, p.grad) for p in params]

    def back() -> None:
        for param, data, grad in kept:
            param.grad = None  # of another shape, it would not go with the weights
            param.data, param.grad = data, grad

    try:
        step = make().step

        def restored() -> None:
            step()
            back()

        work: Work = restored if theirs else step
        work()
    except Exception as error:
        back()
        if theirs:
            first = (str(error).strip() or "no message").splitlines()[0]
            note = f"{label} raised {type(error).__name__} ({first}): not timed."
            section.notes += [note] if note not in section.notes else []
        else:
            section.failed(f"{label} raised {type(error).__name__}: not timed.", error)
        return
    works[label] = work


def measure(
    section: Section,
    settings: Settings,
    title: str,
    works: Mapping[str, Work],
    base: str,
    rounds: int,
) -> None:
    """Medians of what the device takes and of what the host takes, and ratios to ``base``."""
    device = settings.device
    took = interleaved(works, rounds, warmup=2, clock=device_clock(device))
    host = interleaved(works, rounds, warmup=0, clock=host_clock(device))
    rows: list[Sequence[str]] = []
    for name in works:
        figures = statistics.median(took[name]), ratio(took, name, base)
        least, most = min(took[name]), max(took[name])
        called = statistics.median(host[name])
        rows.append((name, *(f"{x:.2f}" for x in (*figures, least, most, called))))
    section.data[title] = {"ms": took, "host_ms": host}
    section.add(title, ("", "ms", f"over {base}", "least", "most", "host ms"), rows)
