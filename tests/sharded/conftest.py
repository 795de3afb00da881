"""Worlds of processes, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.sharded.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """The world of a size: its processes start with its first job and stay for the others."""
    worlds: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        return worlds.setdefault(size, Ranks(size))

    yield of
    for world in worlds.values():
        world.close()
