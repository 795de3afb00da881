"""What the owner of matrices does with them once they are whole: as one process would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.plan import State
from lowrank_optim.engine.refresh import finding, postpone_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.engine.sharded.inputs import Input, factors_weight, gathers
from lowrank_optim.engine.state import on_host
from lowrank_optim.sharding.collectives import Form
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.subspaces.searches import Searching, together
from lowrank_optim.tensors.alive import of_shape


class Found(NamedTuple):
    """What the owner found."""

    end: int
    """One of :mod:`lowrank_optim.engine.sharded.failures`."""
    entries: State
    """The new basis, whole."""
    moved: dict[str, BasisChange]
    ok: Tensor | None = None
    """Of what was found on an accelerator whether it was, 0-d bool."""
    failure: Failure | None = None
    """Why nothing was."""

    def flag(self, device: torch.device) -> Tensor:
        """How it ended, where it is sent from."""
        return failures.flag(self.end, self.ok, device)

    def turn(self, coord: str, side: int, f: Form, device: torch.device) -> Tensor:
        """How rows (0) or columns (1) of a coordinate turn; zeros where nothing was found."""
        if self.end != failures.FOUND:
            return torch.zeros(f.shape, dtype=f.dtype, device=device)
        turn = self.moved[coord].right if side else self.moved[coord].rotation
        assert turn is not None
        return turn()


def find_all(
    mine: Sequence[Due], inputs: Sequence[Sequence[Input]], arrived: Sequence[Sequence[Tensor]]
) -> list[Found]:
    """Put matrices together, and find what each needs: equal ones share their factorisations.

    What is raised, from lack of memory say, is in what was found: others wait for it.

    Args:
        mine: what this rank owns.
        inputs: of each.
        arrived: from each rank its pieces, of all matrices one after the other.
    """
    pieces = iter(zip(*arrived, strict=True))
    parts = [[next(pieces) for _ in own] for own in inputs]
    work = zip(mine, inputs, parts, strict=True)
    try:
        return together([_caught(d, own, part) for d, own, part in work])
    except Exception as error:  # of a call that they share
        failure = Failure(f"{mine[0].item.name} or one like it", error)
        return [Found(failures.RAISED, d.state, {}, failure=failure) for d in mine]


def _caught(
    d: Due, inputs: Sequence[Input], pieces: Sequence[Sequence[Tensor]]
) -> Searching[Found]:
    try:
        whole = [x.together(own) for x, own in zip(inputs, pieces, strict=True)]
        return (yield from _finding(d, whole))
    except Exception as error:
        failure = Failure(d.item.name, error)
        return Found(failures.RAISED, d.state, {}, failure=failure)


def _finding(d: Due, whole: list[Tensor]) -> Searching[Found]:
    view = d.item.view
    assert view is not None
    if factors_weight(d):
        return (yield from _factoring(d, whole[0]))
    split = split_dims(d.item, d.chosen)
    state: State = {k: d.state[k].clone() for k in d.entries if k not in split}
    if d.balanced:
        state.update(zip([k for k in d.entries if k in split], whole, strict=True))
        return (yield from _balancing(d, state))
    grad = whole.pop(0) if gathers(d) else _as_informative(d).expand(view.m, view.n)
    state.update(zip([k for k in d.entries if k in split], whole, strict=True))
    meta = of_shape(view.shape, d.item.param.dtype)
    plan = replace(d.item, param=meta, part=None)
    counters = {"refresh_step": d.state["refresh_step"], "postponed": _uncounted(d)}
    moved, ok = yield from finding(plan, {**state, **counters}, grad, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {}, ok)


def _factoring(d: Due, weight: Tensor) -> Searching[Found]:
    """Factors of the whole weight, in the canonical view."""
    view = d.item.view
    assert view is not None
    shape = (*view.batch, view.m, view.n)
    plan = replace(
        d.item, param=weight, view=view._replace(shape=shape, flip=False), part=None, local=None
    )
    state = d.subspace.init(view, weight)
    state.update({k: d.state[k].clone() for k in state if on_host(k)})
    counters = {"postponed": _uncounted(d)}
    moved, ok = yield from finding(plan, {**state, **counters}, weight, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {}, ok)


def _balancing(d: Due, state: State) -> Searching[Found]:
    """Entries that were made of themselves."""
    try:
        yield from d.subspace.balancing_(state)
    except LinAlgError as error:
        postpone_(d.item, {"postponed": _uncounted(d)}, d.step, str(error))
        return Found(failures.POSTPONED, state, {})
    return Found(failures.FOUND, state, {})


def _uncounted(d: Due) -> Tensor:
    """For what the owner says of it; all ranks count alike, by what they are told."""
    return d.state["postponed"].clone()


def _as_informative(d: Due) -> Tensor:
    """A number that is 0, or not finite, where the whole gradient is: all that is looked at."""
    assert d.norm is not None and d.grad is not None
    return torch.where(d.norm > 0, d.norm / d.norm, d.norm).to(d.grad.dtype)
