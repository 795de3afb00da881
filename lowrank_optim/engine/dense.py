"""One step of parameters without a subspace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.draws import rounds, weight_noises
from lowrank_optim.engine.matrix_step import count_
from lowrank_optim.engine.moments import read_slots, rows_of, slot_keys, write_slots_
from lowrank_optim.engine.plan import Strategies
from lowrank_optim.engine.reserve import ask
from lowrank_optim.engine.undo import SMALL
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.passing import of_direction, of_sum
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.rules.base import Asking, Rule, Split, Steps, compute_dtype, finished
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.target import Target, guarded


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
    """A step of dense parameters, asking for sums of what is on all ranks.

    Args:
        bucket: one; of small ones on an accelerator several of a shape.
        split: how it lies on the ranks (default: here is all of it).
        rms: root mean square of the whole, where its step size depends on it.
    """
    items, states, chosen, lr, weight_decay, undo = bucket
    item, state, rule = items[0], states[0], chosen.rule
    # how many steps it had taken before its moments began
    since = 0 if item.subspace is None else int(state["refresh_step"])
    factor = 1.0 if item.subspace is None else chosen.lr_scale
    params = [x.param for x in items]
    grads, param = [p.grad for p in params if p.grad is not None], item.param
    finite = _flags(grads)
    if not on_accelerator(param):
        if not bool(finite[0]):
            state["step"] += 1
            warn_skipped(item)
            return
        finite = []
    keys = [slot.name for slot in rule.slots(param.shape)]
    same = all(x.dtype == param.dtype for x in (*grads, *(state[k] for k in keys)))
    nearest = not chosen.store.rounds and not rounds(item, chosen)  # as torch rounds
    plain = same and nearest and factor == 1 and not finite
    plain = plain and type(rule).step_dense_ is not Rule.step_dense_
    if param.numel() > SMALL:
        _reserve(bucket, plain)
    undo.loosen(states, params, [x.name for x in items])
    if param.numel() <= SMALL and not on_accelerator(param):
        undo.keep_all(states, [*keys, *map(scale_key, keys)])
        undo.keep_weights(state, param)
    if plain and _by_torch(bucket, keys, since):
        return
    count_([own["step"] for own in states])
    rounding = weight_noises(items, states, chosen)
    times: list[Any] = [x["step"] for x in states]
    times = times if chosen.capturable else [float(t) - since for t in times]
    sizes = [rule.step_size(lr, t, p, rms) for t, p in zip(times, params, strict=True)]
    decays: list[float | Tensor] = [1 - size * weight_decay for size in sizes]
    if finite:
        owns = zip(params, grads, decays, finite, strict=True)
        intos = guarded([Target(p, g, None, 0.0, d, None, ok) for p, g, d, ok in owns])
        decays = [into.guarded_decay() for into in intos]
    if factor != 1:
        sizes = [size * factor for size in sizes]
    steps: Steps = torch.stack([*times]) if chosen.capturable else times
    wide = compute_dtype(param.dtype)
    for start, ps, gs, moments in _tiles(bucket, finite):
        given = [g if finite else g.to(wide) for g in gs]  # kernels read any format
        given = [*torch._foreach_neg(given)] if chosen.maximize else given
        directions, corrections = yield from rule.phases_(
            given, moments, steps, wide, finite=finite, split=split
        )
        pairs = zip(sizes, list[Any](corrections), strict=True)
        rates = [size * correction for size, correction in pairs]
        noises = [x.narrow(0, start) if x is not None and start else x for x in rounding]
        ops.add_all_(ps, directions, decays, rates, noises)
        del gs, given, moments, directions  # before those of the next tile are made


def _flags(grads: Sequence[Tensor]) -> list[Tensor]:
    """Whether each is finite, 0-d bools: of one, which may be large, a tile at a time."""
    if len(grads) == 1:
        (grad,) = grads
        norm = ops.matrix_norm(grad if grad.dim() > 1 else grad.reshape(1, -1))
        norms = [norm if norm.numel() == 1 else norm.sum()]
    else:
        norms = ops.matrix_norms([grad.reshape(1, -1) for grad in grads])
    # a norm is not negative: it is less than infinity, or not a number, or infinite
    return [*(torch.stack([x.reshape(()) for x in norms]) < math.inf).unbind(0)]


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
    if plain:  # torch's root and quotient
        sizes = [param.numel()] * (2 + (chosen.maximize and param.dtype == wide))
    else:
        rows = _rows_of_moments(bucket)
        shape = param.shape if rows is None else (rows, *param.shape[1:])
        sizes, writing = _of_moments(shape, param, chosen)
        size = param.numel()
        if chosen.rule.elementwise:
            size = min(size, _tile_rows(param) * (size // len(param)))
        sizes += [size] * (count := _made(bucket))
        sizes += [max(0, writing - size * count)]
    ask((*sizes, SCALARS), wide, param.device)


def _made(bucket: Bucket) -> int:
    """Tensors in the format of arithmetic of a tile that is stepped, beside its moments."""
    (item,), (state,), chosen, lr, *_ = bucket
    param, cast = item.param, int(item.param.dtype != compute_dtype(item.param.dtype))
    turned = param.grad is not None and not param.grad.is_contiguous()  # copied, by rows
    if not on_accelerator(param) or not chosen.rule.elementwise:
        # a direction and its multiple, the new weights, and casts
        return 3 + 2 * cast + int(not cast) * (chosen.maximize + turned)
    if rounds(item, chosen):
        moved = 3  # the multiple, the new weights and what they become in float32
    else:
        moved = of_sum(param, chosen.capturable or isinstance(lr, Tensor))
    slots, store = chosen.rule.slots(param.shape), chosen.store
    # in 8 bits is what is kept with scales and not copied to be read
    copied = [store.passing(slot, param.shape, param)[0] > 0 for slot in slots]
    kept = [scale_key(slot.name) in state for slot in slots]
    in_float = sum(copy or not coded for copy, coded in zip(copied, kept, strict=True))
    return 1 + chosen.maximize + max(turned + of_direction(param, in_float), moved)


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
    param, chosen = bucket.items[0].param, bucket.chosen
    if not (chosen.rule.elementwise and chosen.store.rounds and param.dim() > 1 and len(param)):
        return None
    rows = _tile_rows(param)
    return rows if rows < len(param) else None


Tile = tuple[int, Sequence[Tensor], Sequence[Tensor], Sequence[Sequence[Moment]]]
"""A first row; parameters, their gradients and their moments, or matching pieces of one's."""


def _tiles(bucket: Bucket, finite: Sequence[Tensor]) -> Iterator[Tile]:
    """What is stepped at once, so that temporaries stay small; its moments are then written back.

    Moments that a store copies to be read are read, and written, a tile at a time: no whole one is
    ever there in the format of arithmetic. Several parameters are small enough to be one.
    """
    items, states, chosen, *_ = bucket
    params = [item.param for item in items]
    grads = [p.grad for p in params if p.grad is not None]
    (param, *others), shape = params, params[0].shape
    rows = _rows_of_moments(bucket)
    if rows is not None:
        slots = slot_keys("", shape, chosen)
        for start in range(0, len(param), rows):
            span = slice(start, start + rows)
            p, g = param[span], grads[0][span]
            (held,) = read_slots(items, [rows_of(states[0], slots, span)], "", p.shape, chosen)
            yield start, [p], [g], [[x for _, _, x in held]]
            write_slots_(items, states, [held], chosen, finite, span)
            del held
        return
    held_all = read_slots(items, states, "", shape, chosen)
    moments = [[x for _, _, x in held] for held in held_all]
    if chosen.rule.elementwise and param.dim() and len(param) and not others:
        yield from _cut(_tile_rows(param), param, grads[0], moments[0])
    else:
        yield 0, params, grads, moments
    write_slots_(items, states, held_all, chosen, finite)


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
    for start, p, g, x in zip(first, *tiles, own, strict=bool(pieces)):
        yield start, [p], [g], [x]
