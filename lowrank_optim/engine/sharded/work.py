"""Parameters of several ranks on their way through a step, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_optim.engine.bucket import chunk_size
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.means import dense_split, portions_of
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import ProjectedGrad


@dataclass(eq=False, slots=True)
class Work:
    """One parameter on its way through a step."""

    item: ParamPlan
    twin: ParamPlan
    """What stands for the part that is here."""
    state: State
    chosen: Strategies
    lr: float | Tensor
    weight_decay: float
    norm: Tensor | None = None
    """Of its whole gradient."""
    rms: Tensor | None = None
    """Root mean square of its whole weights, where its step size depends on it."""
    grad: Tensor | None = None
    """The columns to be projected, once they are here."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Alike matrices can be stepped together."""
        return id(self.chosen), *layout_of(self.item, self.twin)


def chunks_of(works: Sequence[Work]) -> list[list[Work]]:
    """Alike matrices, as many together as one message takes."""
    buckets: dict[Any, list[Work]] = {}
    for w in works:
        buckets.setdefault(w.key, []).append(w)
    chunks = []
    for alike in buckets.values():
        size = _together(alike[0].item, alike[0].chosen)
        chunks += [alike[i : i + size] for i in range(0, len(alike), size)]
    return chunks


def bucketed_shards(items: Sequence[ParamPlan], chosen: Strategies) -> list[list[ParamPlan]]:
    """Which parameters of a group are stepped together, where all of them have a gradient."""
    buckets: dict[Any, list[ParamPlan]] = {}
    found, summed = list[list[ParamPlan]](), dict[Any, list[ParamPlan]]()
    for item in items:
        assert item.part is not None
        if item.subspace is not None and not isinstance(item.subspace, Block):
            buckets.setdefault(layout_of(item, item), []).append(item)
        elif chosen.rule.elementwise or dense_split(item) is None:
            found.append([item])
        else:
            summed.setdefault((item.part.mesh, item.part.dims), []).append(item)
    for alike in summed.values():
        assert alike[0].part is not None
        found += [[alike[n] for n in own] for own in portions_of(alike, alike[0].part.ranks)]
    for alike in buckets.values():
        size = _together(alike[0], chosen)
        found += [alike[i : i + size] for i in range(0, len(alike), size)]
    return found


def layout_of(item: ParamPlan, twin: ParamPlan) -> tuple[Any, ...]:
    """Equal of matrices that can be stepped together."""
    assert item.part is not None
    return *twin.key, *item.part.layout


def _together(item: ParamPlan, chosen: Strategies) -> int:
    """How many alike matrices to step at once: as many on ranks that have less of each."""
    assert item.part is not None
    whole = chunk_size(item, chosen)
    return whole if item.part.side == "whole" else whole * item.part.ranks


def is_usable(w: Work) -> bool:
    """Whether a gradient is finite; if not, all ranks skip it. A device masks it instead."""
    assert w.norm is not None
    return on_accelerator(w.norm) or math.isfinite(w.norm)


def is_projected(w: Work) -> bool:
    """Whether backward has taken coordinates, in a basis that was not due."""
    return isinstance(w.twin.param.grad, ProjectedGrad)


def fetch(works: Sequence[Work]) -> None:
    """The columns of alike matrices, with what error feedback adds to them."""
    for w in works:
        if is_projected(w):
            w.grad = w.twin.param.grad  # of columns that are stepped where they are stored
    missing = [w for w in works if w.grad is None]
    if not missing:
        return
    part = missing[0].item.part
    assert part is not None
    grads = []
    for w in missing:
        assert w.twin.param.grad is not None and w.twin.view is not None
        grads.append(w.twin.view.of(w.twin.param.grad))
    if part.grid is not None:
        grads = collectives.to_columns(grads, part.grid, part.rank, part.group)
    for w, grad in zip(missing, grads, strict=True):
        residual = w.chosen.residual
        with on_device(w.item, w.state, w.chosen, residual.memory):
            w.grad = residual.before(w.state, grad)
