"""The phases of matrices that lie on several ranks, once their bases are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.adapt import adapt
from lowrank_optim.engine.apply import Push, prepared, push
from lowrank_optim.engine.draws import rounds, weight_noise
from lowrank_optim.engine.matrix_step import (
    MatrixStep,
    begun,
    count_,
    inputs_of,
    mark,
    portions,
    turn_,
)
from lowrank_optim.engine.offload import Staging, load_of
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.sharded.local import stepped, summed_coords
from lowrank_optim.engine.sharded.means import add_up, coord_splits
from lowrank_optim.engine.sharded.work import Work, fetch
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Measured
from lowrank_optim.rules.base import Split, Sum, compute_dtype
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.parts import Part
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.projected_grad import ProjectedGrad


def step_chunks(chunks: Sequence[list[Work]], undo: Undo, staging: Staging) -> None:
    """The other phases; what a residual asks of all columns is asked once, for all matrices."""
    waiting = []

    def step(n: int) -> None:
        chunk, chosen = chunks[n], chunks[n][0].chosen
        if chosen.offload:  # what rests is here now
            there = replace(chosen, offload=False)
            for w in chunk:
                w.chosen = there
        steps = _adapt(chunk, undo)
        if any(s.measured is not None for s in steps):
            waiting.append((chunk, steps))  # all that it still needs stays on the device
        else:
            _finish(chunk, steps, undo)

    loads = [
        load_of([w.item for w in chunk], [w.state for w in chunk], chunk[0].chosen)
        for chunk in chunks
    ]
    staging.each(loads, step, undo)
    _sum_measured([pair for chunk, steps in waiting for pair in zip(chunk, steps, strict=True)])
    for chunk, steps in waiting:
        _finish(chunk, steps, undo)


def _adapt(chunk: list[Work], undo: Undo) -> list[MatrixStep]:
    """Coordinates and directions of alike matrices."""
    chosen, part, view = chunk[0].chosen, chunk[0].item.part, chunk[0].item.view
    assert part is not None and view is not None
    subspace = chunk[0].item.subspace
    assert subspace is not None
    fetch(chunk)
    found = [_coords(w) for w in chunk]
    if part.summed:
        parts = [own[name] for own in found for name in summed_coords(subspace, view)]
        collectives.sum_(parts, part.group)
    steps = []
    for w, coords in zip(chunk, found, strict=True):
        assert w.grad is not None and w.norm is not None
        steps.append(begun(w.twin, w.state, w.grad, coords, chosen))
        steps[-1].norm, steps[-1].whole, steps[-1].rms = w.norm, (view.m, view.n), w.rms
        w.grad = None
    turn_(steps, chosen)
    if on_accelerator(steps[0].norm):
        mark(steps)
    count_([w.state["step"] for w in chunk])
    splits = coord_splits(chunk[0].item)
    for asked in _adapt_padded(steps, part, chosen, undo, splits):
        add_up(asked, part.mesh)
    if part.summed:
        for s in steps:
            seen = inputs_of(s)
            s.measured = None if seen is None else chosen.residual.measure(seen)
    return steps


def _adapt_padded(
    steps: Sequence[MatrixStep],
    part: Part,
    chosen: Strategies,
    undo: Undo,
    splits: Mapping[str, Split],
) -> Iterator[list[Sum]]:
    """Directions; where moments end in a block that is not full, zeros fill up coordinates too.

    They change nothing of the block: its scale is a maximum, and zeros stay zeros. In means they
    would count, so that rules which take some see the columns alone.
    """
    shared = splits if part.summed else None
    if not part.padding or not chosen.rule.elementwise:
        yield from adapt(steps, chosen, undo, shared)
        return
    narrow = [s.coords for s in steps]
    for s in steps:  # of the side m, which every rank has, blocks are those of one process
        s.coords = {k: F.pad(x, (0, part.padding * (k in splits))) for k, x in s.coords.items()}
    yield from adapt(steps, chosen, undo, shared)
    for s, coords in zip(steps, narrow, strict=True):
        s.coords = coords
        s.directions = {
            name: (x[..., : coords[name].shape[-1]].contiguous(), correction)
            for name, (x, correction) in s.directions.items()
        }


def _coords(w: Work) -> dict[str, Tensor]:
    """Coordinates of the columns that are here, or what backward has left of their gradient."""
    assert w.grad is not None and w.twin.subspace is not None
    if not isinstance(w.grad, ProjectedGrad):
        return w.twin.subspace.coords(w.state, w.grad)
    return {k: x.clone() if w.chosen.maximize else x for k, x in w.grad.coords.items()}


def _sum_measured(pairs: Sequence[tuple[Work, MatrixStep]]) -> None:
    """Add up over the ranks what residuals found: one all-reduce for each group of ranks."""
    by_group: dict[int, list[tuple[Work, MatrixStep, Measured]]] = {}
    for w, s in pairs:
        assert w.item.part is not None and s.measured is not None
        by_group.setdefault(id(w.item.part.group), []).append((w, s, s.measured))
    for own in by_group.values():
        part = own[0][0].item.part
        assert part is not None
        sums = []
        for w, _, found in own:
            x = found.sums.double() if not found.norms else found.sums.double().square()
            assert w.item.view is not None and w.item.subspace is not None
            if found.coords and summed_coords(w.item.subspace, w.item.view):
                x[: found.coords] /= part.ranks  # every rank has all of them
            sums.append(x)
        collectives.sum_(sums, part.group)
        for (_, s, found), x in zip(own, sums, strict=True):
            x = x.sqrt() if found.norms else x
            s.measured = found._replace(sums=x.to(found.sums.dtype))


def _finish(chunk: Sequence[Work], steps: Sequence[MatrixStep], undo: Undo) -> None:
    """Phase four: W moves where it is, or by what comes back from the ranks with its columns."""
    part = chunk[0].item.part
    assert part is not None
    if part.grid is not None:  # zeros, which become the update of the columns
        for w, s in zip(chunk, steps, strict=True):
            assert part.stepped is not None
            # what is rounded once, where it is added to the weights, must not be rounded before
            weight, rounded = w.twin.param, rounds(w.twin, w.chosen)
            dtype = compute_dtype(weight.dtype) if rounded else weight.dtype
            s.item = stepped(w.item, weight.new_zeros(part.stepped.shape, dtype=dtype))
    ready: list[Push] = []
    first, stored = chunk[0], part.grid is None
    numbered = [(s.item, n) for n, s in enumerate(steps)]
    for alike in portions(numbered):
        at = [n for _, n in alike]
        noises = [
            weight_noise(chunk[n].twin, chunk[n].state, first.chosen)
            if stored
            else _exact(steps[n].item, chunk[n])
            for n in at
        ]
        own = [steps[n] for n in at]
        ready += prepared(own, first.chosen, first.lr, first.weight_decay, undo, noises)
    if part.summed:
        ready = _sum_across(part.group, steps, ready)
    told = undo if part.grid is None else Undo()  # of a buffer nothing has to be put back
    for alike in portions(numbered):
        at = [n for _, n in alike]
        push([steps[n] for n in at], [ready[n] for n in at], first.chosen, told)
    if part.grid is None:
        return
    updates = collectives.to_blocks([s.item.param for s in steps], part.grid, part.rank, part.group)
    for w, done, update in zip(chunk, ready, updates, strict=True):
        assert w.item.subspace is not None
        undo.loosen([w.state], [w.twin.param], [w.item.name])
        _add_block_(w, done.into.guarded_decay() if w.item.subspace.decays_weight else 1.0, update)
        undo.done(w.state)


def _exact(buffer: ParamPlan, w: Work) -> Noise | None:
    """Positions in a buffer of updates: it rounds nothing, and is filled as weights that do."""
    return Noise.over(0, buffer.param.shape) if rounds(w.twin, w.chosen) else None


def _sum_across(
    group: dist.ProcessGroup, steps: Sequence[MatrixStep], ready: Sequence[Push]
) -> list[Push]:
    """Let each push know what it needs of all columns: one all-reduce, if it needs any."""
    found = []
    for s, own in zip(steps, ready, strict=True):
        assert s.item.subspace is not None
        sums = s.item.subspace.across(own.into, s.state, own.update)
        found += [] if sums is None else [sums]
    collectives.sum_(found, group)
    if not found:
        return list(ready)
    return [
        own._replace(into=own.into._replace(across=sums))
        for own, sums in zip(ready, found, strict=True)
    ]


def _add_block_(w: Work, decay: float | Tensor, update: Tensor) -> None:
    """``W <- decay W + update`` of the block that is here."""
    view, weight = w.twin.view, w.twin.param
    assert view is not None
    block = view.of(weight)
    wider = torch.promote_types(block.dtype, torch.float32)
    noise = weight_noise(w.twin, w.state, w.chosen)
    noise = None if noise is None else view.noise(noise)
    ops.add_(block, update.to(wider), decay, 1.0, noise)
    if not shares_memory(block, weight):
        weight.copy_((block.mT if view.flip else block).reshape(view.shape))
