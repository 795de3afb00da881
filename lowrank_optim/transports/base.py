"""What the moments do when the basis moves: the Transport role."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lowrank_optim.rules.base import Slot
from lowrank_optim.subspaces.refresh import BasisChange

Moments = Sequence[tuple[Slot, Tensor, float]]
"""Slot, its tensor, and the factor ``1 - beta^t`` by which it is biased."""

Transport = Callable[[Moments, BasisChange], None]
"""Changes moments in place, as a refresh moved their coordinates."""

TRANSPORTS: dict[str, Transport] = {}
"""Transports by the name that ``on_refresh`` takes."""


def register(name: str) -> Callable[[Transport], Transport]:
    """Make a transport known as ``on_refresh=name``.

    Raises:
        ValueError: the name is taken.
    """

    def known(transport: Transport) -> Transport:
        if name in TRANSPORTS:
            raise ValueError(f"a transport named {name!r} is registered already")
        TRANSPORTS[name] = transport
        return transport

    return known
