"""Searches that ask for eigenvectors: those of all matrices that search are found in one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError

_T = TypeVar("_T")
Searching = Generator[Tensor, Tensor, _T]
"""Work that yields symmetric matrices ``(..., k, k)``, and is sent the eigenvectors of each in
ascending order, or thrown the ``LinAlgError`` that they could not be found by."""


def alone(search: Searching[_T]) -> _T:
    """What one search finds."""
    return together([search])[0]


def together(searches: Sequence[Searching[_T]]) -> list[_T]:
    """What several find. One that asks for nothing is over before the next one begins.

    An accelerator makes its host wait for the status of each call, so that equal shapes share one.
    """
    results: dict[int, _T] = {}
    asked: dict[int, Tensor] = {}

    def go_on(n: int, step: Callable[[], Tensor]) -> None:
        try:
            asked[n] = step()
        except StopIteration as end:
            results[n] = end.value

    for n, search in enumerate(searches):
        go_on(n, partial(next, search))
    while asked:
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
        for n, x in asked.items():
            alike.setdefault((x.shape, x.dtype, x.device), []).append(n)
        now, asked = asked, {}
        for own in alike.values():
            for n, found in zip(own, _vectors([now[n] for n in own]), strict=True):
                if isinstance(found, LinAlgError):
                    go_on(n, partial(searches[n].throw, found))
                else:
                    go_on(n, partial(searches[n].send, found))
    return [results[n] for n in range(len(searches))]


def _vectors(matrices: Sequence[Tensor]) -> list[Tensor | LinAlgError]:
    """Eigenvectors of each, or why there are none: one failure is not that of the others."""
    try:
        return list(eigh(torch.stack([*matrices]))[1].unbind(0))
    except LinAlgError as error:
        if len(matrices) == 1:
            return [error]
    return [found for x in matrices for found in _vectors([x])]


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix; float64 if float32 fails."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError:
        values, vectors = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), vectors.to(gram.dtype)
