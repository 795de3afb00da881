"""The randomized SVD against the exact one: orthonormal, aligned, and near the optimal energy."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops import devices
from lowrank_optim.subspaces import SVD, RandomizedSVD, RefreshContext, randomized
from lowrank_optim.subspaces.randomized import orthonormal
from lowrank_optim.tensors.matrix import matrix_view
from tests.compare import assert_close

ORTHONORMAL = 1e-5


def context(grad: Tensor, seed: int = 0) -> RefreshContext:
    return RefreshContext(matrix_view(grad.shape, "left"), torch.Generator().manual_seed(seed))


def energy(basis: Tensor, grad: Tensor) -> Tensor:
    """``|P^T G|^2`` of each matrix, in float64."""
    return (basis.double().mT @ grad.double()).square().sum((-2, -1))


def with_spectrum(values: Tensor, n: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A matrix ``(..., len(values), n)`` of those singular values and random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    *batch, m = values.shape
    u = torch.linalg.qr(torch.randn(*batch, m, m, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(*batch, n, m, generator=g, dtype=torch.float64)).Q
    return ((u * values.double().unsqueeze(-2)) @ v.mT).to(dtype)


SPECTRA = {
    "flat": lambda m: torch.ones(m),
    "power law": lambda m: 1 / torch.arange(1, m + 1),
    "exponential": lambda m: 0.7 ** torch.arange(m),
    "slow": lambda m: 0.97 ** torch.arange(m),
    "one spike": lambda m: torch.cat([torch.full((1,), 1e3), torch.ones(m - 1)]),
    "rank 3": lambda m: (torch.arange(m) < 3).float(),
    "step": lambda m: torch.where(torch.arange(m) < m // 4, 1.0, 1e-3),
    "noise": lambda m: torch.linspace(1.8, 0.2, m),
}


def assert_orthonormal(basis: Tensor) -> None:
    eye = torch.eye(basis.shape[-1], dtype=torch.float64)
    error = (basis.double().mT @ basis.double() - eye).abs().max()
    assert float(error) < ORTHONORMAL


def next_iteration(basis: Tensor, grad: Tensor) -> Tensor:
    """The basis after one more power iteration, exactly: the bar that "refined" is held to."""
    g, q = grad.double(), basis.double()
    return torch.linalg.qr(g @ (g.mT @ q)).Q


@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    m=st.integers(30, 70),
    extra=st.integers(0, 60),
    rank=st.integers(1, 20),
    exponent=st.integers(-15, 15),
    start=st.sampled_from(["cold", "near", "unrelated"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 5),
)
@example("flat", 40, 0, 8, 0, "unrelated", torch.float32, 0)
@example("rank 3", 40, 20, 10, 0, "cold", torch.float32, 0)
@example("rank 3", 40, 20, 10, 15, "near", torch.bfloat16, 0)
@example("one spike", 64, 30, 16, -15, "unrelated", torch.float32, 0)
def test_refined_until_another_iteration_would_gain_one_percent(
    spectrum: str,
    m: int,
    extra: int,
    rank: int,
    exponent: int,
    start: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """The promise of the default projector, whatever the spectrum, scale, dtype and start."""
    grad = with_spectrum(SPECTRA[spectrum](m) * 10.0**exponent, m + extra, seed, dtype)
    previous = None
    if start == "near":
        noise = torch.randn(grad.shape, dtype=torch.float64) * grad.double().std() / 10
        previous = SVD(rank).find((grad.double() + noise).float(), None, context(grad))
    elif start == "unrelated":
        previous = torch.linalg.qr(torch.randn(m, rank)).Q
    if previous is not None:
        previous = previous.to(dtype)
    basis = RandomizedSVD(rank).find(grad, previous, context(grad, seed))
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert_orthonormal(basis)
    assert float(energy(next_iteration(basis, grad), grad) / energy(basis, grad)) <= 1.01


@given(spectrum=st.sampled_from(sorted(SPECTRA)), cold=st.booleans(), seed=st.integers(0, 3))
def test_a_batch_is_its_matrices_one_by_one(spectrum: str, cold: bool, seed: int) -> None:
    """Experts are refreshed together: the captured energy of each is that of its own refresh.

    The bases differ, since each draws its own oversampling; both keep the one per cent.
    """
    values = SPECTRA[spectrum](48) * torch.tensor([[1.0], [1e4], [1e-4]])
    grad = with_spectrum(values, 80, seed)
    previous = None if cold else SVD(8).find(grad + 0.1 * grad.flip(0), None, context(grad))
    together = RandomizedSVD(8).find(grad, previous, context(grad))
    assert_orthonormal(together)
    for i in range(3):
        start = None if previous is None else previous[i]
        alone = RandomizedSVD(8).find(grad[i], start, context(grad[i]))
        ratio = float(energy(together[i], grad[i]) / energy(alone, grad[i]))
        assert 1 / 1.01 <= ratio <= 1.01
        assert float(energy(next_iteration(together[i], grad[i]), grad[i])) <= 1.01 * float(
            energy(together[i], grad[i])
        )


@pytest.mark.parametrize("warm", [False, True])
def test_columns_are_singular_vectors_largest_first(warm: bool) -> None:
    """Rayleigh-Ritz alignment: ``P^T G G^T P`` is diagonal and descending, not merely a span.

    Adam acts on each coordinate by itself, so the directions within the span matter.
    """
    grad = with_spectrum(0.8 ** torch.arange(60.0), 90)
    previous = None
    if warm:
        previous = torch.linalg.qr(torch.randn(60, 12)).Q
    basis = RandomizedSVD(12).find(grad, previous, context(grad))
    low = basis.double().mT @ grad.double()
    gram = low @ low.mT
    diagonal = gram.diagonal()
    assert bool((diagonal[:-1] >= diagonal[1:]).all())
    cosines = gram / torch.outer(diagonal, diagonal).sqrt() - torch.eye(12)
    assert float(cosines.abs().max()) < 0.05
    exact = SVD(12).find(grad, None, context(grad))
    assert float((exact[:, :6].mT @ basis[:, :6]).diagonal().abs().min()) > 0.999


@pytest.mark.parametrize("decay", [0.5, 0.2])
def test_orthonormal_when_squares_of_singular_values_leave_float32(decay: float) -> None:
    """Gradients of small batches have sigma_1 / sigma_r of 1e7: a Gram matrix is singular then.

    Cholesky QR of it fails or loses all orthogonality; Householder has to take over.
    """
    grad = with_spectrum(decay ** torch.arange(64.0), 100)
    for previous in (None, torch.linalg.qr(torch.randn(64, 30)).Q):
        basis = RandomizedSVD(30).find(grad, previous, context(grad))
        assert_orthonormal(basis)
        optimal = energy(SVD(30).find(grad, None, context(grad)), grad)
        assert float(energy(basis, grad) / optimal) > 1 - 1e-4


def test_a_direction_outside_the_old_basis_is_found() -> None:
    """Without oversampling a warm start could never leave the span it started in."""
    old = with_spectrum((torch.arange(50) < 5).float(), 70, seed=1)
    previous = SVD(5).find(old, None, context(old))
    new = torch.linalg.qr(torch.cat([previous, torch.randn(50, 5)], 1)).Q[:, 5:]
    grad = new @ torch.randn(5, 70)
    basis = RandomizedSVD(5).find(grad, previous, context(grad))
    assert float(energy(basis, grad) / energy(new, grad)) > 0.99


def test_the_exact_factorisation_steps_in(monkeypatch) -> None:
    """A sketch whose eigenvalues do not converge must not cost the refresh."""

    def fail(gram: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    grad = with_spectrum(0.8 ** torch.arange(40.0), 60)
    monkeypatch.setattr("lowrank_optim.subspaces.randomized.eigh", fail)
    basis = RandomizedSVD(8).find(grad, None, context(grad))
    assert_close(basis, SVD(8).find(grad, None, context(grad)))


def few_rows(count: int, factor: float) -> Tensor:
    """A gradient of ``count`` rows that are ``factor`` times as long as the others."""
    rows = torch.where(torch.arange(64) < count, 1.0, 1 / factor if factor else 0.0)
    return rows.unsqueeze(-1) * torch.randn(64, 90, generator=torch.Generator().manual_seed(1))


HARD = {
    "full rank": lambda: with_spectrum(0.9 ** torch.arange(64.0), 90),
    "rank 9": lambda: with_spectrum(1.0 * (torch.arange(64) < 9), 90),
    "rank 1": lambda: with_spectrum(1.0 * (torch.arange(64) < 1), 90),
    "squares leave float32": lambda: with_spectrum(0.2 ** torch.arange(64.0), 90),
    "rounding fills the rest": lambda: with_spectrum(
        torch.where(torch.arange(64) < 8, 1, 1e-5), 90
    ),
    "few rows": lambda: few_rows(8, 0),
    "one long row": lambda: few_rows(1, 1e6),
    "equal rows": lambda: torch.ones(64, 90),
    "one column": lambda: few_rows(64, 1) * (torch.arange(90) < 1),
}


@pytest.mark.parametrize("rank", [16, 55])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_an_accelerator_bases_are_orthonormal(
    dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the rank of a gradient too, and of all in one call, by Cholesky's factors alone."""
    grads = torch.stack([make().to(dtype) for make in HARD.values()])
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    if rank == 16:  # far from square, so that a start has a Cholesky factor too
        monkeypatch.setattr(randomized, "orthogonal", None)
    basis, tight = None, 1e-5 if dtype == torch.float32 else 1e-12
    for _ in range(2):
        basis = RandomizedSVD(rank).find(grads, basis, context(grads))
        eye = torch.eye(rank, dtype=torch.float64)
        assert float((basis.double().mT @ basis.double() - eye).abs().max()) < tight
        best = torch.linalg.svdvals(grads.double())[:, :rank].square().sum(-1)
        assert bool((energy(basis, grads) > 0.998 * best).all())


def test_on_an_accelerator_a_gradient_of_few_directions_has_a_basis_whatever_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LAPACK found NaN in 5 of 100, as numbers near the least of float32 were in a Gram matrix.

    A refresh was then postponed.
    """
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    grad = few_rows(2, 0)
    for seed in range(100):
        basis = RandomizedSVD(16).find(grad, None, context(grad, seed))
        assert_orthonormal(basis)
        assert float(energy(basis, grad)) > 0.998 * float(grad.square().sum())


@pytest.mark.parametrize("warm", [False, True])
def test_on_an_accelerator_iterations_are_no_more_than_asked_for_or_needed(
    warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gain is read there: a few, each of which captures more, and fewer where asked for."""
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    grad, other = torch.randn(2, 64, 96, dtype=torch.float64)
    previous = RandomizedSVD(8).find(other, None, context(other)) if warm else None

    def found(most: int) -> Tensor:
        return RandomizedSVD(8, max_iterations=most).find(grad, previous, context(grad))

    few = randomized.ITERATIONS[not warm]
    captured = [float(energy(found(n), grad)) for n in range(1, few + 1)]
    assert all(fewer < more for fewer, more in itertools.pairwise(captured))
    assert torch.equal(found(few), found(100))


def test_a_column_without_a_direction_of_its_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: noise takes the place of none."""
    monkeypatch.setattr(randomized, "OWN", -1.0)
    with pytest.raises(AssertionError):
        test_on_an_accelerator_bases_are_orthonormal(torch.float32, 16, monkeypatch)


def test_same_seed_same_bits() -> None:
    grad = torch.randn(40, 60)
    one, two = (RandomizedSVD(6).find(grad, None, context(grad, 3)) for _ in range(2))
    assert torch.equal(one, two)


def test_orthonormal_repairs_what_one_round_of_cholesky_leaves() -> None:
    """At condition 1e3 one round in float32 is off by 1e-2; dependent columns have no factor."""
    q = torch.linalg.qr(torch.randn(50, 20)).Q
    ill = q @ with_spectrum(torch.logspace(0, -3, 20), 20)
    assert_orthonormal(orthonormal(ill))
    dependent = torch.cat([q[:, :10], q[:, :10]], 1)
    assert_orthonormal(orthonormal(dependent))
    assert_orthonormal(orthonormal(torch.cat([q[:, :10], torch.zeros(50, 10)], 1)))
    assert_close(orthonormal(q), q)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (2, 17, 19)])
def test_tiled_product_of_mixed_dtypes(shape: tuple[int, ...], monkeypatch) -> None:
    """Tiles along either side, on either operand, add up to the whole product."""
    monkeypatch.setattr("lowrank_optim.ops.products.TILE_ELEMENTS", 64)
    grad = torch.randn(shape).bfloat16()
    a = torch.randn(*shape[:-2], 7, shape[-2])
    b = torch.randn(*shape[:-2], shape[-1], 7)
    assert_close(ops.mixed_matmul(a, grad), a @ grad.float(), torch.float32)
    assert_close(ops.mixed_matmul(grad, b), grad.float() @ b, torch.float32)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (2, 17, 19)])
def test_halves_of_bfloat16_make_a_product_of_float32(shape: tuple[int, ...], monkeypatch) -> None:
    """Products of CUDA's matrix units, which add up in float32; one half alone is off by 2^-9."""
    used = []

    def wide(x: torch.Tensor, y: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert x.dtype == y.dtype == torch.bfloat16
        used.append(y.shape[-1])
        return (x.double() @ y.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", wide)
    monkeypatch.setattr(torch, "bmm", wide)
    monkeypatch.setattr("lowrank_optim.ops.products.WRITES_WIDE", True)
    monkeypatch.setattr("lowrank_optim.ops.products.kind_of", lambda x: "cuda")
    grad = torch.randn(shape).bfloat16()
    a = torch.randn(*shape[:-2], 7, shape[-2])
    b = torch.randn(*shape[:-2], shape[-1], 7)
    for found, (x, y) in (
        (ops.mixed_matmul(a, grad), (a, grad)),
        (ops.mixed_matmul(grad, b), (grad, b)),
    ):
        exact = x.double() @ y.double()
        assert found.dtype == torch.float32 and found.shape == exact.shape
        assert (found - exact).norm() < 2**-16 * exact.norm()
    # tiles cover the columns of either product
    assert sum(used) == shape[-1] + shape[-2] and max(used) <= -(-max(shape[-2:]) // 8)
