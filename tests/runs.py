"""A few small parameters of every kind, and gradients that depend on step and weights alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES = {"wide": (6, 10), "tall": (9, 5), "experts": (2, 6, 8), "conv": (4, 3, 2, 2), "bias": (7,)}
"""Projected on the left, on the right, as a batch, as a flattened matrix, and not at all."""


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in {**SHAPES, "scalar": ()}.items()
    }


def copies(params: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """Gradients of a noisy quadratic, from a generator of their own."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = 0.3 * p.detach() + noise


def train(params: Sequence[Tensor], optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def entries(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """State by position, as copies."""
    return [
        {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same_state(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Bitwise, dtypes included."""
    for a, e in zip(actual, expected, strict=True):
        assert a.keys() == e.keys()
        for key in e:
            assert a[key].dtype == e[key].dtype, key
            assert torch.equal(a[key], e[key]), key


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bitwise."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and torch.equal(a, e), i


def to_file(x: Any) -> io.BytesIO:
    """What ``torch.save`` writes of anything, to be read from its beginning."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


def through_a_file(x: Any) -> Any:
    """What another process would read of it, by the safe ``torch.load``."""
    return torch.load(to_file(x), weights_only=True)


def saved(optimizer: Optimizer) -> bytes:
    """What ``torch.save`` writes of its state."""
    return to_file(optimizer.state_dict()).getvalue()


def loaded(data: bytes, **options: Any) -> dict[str, Any]:
    """What the safe ``torch.load`` reads."""
    return torch.load(io.BytesIO(data), weights_only=True, **options)


def resumed(optimizer: Optimizer, fresh: Optimizer) -> None:
    """Through a file, into an optimizer that has never stepped."""
    fresh.load_state_dict(loaded(saved(optimizer)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
