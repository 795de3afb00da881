"""Phase four of a step: what a subspace is told of a bucket, and the weights that it writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.matrix_step import MatrixStep, finite_of, inputs_of
from lowrank_optim.engine.plan import State, Strategies
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.numbers import is_number, number_of, same_number
from lowrank_optim.ops.stacked import cast_all, stacked
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term


class Push(NamedTuple):
    """What a subspace adds to the weights, and how."""

    into: Target
    update: dict[str, Tensor]
    term: Term | None


def prepared(
    work: Sequence[MatrixStep],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
    rounding: Sequence[Noise | None],
) -> list[Push]:
    """All that phase four needs to know of alike matrices, before it writes.

    Args:
        work: the matrices; their plans may stand for buffers that updates are to be made in.
        chosen: what their group chose.
        lr: of the group.
        weight_decay: likewise.
        undo: what to put back.
        rounding: seed and positions of the weights as they are stored; None rounds to nearest.
    """
    subspace, states = work[0].item.subspace, [w.state for w in work]
    assert subspace is not None
    undo.keep_all(states, chosen.residual.stepped)
    pushed = [*subspace.pushed(states[0])]
    if on_accelerator(work[0].item.param):  # as of moments, a copy is one more pass
        if pushed:
            items = [w.item for w in work]
            undo.loosen(states, [i.param for i in items], [i.name for i in items], pushed)
    else:
        for w in work:
            undo.keep_weights(w.state, w.item.param)
        undo.keep_all(states, pushed)
    terms = _terms(work, chosen)
    params = [_viewed(w) for w in work]
    sizes = [_step_size(w, param, chosen, lr) for w, param in zip(work, params, strict=True)]
    if weight_decay == 0 and is_number(sizes[0]):
        decays: list[float | Tensor] = [1.0] * len(work)
    else:
        decays = _each(sizes, lambda size: 1 - size * weight_decay)
    if chosen.lr_scale != 1:
        sizes = _each(sizes, lambda size: size * chosen.lr_scale)
    plain = all([isinstance(size, float) for size in sizes]) and all(map(_has_factor, work))
    # a direction that is beyond the format of the weights may be a step that is not
    dtype = work[0].item.param.dtype
    plain = plain and (ops.product_dtype(dtype) == dtype or any(term is not None for term in terms))
    updates = [{k: x for k, (x, _) in w.directions.items()} for w in work]
    rates = [1.0] * len(work)
    steps: Sequence[Tensor | None] = [None] * len(work)
    if plain:
        for n, (w, size) in enumerate(zip(work, sizes, strict=True)):
            (_, correction), *_ = w.directions.values()
            assert isinstance(size, float) and isinstance(correction, float)
            rates[n] = size * correction
    elif _takes_steps(work[0], sizes, terms, chosen, rounding[0]):
        rates, steps = _rates_and_steps(work, sizes)
    else:
        updates = _times(work, sizes)
        for n, (w, size, term) in enumerate(zip(work, sizes, terms, strict=True)):
            factor = size * w.directions["low"][1] if term is not None else size
            if term is not None and isinstance(factor, Tensor):
                terms[n] = term.times(factor)
    lows = [w.coords.get("low") for w in work]
    if chosen.maximize:
        # coordinates are those of -G, and so is all that is linear in them: turn both back
        for n, (own, term) in enumerate(zip(lows, terms, strict=True)):
            if own is not None and subspace.applies_grad(term):
                updates[n] = {k: -x for k, x in updates[n].items()}
                lows[n], rates[n] = -own, -rates[n]
    ready = []
    for n, w in enumerate(work):
        param, noise = params[n], rounding[n]
        if noise is not None:
            assert w.item.view is not None
            noise = w.item.view.noise(noise)
        # where nothing of it is applied the weights stand in: its coordinates alone may exist, or
        # it may be wider than the weights, as with error feedback
        grad = w.grad if subspace.applies_grad(terms[n]) else param
        into = Target(param, grad, lows[n], rates[n], decays[n], noise, w.finite, steps[n])
        ready.append(Push(into, updates[n], terms[n]))
    return ready


def _viewed(w: MatrixStep) -> Tensor:
    """Its weights in canonical orientation."""
    assert w.item.view is not None
    return w.item.view.of(w.item.param)


def _has_factor(w: MatrixStep) -> bool:
    """Whether its directions have one number in common, by which the subspace multiplies them.

    Of several on a host each is multiplied here, as ever: that rounds otherwise.
    """
    corrections = [correction for _, correction in w.directions.values()]
    if len(corrections) > 1 and not on_accelerator(w.item.param):
        return False
    return all([isinstance(x, float) and x == corrections[0] for x in corrections])


def _terms(work: Sequence[MatrixStep], chosen: Strategies) -> list[Term | None]:
    """What residuals add to the updates."""
    if chosen.residual.wants == "nothing":
        return [None] * len(work)
    found = [inputs_of(w) for w in work]
    seen = [own for own in found if own is not None]
    if not seen:
        return [None] * len(work)
    measured = [w.measured for w in work if w.measured is not None]
    return chosen.residual.after_all([w.state for w in work], seen, measured)


def _step_size(
    w: MatrixStep, param: Tensor, chosen: Strategies, lr: float | Tensor
) -> float | Tensor:
    """The learning rate of one matrix, whose weights are ``param``."""
    subspace = w.item.subspace
    assert subspace is not None
    step = w.state["step"] if chosen.capturable else float(w.state["step"])
    size = chosen.rule.step_size(lr, step, param, w.rms)
    if isinstance(size, Tensor) and size.numel() == 1 and not on_accelerator(param):
        size = float(size)
    last = w.state["refresh_step"]
    since = step - 1 - (last.clamp(min=0) if chosen.capturable else max(0, int(last)))
    factor = subspace.lr_factor(since)
    plain = not isinstance(factor, Tensor) and factor == 1
    return size if plain else size * factor  # never in place: it may be the group's tensor


def _each(
    sizes: Sequence[float | Tensor], call: Callable[[float | Tensor], float | Tensor]
) -> list[float | Tensor]:
    """``call`` of each; of a tensor that several have in common, once."""
    known: dict[int, float | Tensor] = {}
    for size in sizes:
        if id(size) not in known:
            known[id(size)] = call(size)
    return [known[id(size)] for size in sizes]


def _times(work: Sequence[MatrixStep], sizes: Sequence[float | Tensor]) -> list[dict[str, Tensor]]:
    """Directions, each times its correction and its step size."""
    updates: list[dict[str, Tensor]] = [{} for _ in work]
    for name in work[0].directions:
        xs, corrections = zip(*(w.directions[name] for w in work), strict=True)
        alike = len(work) > 1 and all(same_number(s, sizes[0]) for s in sizes)
        if alike and len({*corrections}) == 1:
            scaled = list((stacked(xs) * (corrections[0] * sizes[0])).unbind(0))
        elif alike and isinstance(corrections[0], Tensor):
            factors = (torch.stack(corrections) * sizes[0]).to(xs[0].dtype)
            scaled = list((stacked(xs) * factors.view(-1, *[1] * xs[0].dim())).unbind(0))
        else:
            scaled = [x * (c * s) for x, c, s in zip(xs, corrections, sizes, strict=True)]
        for own, x in zip(updates, scaled, strict=True):
            own[name] = x
    return updates


def _takes_steps(
    w: MatrixStep,
    sizes: Sequence[float | Tensor],
    terms: Sequence[Term | None],
    chosen: Strategies,
    rounding: Noise | None,
) -> bool:
    """Whether the subspace multiplies by step sizes that are on the device, as its kernels do.

    What is rounded stochastically has to be written in float32 for that (:func:`_push_wide_`).
    """
    subspace, param = w.item.subspace, w.item.param
    if subspace is None or not on_accelerator(param) or len(w.directions) > 1:
        return False
    if not (chosen.capturable or isinstance(sizes[0], Tensor)):
        return False
    if rounding is not None and not _goes_wide(subspace, param):
        return False
    return all(map(is_number, sizes)) and all(subspace.takes_step(param, x) for x in terms)


def _goes_wide(subspace: Subspace, param: Tensor) -> bool:
    """Whether weights that are rounded stochastically are written in float32 before."""
    whole = 0 < param.numel() <= ops.tile_elements(param)
    return subspace.takes_wide and on_accelerator(param) and whole


def _rates_and_steps(
    work: Sequence[MatrixStep], sizes: Sequence[float | Tensor]
) -> tuple[list[float], list[Tensor | None]]:
    """Step sizes times corrections: what of each is a number, and what is on the device."""
    corrections = [w.directions["low"][1] for w in work]
    first, size = corrections[0], sizes[0]
    if isinstance(first, Tensor) and all(own is size for own in sizes):
        return [1.0] * len(work), list((stacked(corrections) * size).unbind(0))  # type: ignore[arg-type]
    pairs = [*zip(sizes, corrections, strict=True)]
    rates = [number_of(own) * number_of(correction) for own, correction in pairs]
    held = [[x for x in pair if isinstance(x, Tensor)] for pair in pairs]
    steps = [own[0] * own[1] if len(own) > 1 else own[0] if own else None for own in held]
    return rates, steps


def push(work: Sequence[MatrixStep], ready: Sequence[Push], chosen: Strategies, undo: Undo) -> None:
    """Write the weights of alike matrices, and what follows them."""
    subspace = work[0].item.subspace
    assert subspace is not None
    intos = [own.into for own in ready]
    updates, terms = [own.update for own in ready], [own.term for own in ready]
    undo.loosen([w.state for w in work], [w.item.param for w in work], [w.item.name for w in work])
    written: list[MatrixStep] = []
    try:
        numbers = _pushed_(subspace, intos, [w.state for w in work], updates, terms)
        with closing(numbers):  # what a subspace keeps of those that are written it keeps first
            for n in numbers:
                w, param = work[n], intos[n].param
                view = w.item.view
                assert view is not None
                if not view.shares(w.item.param, param):
                    stored = param.mT if view.flip else param  # strides that allow no matrix view
                    w.item.param.copy_(stored.reshape(view.shape))
                written.append(w)
    finally:  # if another could not be written too
        if written and chosen.residual.wants != "nothing":
            states, grads = [w.state for w in written], [w.grad for w in written]
            if chosen.residual.wants == "memory":
                undo.passing(states)
            chosen.residual.keep_all_(states, grads, finite_of(written))
        for w in written:
            undo.done(w.state)


def _pushed_(
    subspace: Subspace,
    intos: Sequence[Target],
    states: Sequence[State],
    updates: Sequence[dict[str, Tensor]],
    terms: Sequence[Term | None],
) -> Generator[int]:
    """What subspaces write, each matrix by number when it has been written.

    On an accelerator weights that are rounded stochastically go as many at a time as a tile holds.
    """
    param = intos[0].param
    if intos[0].rounding is None or not _goes_wide(subspace, param):
        yield from subspace.push_all_(intos, states, updates, terms)
        return
    most = ops.tile_elements(param) // param.numel()
    for start in range(0, len(intos), most):
        at = slice(start, start + most)
        _push_wide_(subspace, intos[at], states[at], updates[at], terms[at])
        yield from range(start, min(start + most, len(intos)))


def _push_wide_(
    subspace: Subspace,
    intos: Sequence[Target],
    states: Sequence[State],
    updates: Sequence[dict[str, Tensor]],
    terms: Sequence[Term | None],
) -> None:
    """Weights in the format of arithmetic, written as any others, and rounded at once."""
    params = [into.param for into in intos]
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    wide = cast_all(params, dtype)
    grads = wide
    if intos[0].grad is not intos[0].param:
        grads = cast_all([into.grad for into in intos], dtype)
    each = zip(intos, wide, grads, strict=True)
    own = [into._replace(param=w, grad=g, rounding=None) for into, w, g in each]
    deque(subspace.push_all_(own, states, updates, terms), maxlen=0)
    ops.put_all_(params, wide, [into.rounding for into in intos if into.rounding is not None])
