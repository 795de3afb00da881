"""What one rank raises as it finds a basis, all ranks raise: none waits for it.

Hosts raise at once. An accelerator is not asked for that: all ranks keep the basis that they had,
and raise as they next step the matrix.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_optim.engine.answers import Told, on_its_way
from lowrank_optim.engine.tracing import fake_mode
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form
from lowrank_optim.sharding.parts import Part

FLAG = Form((1,), torch.uint8)
"""How a refresh ended; the first tensor of what its owner broadcasts."""
POSTPONED, FOUND, RAISED = range(3)
"""The first two are what a device says of whether a basis was found."""


_OF_ALL = "_lowrank_optim_of_all_ranks"
_E = TypeVar("_E", bound=BaseException)


def of_all(error: _E) -> _E:
    """An error that every rank raises in the same place, so that all may try the step again."""
    setattr(error, _OF_ALL, True)
    return error


def is_alone(error: BaseException) -> bool:
    """Whether other ranks may not have an error that this one has amid what they do together."""
    return not hasattr(error, _OF_ALL)


class Failure(NamedTuple):
    """What the owner of a matrix could not do."""

    name: str
    error: Exception


class Ended(NamedTuple):
    """A refresh that all ranks have taken part in, before hosts know what became of it."""

    param: Tensor
    owner: int
    """Its rank in the group of the matrix."""
    end: Tensor
    """One of the ends, where the matrix is."""
    failure: Failure | None
    """What the owner raised, on that rank."""


@dataclass
class Verdict:
    """How refreshes of one step ended, as an accelerator will have told."""

    told: Told | None
    """None once it was read."""
    failures: Sequence[tuple[int, Failure | None]]
    """Of each matrix the owner, and what it raised, on that rank."""
    part: Part

    def read(self) -> None:
        """Raise the first of them, if any."""
        told, self.told = self.told, None
        ends = [] if told is None else told.read().tolist()
        for (owner, failure), end in zip(self.failures, ends, strict=False):
            if end == RAISED:
                raise_together(owner, failure, self.part)


_open: MutableMapping[Tensor, Verdict] = WeakTensorKeyDictionary()
"""What has not been asked, by parameters."""


def settle(ended: Sequence[Ended], part: Part) -> None:
    """Raise what an owner raised: at once, or on an accelerator when :func:`recall` asks.

    Args:
        ended: refreshes of one group of ranks.
        part: what its ranks share.
    """
    if not ended or ended[0].end.is_meta or fake_mode() is not None:
        return  # a rehearsal, in which every basis is found
    if not on_accelerator(ended[0].end):
        for own in ended:
            if int(own.end) == RAISED:
                raise_together(own.owner, own.failure, part)
        return
    for own in ended:
        if own.failure is not None:  # not what its frames hold: they may have filled the memory
            traceback.clear_frames(own.failure.error.__traceback__)
    told = on_its_way(torch.cat([own.end for own in ended]))
    verdict = Verdict(told, [(own.owner, own.failure) for own in ended], part)
    for own in ended:
        _open[own.param] = verdict


def recall(params: Iterable[Tensor]) -> None:
    """Raise what owners of these matrices raised in the step before, if they did.

    All ranks that have parts of them call this, before they change anything.
    """
    for param in params if _open else ():
        verdict = _open.pop(param, None)
        if verdict is not None:
            verdict.read()


def this_rank() -> str:
    """Which process this is, where there are others."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    return f" on rank {dist.get_rank()} of {dist.get_world_size()}"


def flag(end: int, ok: Tensor | None, device: torch.device) -> Tensor:
    """How a refresh ended, made where it is sent from.

    Args:
        end: one of the ends, as the host knows.
        ok: of what was found on an accelerator whether it was, 0-d bool.
        device: where it is sent from.
    """
    if ok is None or end != FOUND:
        return torch.full((1,), end, dtype=torch.uint8, device=device)
    return ok.to(torch.uint8).view(1)


def raise_together(source: int, failure: Failure | None, part: Part) -> NoReturn:
    """Raise what one rank of the first copy has raised, on every rank of all copies.

    Args:
        source: rank in its group whose flag said so.
        failure: of that rank; None on all others.
        part: of the matrix: all ranks that have one of it call this.

    Raises:
        RuntimeError: on the others, with the rank, the parameter and the text; that rank raises
            its own error again.
    """
    text = None
    if failure is not None:
        rank, (name, error) = dist.get_rank(), failure
        text = f"rank {rank} could not refresh {name}: {type(error).__name__}: {error}"
    told = collectives.tell(text, source, part.group) if part.leads else ""
    if part.copies is not None:
        told = collectives.tell(told, part.first, part.copies)
    if failure is not None:
        failure.error.add_note(f"{told}. All ranks were told, and raise too")
        raise of_all(failure.error)
    raise of_all(RuntimeError(f"{told}. See the traceback of that rank; all ranks raise"))
