"""What one rank raises as it finds a basis, all ranks raise: none waits for it."""

from __future__ import annotations

from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def this_rank() -> str:
    """Which process this is, where there are others."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    return f" on rank {dist.get_rank()} of {dist.get_world_size()}"


def flag(value: int, device: torch.device | None = None) -> Tensor:
    """One of the ends, to be sent; made where it is sent from (default: on the host)."""
    return torch.full((1,), value, dtype=torch.uint8, device=device)


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
