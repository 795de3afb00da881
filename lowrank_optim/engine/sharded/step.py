"""One step of all parameters that lie on several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.apply import Push, prepared, push
from lowrank_optim.engine.blocks import advance, catch_up
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.matrix_step import (
    MatrixStep,
    begun,
    inputs_of,
    mark,
    portions,
    turn_,
)
from lowrank_optim.engine.offload import Staging, load_of, on_device
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    refreshed_keys,
    rounds,
    weight_noise,
)
from lowrank_optim.engine.refresh import basis_due, refresh_
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.guard import Asked, agreed
from lowrank_optim.engine.sharded.local import here, stepped, summed_coords, weights_here
from lowrank_optim.engine.sharded.means import (
    add_up,
    coord_splits,
    dense_split,
    portions_of,
    step_dense,
    weight_rms,
    weight_squares,
)
from lowrank_optim.engine.sharded.refresh import refresh_together
from lowrank_optim.engine.step import adapt, chunk_size, step_buckets
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Measured
from lowrank_optim.rules.base import Split, Sum, compute_dtype
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.parts import Part
from lowrank_optim.subspaces.base import identity
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.matrix import shares_memory
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
        return id(self.chosen), *_layout(self.item, self.twin)


class ShardedStep:
    """Collects the parameters of all groups, and steps them with as few messages as there can be.

    The order of what ranks send each other depends on nothing that ranks do not share.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._work: list[Work] = []

    def add(
        self,
        items: Sequence[ParamPlan],
        states: Sequence[State],
        chosen: Strategies,
        lr: float | Tensor,
        weight_decay: float,
        undo: Undo,
        rest: Sequence[tuple[ParamPlan, State]] | None = None,
        begins: bool = True,
    ) -> None:
        """Parameters of a group, those without a gradient too; its blocks take turns.

        Args:
            items: the parameters.
            states: of each, what is here.
            chosen: what the group chose.
            lr: its learning rate.
            weight_decay: and its decay.
            undo: knows what to put back.
            rest: of blocks that step before or after others of their group, those others; None
                where all step now.
            begins: whether such blocks are the first of their group in this step.
        """
        twins = [here(item) for item in items]
        blocks = [
            (t, s) for t, s in zip(twins, states, strict=True) if isinstance(t.subspace, Block)
        ]
        if any(twin.param.grad is not None for twin, _ in blocks):
            others = [(weights_here(i), s) for i, s in rest or () if isinstance(i.subspace, Block)]
            every = [t for t, _ in (*blocks, *others)]
            by_param = {t.param: s for t, s in (*blocks, *others)}
            for state in by_param.values():
                undo.begin(state)
            if rest is None:
                advance(every, by_param, chosen)
            else:
                for n, (twin, _) in enumerate(blocks):
                    catch_up(twin, every, by_param, chosen, begins and n == 0)
        for item, twin, state in zip(items, twins, states, strict=True):
            self._work.append(Work(item, twin, state, chosen, lr, weight_decay))

    def run(self, undo: Undo) -> None:
        """Take the step."""
        known = agreed(
            [Asked(w.item, w.twin, weight_squares(w.item, w.twin, w.chosen)) for w in self._work]
        )
        usable: list[Work] = []
        skipped: list[Work] = []
        for w in self._work:
            found = known.get(id(w.item.param))
            if found is not None:
                w.norm, w.rms = found.norm, weight_rms(w.item, w.twin, found.weights)
                undo.begin(w.state)
                (usable if is_usable(w) else skipped).append(w)
        projected: list[Work] = []
        dense: list[tuple[ParamPlan, Bucket, Split, Tensor | None]] = []
        alone: list[Bucket] = []
        for w in usable:
            if w.item.subspace is None or isinstance(w.item.subspace, Block):
                bucket = Bucket([w.twin], [w.state], w.chosen, w.lr, w.weight_decay, undo)
                split = dense_split(w.item)
                if w.chosen.rule.elementwise or split is None:
                    alone.append(bucket)
                else:
                    dense.append((w.item, bucket, split, w.rms))
            else:
                projected.append(w)
        chunks = chunks_of(projected)
        refresh_works(chunks, skipped, undo)  # first: it may fail, and then no weight has moved
        for w in skipped:
            w.state["step"] += 1
            warn_skipped(w.item)
        for alike in _by_choice(alone):
            step_buckets(alike, self._staging)
        step_dense(dense, self._staging)
        _step_chunks(chunks, undo, self._staging)


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
            buckets.setdefault(_layout(item, item), []).append(item)
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


def _layout(item: ParamPlan, twin: ParamPlan) -> tuple[Any, ...]:
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


def refresh_works(chunks: Sequence[list[Work]], skipped: Sequence[Work], undo: Undo) -> None:
    """Phase one, for all matrices that are due.

    What is drawn, or found of W, is so where a gradient is not finite too; what looks at the
    gradient counts as postponed.
    """
    due = []
    for chunk in chunks:
        own = [w for w in chunk if basis_due(w.item, w.state, w.chosen) and not is_projected(w)]
        if own and _looks(own[0]):
            fetch(own)
        due += own
    for w in skipped:
        subspace, weight = w.item.subspace, w.twin.param
        if subspace is None or isinstance(subspace, Block):
            continue
        if w.norm is None or not basis_due(w.item, w.state, w.chosen):
            continue
        if not subspace.needs_grad:
            due.append(w)
            continue
        undo.keep(w.state, refreshed_keys(subspace, w.state, w.chosen))
        plan, step = stepped(w.item, weight), int(w.state["step"])
        refresh_(plan, w.state, weight, step, w.chosen, look=(w.norm, None))
    for w in due:
        subspace = w.item.subspace
        assert subspace is not None
        undo.keep(w.state, refreshed_keys(subspace, w.state, w.chosen))
    refresh_together([Due(w.item, w.twin, w.state, w.grad, w.chosen, w.norm) for w in due])


def is_projected(w: Work) -> bool:
    """Whether backward has taken coordinates, in a basis that was not due."""
    return isinstance(w.twin.param.grad, ProjectedGrad)


def _looks(w: Work) -> bool:
    """Whether a refresh looks at the columns that are here, or adds what it loses to them."""
    assert w.item.subspace is not None and w.item.part is not None
    if not w.item.subspace.needs_grad:
        return False
    return w.item.part.side != "whole" or bool(w.chosen.residual.lost)


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


def _by_choice(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Buckets of one group after the other."""
    found: dict[int, list[Bucket]] = {}
    for bucket in buckets:
        found.setdefault(id(bucket.chosen), []).append(bucket)
    return list(found.values())


def _step_chunks(chunks: Sequence[list[Work]], undo: Undo, staging: Staging) -> None:
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
    torch._foreach_add_([w.state["step"] for w in chunk], [torch.ones(())] * len(chunk))
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
        return w.twin.subspace.coords(w.state, w.grad, reduce=identity)
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
