"""One step of a parameter without a subspace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.draws import rounds, weight_noise
from lowrank_optim.engine.moments import read_slots, rows_of, slot_keys, write_slots_
from lowrank_optim.engine.plan import Strategies
from lowrank_optim.engine.reserve import ask
from lowrank_optim.engine.undo import SMALL
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.rules.base import Asking, Rule, Split, Steps, compute_dtype, finished
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.target import Target


class Dense:
    """The rule alone, on the whole tensor: parameters without a subspace, and active blocks."""

    def can_step(self, bucket: Bucket) -> bool:
        """One that is not projected."""
        subspace = bucket.items[0].subspace
        return subspace is None or isinstance(subspace, Block)

    def step_(self, bucket: Bucket) -> None:
        """Torch's own step where its arithmetic is the same, else in tiles."""
        finished(dense_phases(bucket))


def dense_phases(
    bucket: Bucket, split: Split | None = None, rms: Tensor | None = None
) -> Asking[None]:
    """A step of a dense parameter, asking for sums of what is on all ranks.

    Args:
        bucket: the parameter.
        split: how it lies on the ranks (default: here is all of it).
        rms: root mean square of the whole, where its step size depends on it.
    """
    (item,), (state,), chosen, lr, weight_decay, undo = bucket
    # how many steps it had taken before its moments began
    since = 0 if item.subspace is None else int(state["refresh_step"])
    finite: Sequence[Tensor] = ()
    factor = 1.0 if item.subspace is None else chosen.lr_scale
    param, grad, rule = item.param, item.param.grad, chosen.rule
    assert grad is not None
    norm = ops.matrix_norm(grad if grad.dim() > 1 else grad.reshape(1, -1))
    if on_accelerator(grad):
        finite = [norm.isfinite().all()]
    elif not norm.isfinite().all():
        state["step"] += 1
        warn_skipped(item)
        return
    keys = [slot.name for slot in rule.slots(param.shape)]
    same = all(x.dtype == param.dtype for x in (grad, *(state[k] for k in keys)))
    nearest = not chosen.store.rounds and not rounds(item, chosen)  # as torch rounds
    plain = same and nearest and factor == 1 and not finite
    plain = plain and type(rule).step_dense_ is not Rule.step_dense_
    if param.numel() > SMALL:
        _reserve(bucket, plain)
    undo.loosen([state], [param], [item.name])
    if item.param.numel() <= SMALL and not on_accelerator(param):
        undo.keep_all([state], [*keys, *map(scale_key, keys)])
        undo.keep_weights(state, param)
    if plain and _by_torch(bucket, keys, since):
        return
    state["step"] += 1
    rounding = weight_noise(item, state, chosen)
    step = state["step"] if chosen.capturable else float(state["step"]) - since
    steps: Steps = step.reshape(1) if isinstance(step, Tensor) else [step]
    size = rule.step_size(lr, step, param, rms)
    decay: float | Tensor = 1 - size * weight_decay
    if finite:
        decay = Target(param, grad, None, 0.0, decay, None, finite[0]).guarded_decay()
    size = size if factor == 1 else size * factor
    for start, p, g, own in _tiles(bucket, finite):
        g = g.to(compute_dtype(param.dtype))
        g = g.neg() if chosen.maximize else g
        (direction,), (correction,) = yield from rule.phases_(
            [g], [own], steps, finite=finite, split=split
        )
        noise = rounding.narrow(0, start) if rounding is not None and start else rounding
        # a rate that is a tensor would widen what has no dimension
        update = (direction * (size * correction)).to(direction.dtype)
        ops.add_(p, update, decay, -1.0, noise)
        del g, own, direction, update  # before those of the next tile are made


def _by_torch(bucket: Bucket, keys: Sequence[str], since: int) -> bool:
    """Torch's own step; False where it does not take such tensors, and nothing is changed."""
    (item,), (state,), chosen, lr, weight_decay, _ = bucket
    param, grad = item.param, item.param.grad
    assert grad is not None
    taken = state["step"] - since if since else state["step"]
    done = chosen.rule.step_dense_(
        param,
        grad,
        [state[k] for k in keys],
        taken,
        lr=lr,
        weight_decay=weight_decay,
        maximize=chosen.maximize,
    )
    if done:
        state["step"].copy_(taken + since)
    return done


def _reserve(bucket: Bucket, plain: bool) -> None:
    """Ask for the memory that the operations of a step will need, at once, and give it back.

    What is too large to be copied must not run out of memory once its moments are written.
    """
    (item,), _, chosen, *_ = bucket
    param, wide = item.param, compute_dtype(item.param.dtype)
    turned = chosen.maximize and param.dtype == wide
    if plain:  # torch's root and quotient
        sizes = [param.numel()] * (2 + turned)
    else:
        rows = _rows_of_moments(bucket)
        shape = param.shape if rows is None else (rows, *param.shape[1:])
        sizes, writing = _of_moments(shape, param, chosen)
        size = param.numel()
        if chosen.rule.elementwise:
            size = min(size, _tile_rows(param) * (size // len(param)))
        # a direction and its multiple, the new weights, and what is cast
        count = 3 + 2 * (param.dtype != wide) + turned
        sizes += [size] * count
        sizes += [max(0, writing - size * count)]
    ask((*sizes, SCALARS), wide, param.device)


SCALARS = 64
"""Norms, step sizes and flags, with which an allocator has a segment of small blocks."""


def _of_moments(shape: Sequence[int], param: Tensor, chosen: Strategies) -> tuple[list[int], int]:
    """Elements of the copies of moments that are stepped at once, and those that writing needs."""
    copies, writing = [], 0
    for slot in chosen.rule.slots(shape):
        copy, passing = chosen.store.passing(slot, shape, param)
        copies.append(copy)
        writing = max(writing, passing)
        if slot.averaged is not None or not (chosen.rule.elementwise or slot.fused):
            # a mean, what is made of it, and as it was; a vector has its squares in its place
            made = slot.averaged is not None or on_accelerator(param)
            copies.append(3 * made * math.prod(slot.shape(shape)))
    return copies, writing


def _tile_rows(param: Tensor) -> int:
    """Rows of the first dimension that are stepped at once, where each entry is stepped alone."""
    return max(1, ops.tile_elements(param) * len(param) // max(1, param.numel()))


def _rows_of_moments(bucket: Bucket) -> int | None:
    """Rows whose moments are read, and written, at once; None where all of them are."""
    (item,), _, chosen, *_ = bucket
    param = item.param
    if not (chosen.rule.elementwise and chosen.store.rounds and param.dim() > 1 and len(param)):
        return None
    rows = _tile_rows(param)
    return rows if rows < len(param) else None


Tile = tuple[int, Tensor, Tensor, Sequence[Moment]]
"""A first row; a parameter, its gradient and its moments, or matching pieces of them."""


def _tiles(bucket: Bucket, finite: Sequence[Tensor]) -> Iterator[Tile]:
    """What is stepped at once, so that temporaries stay small; its moments are then written back.

    Moments that a store copies to be read are read, and written, a tile at a time: no whole one is
    ever there in the format of arithmetic.
    """
    (item,), (state,), chosen, *_ = bucket
    param, grad = item.param, item.param.grad
    assert grad is not None
    rows = _rows_of_moments(bucket)
    if rows is not None:
        slots = slot_keys("", param.shape, chosen)
        for start in range(0, len(param), rows):
            span = slice(start, start + rows)
            p, g = param[span], grad[span]
            (held,) = read_slots([item], [rows_of(state, slots, span)], "", p.shape, chosen)
            yield start, p, g, [x for _, _, x in held]
            write_slots_([item], [state], [held], chosen, finite, span)
            del held
        return
    (held,) = read_slots([item], [state], "", param.shape, chosen)
    moments = [x for _, _, x in held]
    if chosen.rule.elementwise and param.dim() and len(param):
        yield from _cut(_tile_rows(param), param, grad, moments)
    else:
        yield 0, param, grad, moments
    write_slots_([item], [state], [held], chosen, finite)


def _cut(rows: int, param: Tensor, grad: Tensor, moments: Sequence[Moment]) -> Iterator[Tile]:
    """Matching pieces of at least ``rows`` rows and whole blocks.

    Moments in 8 bits are cut as they are: none of them exists in float32.
    """
    period = math.lcm(*(x.period for x in moments if isinstance(x, Quantized)))
    rows = -(-rows // period) * period
    pieces = [x.split(rows) if isinstance(x, Quantized) else torch.split(x, rows) for x in moments]
    own = zip(*pieces, strict=True) if pieces else itertools.repeat(())
    first = range(0, param.shape[0] or 1, rows or 1)
    tiles = torch.split(param, rows), torch.split(grad, rows)
    yield from zip(first, *tiles, own, strict=bool(pieces))
