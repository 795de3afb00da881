"""What an optimizer does to a model, in one line; and a warning where that is little."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.forms import kept_meta_state
from lowrank_optim.engine.sharded.local import meta_state
from lowrank_optim.groups import notices
from lowrank_optim.groups.linear_maps import EMBEDDING, HEAD, names_linear_map
from lowrank_optim.groups.names import bare
from lowrank_optim.groups.values import Group
from lowrank_optim.sharding.parts import local
from lowrank_optim.stores import scale_key

logger = logging.getLogger(__name__)

ENOUGH = 0.5
"""Share of the parameters in matrices that an optimizer should project, or say that it does not."""


class Rates(NamedTuple):
    """Learning rates of a group's projected parameters, as they are now."""

    lr: float
    """Of the group."""
    projected: float
    """Of the projected part: ``lr`` times ``scale``, and times ``proj_params_lr_scale``."""

    def __str__(self) -> str:
        """Both; of Adafactor's own step sizes, and of a tensor on a device, only steps know."""
        if math.isnan(self.lr):
            return "of each step's own"
        return f"{self.lr:g} ({self.projected:g} of the projected part)"


class Summary(NamedTuple):
    """What :meth:`lowrank_optim.LowRankOptimizer.summary` returns; its ``str`` is one line."""

    method: str
    """Name of the class."""
    tensors: int
    """Trainable parameters, as tensors."""
    projected_tensors: int
    """Those with a subspace."""
    parameters: int
    """Entries of all of them."""
    projected: int
    """Entries of those with a subspace."""
    matrices: int
    """Entries of those that could have one: not of vectors, embeddings and output heads."""
    dense: tuple[str, ...]
    """Names of matrices without a subspace, the largest first."""
    state_bytes: int
    """State of the optimizer once it has stepped, with what its matrices share; of this rank."""
    rates: tuple[Rates, ...]
    """Of each group with projected parameters, equal ones once."""
    widened: tuple[str, ...] = ()
    """Names of DTensors whose moments stay in float32 where ``"8bit"`` or ``"4bit"`` is asked for,
    as no rank would have their blocks whole."""

    def __str__(self) -> str:
        """One line."""
        share = self.projected / max(1, self.parameters)
        rates = ", ".join(map(str, self.rates))
        return (
            f"{self.method}: {self.projected_tensors} of {self.tensors} tensors projected, "
            f"{share:.1%} of {self.parameters:,} parameters; state {binary(self.state_bytes)}; "
            f"learning rate {rates or 'of dense parameters alone'}{self._told()}"
        )

    def _told(self) -> str:
        """Of moments in another format than one process has."""
        if not self.widened:
            return ""
        listed = ", ".join(self.widened[:3]) + ", ..." * (len(self.widened) > 3)
        return f"; moments of {len(self.widened)} in float32, as ranks share blocks: {listed}"

    def shortfall(self) -> str | None:
        """What to say where less than half of the matrices' parameters is projected."""
        if self.projected >= ENOUGH * self.matrices or not self.dense:
            return None
        listed = ", ".join(self.dense[:3])
        more = f" and {len(self.dense) - 3} more" if len(self.dense) > 3 else ""
        return (
            f"{self.method} projects {self.projected / self.matrices:.1%} of the parameters in "
            f"matrices; dense are {listed}{more}: widen target_modules of lowrank_groups(model), "
            "give these a rank, or take a rank below their dimensions"
        )


def binary(size: int) -> str:
    """Bytes as one reads them."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {unit}"
    return f"{size} B"


def summary_of(optimizer: PlannedOptimizer) -> Summary:
    """See :meth:`lowrank_optim.LowRankOptimizer.summary`."""
    found: list[tuple[Group, ParamPlan]] = [
        (group, item)
        for group in optimizer.param_groups
        for item in optimizer._items(group)
        if optimizer._trains(item.param)
    ]
    low = [item for _, item in found if _is_low(item)]
    matrices = [item for _, item in found if _is_low(item) or _could_be(item)]
    dense = sorted((x for x in matrices if not _is_low(x)), key=lambda x: -x.param.numel())
    groups = {id(group): group for group, item in found if _is_low(item)}.values()
    rates = dict.fromkeys(_rates(optimizer, group) for group in groups)
    with tracing.hosted():  # which blocks begin may be drawn, and a fake draw says nothing
        state_bytes = sum(x.nbytes for x in _state(optimizer, found))
    return Summary(
        method=type(optimizer).__name__,
        tensors=len(found),
        projected_tensors=len(low),
        parameters=_entries(item for _, item in found),
        projected=_entries(low),
        matrices=_entries(matrices),
        dense=tuple(f"{x.name} {tuple(x.param.shape)}" for x in dense),
        state_bytes=state_bytes,
        rates=tuple(rates),
        widened=tuple(
            item.name for group, item in found if _is_widened(item, optimizer._strategies(group))
        ),
    )


def introduce(optimizer: PlannedOptimizer) -> None:
    """Say before the first step what it will do, and warn where it projects little."""
    found = summary_of(optimizer)
    logger.info("%s", found)
    shortfall = found.shortfall()
    if shortfall is not None and any(g["rank"] is not None for g in optimizer.param_groups):
        warnings.warn(shortfall, stacklevel=notices.users_level())


def _is_widened(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether one process would keep moments as codes that are wider here."""
    part = item.part
    if part is None or not part.sharded or part.side != "entries":
        return False
    own = (kept_meta_state(x, chosen, True) for x in (item, replace(item, part=None)))
    here, alone = (sum(key.endswith(scale_key("")) for key in state) for state in own)
    return here < alone


def _is_low(item: ParamPlan) -> bool:
    """Whether it has a subspace, or is a factor of a module that has."""
    return item.subspace is not None or not item.alone


def _could_be(item: ParamPlan) -> bool:
    named, name = not item.name.startswith("parameter "), bare(item.name)
    table = EMBEDDING.search(name) or HEAD.search(name) or not names_linear_map(name)
    return item.param.dim() >= 2 and min(item.param.shape) > 1 and not (named and table)


def _entries(items: Iterator[ParamPlan] | list[ParamPlan]) -> int:
    return sum(item.param.numel() for item in items)


def _rates(optimizer: PlannedOptimizer, group: Group) -> Rates:
    lr = group["lr"]
    lr = float("nan") if lr is None or (isinstance(lr, Tensor) and not lr.is_cpu) else float(lr)
    return Rates(lr, lr * optimizer.projected_factor(group))


def _state(optimizer: PlannedOptimizer, found: list[tuple[Group, ParamPlan]]) -> Iterator[Tensor]:
    """What is there; of parameters that have no state yet, what will be."""
    for group, item in found:
        state = optimizer.state.get(item.param)
        if not state and (item.alone or item.subspace is not None):
            state = meta_state(item, optimizer._strategies(group))
        yield from map(local, (state or {}).values())
    yield from optimizer._shared.tensors()
