"""What the table of ``lowrank-optim memory`` has: a row an optimizer, a column a way to train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_optim import methods
from lowrank_optim.engine.sharded.due import shares_seen
from lowrank_optim.memory import LAYOUTS, Estimate
from lowrank_optim.memory.autocast import check_autocast
from lowrank_optim.memory.checks import check_loss, class_of
from lowrank_optim.memory.estimating import device_of, estimated
from lowrank_optim.memory.losses import LOSSES
from lowrank_optim.memory.ranks import over_ranks, ranks_apart
from lowrank_optim.memory.training import Training
from lowrank_optim.memory.twins import maker, over_twins
from lowrank_optim.memory.world import check_world, pretended
from lowrank_optim.optimizer import LowRankOptimizer

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HOSTED = "moments on host"
WHOLE = ("AdamW 8-bit", "GaLore 4-bit")
"""Rows that are not for shards of several GPUs."""
QUARTER = 0.25
"""The rank where none is given: of the smaller side of each matrix."""


@dataclass(frozen=True)
class Column:
    """What happens to gradients inside backward, and how many micro-batches a step has."""

    in_backward: Literal["project", "step"] | None
    accumulation_steps: int
    count: str
    """``accumulation_steps`` in words."""
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def header(self) -> str:
        """Two lines, or three where the dtype of coordinates was asked for."""
        mode = self.in_backward or "all grads live"
        told = "" if self.coords_dtype == "auto" else f",\n{self.coords_dtype} coords"
        return f"{mode},\n{self.count}{told}"


LIVE = Column(None, 1, "1 micro-batch")
STEP = Column("step", 1, "1 micro-batch")
ACCUMULATED = Column("step", 2, "2 or more")
PROJECT = Column("project", 2, "any number")
USUAL = (LIVE, STEP, ACCUMULATED, PROJECT)
"""Columns where no option asks for others. More micro-batches than two need no more memory."""


def columns(
    modes: Sequence[str],
    accumulation_steps: int | None,
    coords_dtypes: Sequence[str],
    world_size: int | None = None,
) -> tuple[Column, ...]:
    """The columns that options ask for; empty and None are no choice.

    Of several GPUs it is the one without a mode, if none is asked for.
    """
    modes = modes or (("none", "step", "project") if world_size is None else ("none",))
    found: list[Column] = []
    for mode in ("none", "step", "project"):
        if mode not in modes:
            continue
        own = None if mode == "none" else mode
        usual = [c for c in USUAL if c.in_backward == own]
        if accumulation_steps is not None:
            n = accumulation_steps
            count = f"{n} micro-batch" + "es" * (n > 1)
            usual = [Column(usual[0].in_backward, n, count)]
        if mode == "project" and coords_dtypes:
            usual = [replace(c, coords_dtype=d) for c in usual for d in coords_dtypes]  # type: ignore[arg-type]
        found += usual
    return tuple(found)


@dataclass(frozen=True)
class Chosen:
    """An optimizer: a class or a layout, and its arguments."""

    name: str
    """Of the row."""
    optimizer: type[Optimizer] | str
    options: Mapping[str, Any]

    @property
    def called(self) -> str:
        """What ``--optimizer`` calls it."""
        return self.optimizer if isinstance(self.optimizer, str) else self.optimizer.__name__


@dataclass(frozen=True)
class Row:
    """One optimizer, and what it needs."""

    chosen: Chosen
    state: Estimate
    """With all gradients live, no activations and no steps: the state is that of every column."""
    peaks: Mapping[Column, Estimate | None]
    """None where the method needs whole gradients."""
    notes: tuple[str, ...] = ()
    """What the optimizer warns of, such as a rank that leaves nothing out."""

    @property
    def name(self) -> str:
        """Of the optimizer."""
        return self.chosen.name


CLASSES: dict[str, type[Optimizer] | str] = {
    **{name: getattr(methods, name) for name in methods.__all__},
    "AdamW": torch.optim.AdamW,
    **{name: name for name in LAYOUTS},
}
"""What ``--optimizer`` knows."""


def usual(rank: int | float, dtype: torch.dtype) -> list[Chosen]:
    """The rows where no ``--optimizer`` asks for others."""
    own = {"rank": rank}
    return [
        Chosen(f"AdamW {SHORT.get(dtype, dtype)}", torch.optim.AdamW, {}),
        Chosen("AdamW 8-bit", "adamw-8bit", {}),
        Chosen("GaLore fp32", methods.GaLoreAdamW, own),
        Chosen("GaLore bf16", methods.GaLoreAdamW, {**own, "state_dtype": "bfloat16"}),
        Chosen("GaLore 8-bit", methods.GaLoreAdamW8bit, own),
        Chosen(f"GaLore 8-bit ({HOSTED})", methods.GaLoreAdamW8bit, {**own, "state_device": "cpu"}),
        Chosen("GaLore 4-bit", methods.GaLoreAdamW, {**own, "state_dtype": "4bit"}),
        Chosen("FRUGAL 8-bit", methods.FrugalAdamW8bit, {**own, "projector": "columns"}),
        Chosen("DCT fp32", methods.DCTAdamW, own),
        Chosen("DCT 8-bit", methods.DCTAdamW8bit, own),
    ]


def low_rank(optimizer: type[Optimizer] | str) -> bool:
    """Whether a class takes a rank."""
    return getattr(methods, getattr(optimizer, "__name__", ""), None) is optimizer


def measure(
    module: nn.Module,
    chosen: Sequence[Chosen],
    asked: Sequence[Column],
    tokens: tuple[int, int] | None = None,
    checkpointing: bool = False,
    device: str | None = None,
    world_size: int | None = None,
    **forward: Any,
) -> list[Row]:
    """The rows of ``module``: every figure is one of :func:`lowrank_optim.memory.estimate`.

    What does not depend on the optimizer, or on the column, is found once.

    Args:
        module: the model.
        chosen: optimizers.
        asked: columns.
        tokens: of a micro-batch.
        checkpointing: whether layers are checkpointed.
        device: where training is to run.
        world_size: GPUs among which the model is sharded.
        **forward: ``loss``, ``loss_chunk`` and ``autocast``, as of
            :func:`lowrank_optim.memory.estimate`.
    """
    if tokens is not None:
        check_loss(forward.get("loss", LOSSES[0]), tokens, forward.get("loss_chunk"))
        dtypes = {p.dtype for p in module.parameters()}
        check_autocast(forward.get("autocast"), tokens, dtypes)
    for choice in chosen:
        check_world(module, class_of(choice.optimizer), world_size, None, None)
    own = Training(tokens=tokens, checkpointing=checkpointing, **forward)
    own = replace(own, device=device_of(module, device))
    if world_size is None:
        return _measured(module, chosen, asked, own, {})
    return _of_ranks(module, chosen, asked, own, world_size)


def _of_ranks(
    module: nn.Module,
    chosen: Sequence[Chosen],
    asked: Sequence[Column],
    common: Training,
    size: int,
) -> list[Row]:
    """Rows of the first rank, with the worst moments of any."""
    known: dict[Any, Any] = {}
    rows: list[Row] = []
    apart: list[dict[int, bool]] = []
    with pretended(size) as world:
        for choice in chosen:
            with shares_seen() as seen:
                rows += _measured(module, [choice], asked, common.on(world), known)
            params = list(known["sharded"].parameters())
            make = maker(known["sharded"], class_of(choice.optimizer), None, choice.options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are in the row
                _, optimizer = over_twins(params, make)
            apart.append(ranks_apart(size, params, optimizer, seen))
    found: list[dict[int, Row]] = [{0: row} for row in rows]
    for rank in sorted({rank for own in apart for rank in own}):
        alike = all(own.get(rank, True) for own in apart)
        again: dict[Any, Any] = {"flights": known["flights"]} if alike else {}
        with pretended(size, rank=rank) as world:
            for choice, own, its in zip(chosen, apart, found, strict=True):
                if rank in own:
                    its[rank] = _measured(module, [choice], asked, common.on(world), again)[0]
    return [_worst(own) for own in found]


def _worst(found: Mapping[int, Row]) -> Row:
    """Of one optimizer on several ranks."""
    peaks: dict[Column, Estimate | None] = {}
    for column in found[0].peaks:
        own = {rank: row.peaks[column] for rank, row in found.items()}
        known = {rank: e for rank, e in own.items() if e is not None}
        peaks[column] = over_ranks(known) if known else None
    return replace(found[0], peaks=peaks)


def _measured(
    module: nn.Module,
    chosen: Sequence[Chosen],
    asked: Sequence[Column],
    common: Training,
    known: dict[Any, Any],
) -> list[Row]:
    def one(choice: Chosen, training: Training) -> Estimate:
        cls = class_of(choice.optimizer)
        return estimated(module, cls, training, None, choice.options, known)

    rows = []
    for choice in chosen:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            state = one(choice, replace(common, tokens=None, transients=False))  # or says why not
        peaks: dict[Column, Estimate | None] = {}
        for column in asked:
            training = replace(
                common,
                in_backward=column.in_backward,
                accumulation_steps=column.accumulation_steps,
                coords_dtype=column.coords_dtype,
            )
            ours = issubclass(class_of(choice.optimizer), LowRankOptimizer)
            if training.world is not None and column.in_backward is not None and not ours:
                peaks[column] = None  # attach_in_backward is for classes of this package
                continue
            try:
                peaks[column] = one(choice, training)
            except ValueError as error:
                if column.in_backward != "project" or str(error).startswith("tokens"):
                    raise
                peaks[column] = None
        rows.append(Row(choice, state, peaks, tuple(str(w.message) for w in raised)))
    return rows
