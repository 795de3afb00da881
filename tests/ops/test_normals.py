"""Normal numbers of a counter: the same bits on every device, and normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import tiles
from lowrank_optim.ops.noise import normals
from lowrank_optim.subspaces.base import RefreshContext
from lowrank_optim.subspaces.random import gaussian
from lowrank_optim.tensors.matrix import matrix_view
from tests.compare import assert_close
from tests.engine.watch import Watch

CPU = torch.device("cpu")


def splitmix64(seed: int, place: int) -> int:
    """Steele, Lea and Flood (2014): the ``place``-th word of a generator that begins at a seed."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def oracle(seed: int, count: int) -> Tensor:
    """Box and Muller (1958), of the two halves of each word: all cosines, then all sines."""
    words = [splitmix64(seed, i) for i in range(-(-count // 2))]
    radii = [math.sqrt(-2 * math.log(((w >> 32) + 0.5) / 2**32)) for w in words]
    angles = [2 * math.pi * (w % 2**32) / 2**32 for w in words]
    pairs = list(zip(radii, angles, strict=True))
    found = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
    return torch.tensor(found[:count], dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 5)])
def test_they_are_those_of_the_papers(
    seed: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in tiles of one and of three words."""
    want = oracle(seed, math.prod(shape)).view(shape)
    for tile in (1, 24, 1 << 18):
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile)
        assert_close(normals(seed, shape, torch.float64, CPU), want)
        single = normals(seed, shape, torch.float32, CPU)
        assert single.dtype == torch.float32
        assert float((single - want).abs().max()) < 1e-5


def test_they_are_normal_and_independent() -> None:
    """Frequencies of 64 classes of equal chance, and products of neighbours and of other seeds."""
    count = 1 << 18
    x, y = (normals(seed, (512, 512), torch.float64, CPU) for seed in (5, 6))
    classes = (torch.special.ndtr(x) * 64).long().flatten().bincount(minlength=64)
    chi = float((classes - count / 64).square().sum() / (count / 64))
    assert abs(chi - 63) < 5 * math.sqrt(2 * 63)
    pairs = [(x, y), (x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:256], x[256:])]
    for a, b in pairs:
        for f in (lambda t: t, lambda t: (t.square() - 1) / math.sqrt(2)):
            assert abs(float((f(a) * f(b)).mean())) < 5 / math.sqrt(a.numel())


def test_a_device_makes_them() -> None:
    """No number but the seed is the host's."""
    view = matrix_view((8, 6), "left")
    assert view is not None
    like = torch.empty(8, 6)
    with Watch() as seen:
        gaussian(like, (8, 3), RefreshContext(view, torch.Generator().manual_seed(3)))
    assert not seen.looks and seen.launches["log_"] == 1


def test_draws_of_a_refresh_differ() -> None:
    """Of both sides of a square matrix, though each is of as many numbers; and not of two runs."""

    def drawn() -> list[Tensor]:
        view = matrix_view((8, 8), "left")
        assert view is not None
        ctx = RefreshContext(view, torch.Generator().manual_seed(3))
        return [gaussian(torch.empty(8, 8), (8, 3), ctx) for _ in range(2)]

    first, second = drawn()
    assert not torch.equal(first, second)
    assert all(map(torch.equal, drawn(), (first, second)))
