"""The cosine basis: its matrix, its transform, and what it chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import PROJECTORS, GaLoreAdamW, ops
from lowrank_optim.engine.draws import seeded
from lowrank_optim.ops import native
from lowrank_optim.ops.cosine import BASES, TILE_ELEMENTS, CosineTransform, cosine_rows
from lowrank_optim.subspaces import DCT, Hadamard, RefreshContext
from lowrank_optim.subspaces.fixed import SPECTRUM_ELEMENTS, FixedBasis
from lowrank_optim.subspaces.searches import together
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases
from tests.compare import assert_close, relative
from tests.subspaces import contract

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 12, 13, 31, 64, 97, 100, 127]
"""1, odd, prime, powers of two, and what is between."""


def scipy_rows(n: int, basis: str) -> Tensor:
    """Row j is what scipy gives for the j-th basis vector."""
    c = torch.from_numpy(scipy.fft.dct(np.eye(n), norm="ortho", axis=0))
    return c if basis == "dct2" else c.mT


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n", LENGTHS)
def test_the_matrix_is_scipys(n: int, basis: str) -> None:
    rows = cosine_rows(n, basis, torch.float64, CPU)
    assert float((rows - scipy_rows(n, basis)).abs().max()) < 1e-14
    if n == 1:
        assert rows.tolist() == [[1.0]]


def test_the_matrix_is_orthonormal_to_1e_6_in_float32_at_4096() -> None:
    """Phases k (2j + 1) pass 2^24: evaluated in float32, as released, this error is 2e-4."""
    rows = cosine_rows(4096, "dct2", torch.float32, CPU).double()
    some = torch.cat([torch.arange(64), torch.arange(4096 - 64, 4096)])
    gram = rows[some] @ rows.mT
    gram[torch.arange(128), some] -= 1
    assert float(gram.abs().max()) < 1e-6
    assert_close(rows[0], torch.full((4096,), 1 / 64.0).double(), torch.float32)


@pytest.mark.parametrize("n", [64, 97, 1024])
def test_the_matrix_is_orthonormal_in_float64(n: int) -> None:
    rows = cosine_rows(n, "dct2", torch.float64, CPU)
    assert float((rows @ rows.mT - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-12


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 130), c=st.integers(1, 5), basis=st.sampled_from(BASES), data=st.data())
def test_the_transform_is_the_matrix(n: int, c: int, basis: str, data: Any) -> None:
    """Any length, both layouts: all coefficients, some of them, and the way back."""
    rank = data.draw(st.integers(1, n))
    index = torch.tensor(sorted(data.draw(st.permutations(range(n)))[:rank]))
    x, low = randn(n, c, seed=n), randn(rank, c, seed=n + 1)
    rows = scipy_rows(n, basis)
    plan = CosineTransform.make(n, basis, torch.float64, CPU)
    for stored in (x, x.mT.contiguous().mT):
        parts = plan.analyse(stored)
        assert float((plan.take(parts, index).mT - rows[index] @ x).abs().max()) < 1e-12
    assert float((plan.lift(low, index).mT - rows[index].mT @ low).abs().max()) < 1e-12
    every = torch.arange(n)  # the inverse of the transform is its transpose
    assert_close(plan.lift(plan.take(plan.analyse(x), every).mT, every).mT, x)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n", [768, 1376, 5461])
def test_the_transform_in_float32(n: int, basis: str) -> None:
    """Against float64: no worse than 1e-5 of the norm of a row, bfloat16 gradients upcast."""
    x = randn(n, 3, dtype=torch.float32)
    plan = CosineTransform.make(n, basis, torch.float32, CPU)
    every = torch.arange(n)
    wide = CosineTransform.make(n, basis, torch.float64, CPU)
    for given_as in (x, x.bfloat16()):
        got = plan.take(plan.analyse(given_as), every)
        want = wide.take(wide.analyse(given_as.double()), every)
        assert float((got - want).abs().max()) < 1e-5 * float(given_as.double().norm(dim=0).max())


def test_the_two_bases_are_transposes_and_differ() -> None:
    """The release takes the columns in one mode and the rows in the other, as if they were one."""
    for n in LENGTHS:
        two, three = (cosine_rows(n, b, torch.float64, CPU) for b in BASES)
        assert torch.equal(two, three.mT)
        if n > 2:
            assert float((two - three).abs().max()) > 0.1
        else:
            assert_close(two, three)


# ---------------------------------------------------------------- the subspace


def subspace(name: str, shape: tuple[int, ...], rank: int, **keys: Any) -> tuple[Any, FixedBasis]:
    view = matrix_view(shape, keys.pop("proj_type", "std"))
    assert view is not None
    group = {"rank": rank, "scale": 1.0, "proj_type": "std", "update_proj_gap": 1, **keys}
    found = PROJECTORS[name].from_group(group, view)
    assert isinstance(found, FixedBasis)
    return view, found


def refreshed(view: Any, sub: FixedBasis, grad: Tensor) -> tuple[dict[str, Tensor], Any]:
    state = sub.init(view, grad)
    return state, sub.refresh_(state, view.of(grad), RefreshContext(view, seeded(0)))["low"]


@pytest.mark.parametrize("name", ["dct", "hadamard"])
def test_l2_ranking_is_optimal_among_all_subsets(name: str) -> None:
    for m in (2, 5, 8):
        grad = randn(m, 11, seed=m)
        for rank in range(1, m + 1):
            view, sub = subspace(name, (m, 11), rank, proj_type="left")
            state, _ = refreshed(view, sub, grad)
            rows = sub.vectors(m, torch.float64, CPU)
            energy = (rows @ grad).square().sum(1)
            best = max(sum(energy[list(s)]) for s in itertools.combinations(range(m), rank))
            basis = sub.bases(state, view)[0]
            rest = grad - basis @ (basis.mT @ grad)
            assert_close(rest.square().sum(), grad.square().sum() - best)
            assert (
                float(rest.square().sum())
                <= (1 - rank / m) * float(grad.square().sum()) * (1 + 1e-12) + 1e-12
            )


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("basis", BASES)
def test_a_gradient_made_of_r_vectors_is_found(basis: str, transform: str) -> None:
    """Exactly their indices, whatever the scale; nothing is left over."""
    for shape in [(30, 17), (17, 30), (16, 16)]:
        view, sub = subspace("dct", shape, 4, basis=basis, transform=transform)
        planted = [0, 3, 8, 15]
        rows = cosine_rows(view.m, basis, torch.float64, CPU)
        canonical = rows[planted].mT @ randn(4, view.n, seed=2)
        grad = canonical.mT.contiguous() if view.flip else canonical
        for factor in (1e-6, 1.0, 1e6):
            state, moved = refreshed(view, sub, factor * grad)
            assert state["basis_index"].tolist() == planted
            assert state["basis_index"].dtype == torch.int32
            basis_now = sub.bases(state, view)[0]
            assert relative(basis_now @ moved.low, factor * canonical) < 1e-12
            turn = torch.linalg.qr(randn(view.n, view.n, seed=3)).Q
            turned = (canonical @ turn).mT if view.flip else canonical @ turn
            assert refreshed(view, sub, turned.contiguous())[0]["basis_index"].tolist() == planted


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    rank=st.integers(1, 12),
    basis=st.sampled_from(BASES),
    ranking=st.sampled_from(["l1", "l2"]),
    proj_type=st.sampled_from(cases.PROJ_TYPES),
    seed=st.integers(0, 100),
)
def test_both_evaluations_are_one_method(
    m: int, n: int, rank: int, basis: str, ranking: str, proj_type: str, seed: int
) -> None:
    """matmul and fft: the same indices and updates; the coordinates found are P^T G."""
    grad, weight = randn(m, n, seed=seed), randn(m, n, seed=seed + 1)
    results = []
    for transform in ("matmul", "fft"):
        keys = {"basis": basis, "ranking": ranking, "proj_type": proj_type}
        view, sub = subspace("dct", (m, n), rank, transform=transform, **keys)
        state, moved = refreshed(view, sub, grad)
        low = sub.coords(state, view.of(grad))["low"]
        bases = sub.bases(state, view)
        want = bases[0].mT @ view.of(grad)
        want = want @ bases[1] if len(bases) == 2 else want
        assert_close(low, want)
        if moved.low is not None:
            assert_close(moved.low, low)
        assert moved.low is not None or proj_type == "full"
        update = randn(*low.shape, seed=seed + 2)
        pushed = [low]
        for kind in (None, "scaled", "sign"):
            out = weight.clone()
            factors = randn(1, view.n, seed=seed + 3).abs()
            term = None if kind is None else Term(kind, factors, 0.5)  # type: ignore[arg-type]
            into = Target(view.of(out), view.of(grad), low, lr=0.1, decay=0.9)
            sub.push_(into, state, {"low": update}, term)
            pushed.append(out)
        results.append(([state[k] for k in state], pushed))
    (indices, pushed), (others, other) = results
    assert all(torch.equal(a, b) for a, b in zip(indices, others, strict=True))
    for a, b in zip(pushed[:3], other[:3], strict=True):
        assert_close(a, b)
    if rank < min(m, n):  # with nothing outside, signs are those of rounding
        assert_close(pushed[3], other[3])


def test_ties_and_zero_scores_take_the_lowest_indices() -> None:
    for transform in ("matmul", "fft"):
        view, sub = subspace("dct", (9, 20), 5, transform=transform)
        rows = cosine_rows(9, "dct2", torch.float64, CPU)
        grad = torch.outer(rows[6], torch.ones(20, dtype=torch.float64)) * 2.0**40
        grad = (grad / 2.0**40).round(decimals=14)
        state = {"basis_index": torch.arange(4, 9, dtype=torch.int32)}
        sub.refresh_(state, view.of(torch.zeros_like(grad)), RefreshContext(view, seeded(0)))
        assert state["basis_index"].tolist() == [0, 1, 2, 3, 4]
        assert 6 in refreshed(view, sub, grad)[0]["basis_index"].tolist()


def test_source_says_where_an_index_was() -> None:
    """A 0/1 matrix with at most one 1 a row and column, as many as indices have stayed."""
    view, sub = subspace("dct", (20, 33), 6)
    state, _ = refreshed(view, sub, randn(20, 33, seed=1))
    before = state["basis_index"].clone()
    moved = sub.refresh_(state, randn(20, 33, seed=2), RefreshContext(view, seeded(0)))["low"]
    turn, after = moved.rotation(), state["basis_index"]
    kept = set(before.tolist()) & set(after.tolist())
    assert 0 < len(kept) < 6 and int(turn.sum()) == len(kept)
    assert int(turn.sum(0).max()) <= 1 and int(turn.sum(1).max()) <= 1
    rows = cosine_rows(20, "dct2", torch.float64, CPU)
    assert_close(turn.double(), rows[after.long()] @ rows[before.long()].mT)
    for new, source in zip(after.tolist(), moved.source.tolist(), strict=True):
        assert source == (before.tolist().index(new) if new in kept else -1)
    again = sub.refresh_(state, randn(20, 33, seed=2), RefreshContext(view, seeded(0)))["low"]
    assert again.source.tolist() == list(range(6))


def test_the_basis_is_shared_by_width_and_rebuilt() -> None:
    """Grouped-query attention: three projected sizes, one matrix each; none with the FFT."""
    shapes = [(32, 64), (64, 64), (150, 64), (64, 32), (2, 32, 40)]
    held = {}
    for transform in ("matmul", "fft"):
        params = [torch.nn.Parameter(randn(*s, dtype=torch.float32)) for s in shapes]
        keys: dict[str, Any] = {"projector": "dct", "rank": 8, "transform": transform}
        optimizer = GaLoreAdamW([{"params": params, **keys}])
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        held[transform] = sorted(tuple(x.shape) for x in optimizer._shared.tensors() if x.dim() > 1)
        assert not any(x.is_floating_point() and k.startswith("basis")
                       for s in optimizer.state.values() for k, x in s.items())  # fmt: skip
    assert held == {"matmul": [(32, 32), (64, 64)], "fft": []}


def test_a_spectrum_too_large_to_keep_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SPECTRUM_ELEMENTS > 30 * 40
    view, sub = subspace("dct", (30, 40), 5, transform="fft")
    state, moved = refreshed(view, sub, randn(30, 40))
    monkeypatch.setattr("lowrank_optim.subspaces.fixed.SPECTRUM_ELEMENTS", 100)
    monkeypatch.setattr("lowrank_optim.ops.cosine.TILE_ELEMENTS", {False: 64, True: 64})
    other, tiled = refreshed(view, sub, randn(30, 40))
    assert tiled.low is None and torch.equal(state["basis_index"], other["basis_index"])
    low = sub.coords(other, randn(30, 40))["low"]
    assert_close(low, moved.low)


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("ranking", ["l1", "l2"])
def test_an_accelerator_sees_several_gradients_at_once(
    ranking: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coefficients and their norms are those of scipy's matrix, kept or not; any strides."""
    cases.branching(monkeypatch, lambda tensor: True)
    q, gap = scipy_rows(12, "dct2"), 1 if transform == "matmul" else 2
    for dtype, turned, tile in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), (False, True), (1 << 18, 12 * 45, 12 * 7)
    ):
        # all matrices of 20 columns, two, or 7 columns of one
        monkeypatch.setitem(TILE_ELEMENTS, True, tile)
        grads = [torch.randn((20, 12) if turned else (12, 20)).to(dtype) for _ in range(5)]
        grads = [grad.mT if turned else grad for grad in grads]
        subspace = DCT(rank=4, ranking=ranking, transform=transform, update_proj_gap=gap)
        found = together([subspace.looking(grad) for grad in grads])
        for grad, (size, seen) in zip(grads, found, strict=True):
            whole = q @ grad.double()
            scores = whole.abs().sum(1) if ranking == "l1" else whole.square().sum(1)
            assert_close(seen.scores, scores)
            assert size is None  # the search says whether a gradient can be used
            assert (seen.whole is None) == (transform == "fft" or tile == 12 * 7)
            if seen.whole is not None:
                assert_close(seen.whole, whole)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
def test_an_accelerator_that_chooses_at_every_step_transforms_once(
    ranking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One op for alike matrices: indices, where they stood, and the coordinates of the gradient."""
    cases.branching(monkeypatch, lambda tensor: True)
    calls: list[int] = []
    own = ops.cosine_top_project_

    def counted(grads: list[Tensor], *others: Any) -> None:
        calls.append(len(grads))
        own(grads, *others)

    monkeypatch.setattr(ops, "cosine_top_project_", counted)
    q = scipy_rows(12, "dct2")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        view, sub = subspace("dct", (12, 20), 4, transform="fft", ranking=ranking)
        grads = [torch.randn(12, 20).to(dtype) for _ in range(3)]
        grads[1].zero_()
        states = [sub.init(view, grad) for grad in grads]
        ctx = RefreshContext(view, torch.Generator().manual_seed(0))
        found = together([sub.refreshing_(*each, ctx) for each in zip(states, grads, strict=True)])
        for n, (state, grad, moved) in enumerate(zip(states, grads, found, strict=True)):
            change, whole = moved["low"], q @ grad.double()
            scores = whole.abs().sum(1) if ranking == "l1" else whole.square().sum(1)
            index = [0, 1, 2, 3] if n == 1 else sorted(scores.topk(4).indices.tolist())
            assert state["basis_index"].tolist() == index
            places = [k if k < 4 else -1 for k in index]
            assert change.source is not None and change.source.tolist() == places
            assert change.low is not None and change.ok is not None
            assert_close(change.low, whole[index])
            assert bool(change.ok) == (n != 1)
            assert (change.finite is not None) == (ranking == "l2")
    assert calls == ([3, 3] if ops.fuses_cosine(torch.empty(0), 12) else [])  # float64 is not


def test_auto_takes_the_cheaper_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many columns or a frequent refresh: the transform. Few of both: products."""
    like = torch.empty(0)

    def fast(m: int, rank: int, gap: int, x: Tensor = like) -> bool:
        return DCT(rank, update_proj_gap=gap).fast(m, x)

    for backend in ("reference", "native") if native.available("cpu")[0] else ("reference",):
        monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
        assert fast(4096, 1024, 200) and fast(4096, 8, 1)
        assert not fast(4096, 8, 200)
        assert fast(4096, 128, 200) and not fast(4096, 128, 200, like.bfloat16())
        assert not fast(4093, 128, 200)  # a prime
        assert fast(16, 4, 1) == (backend == "native")  # small ones cost calls, not numbers


@pytest.fixture
def every_dct_by_fft(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(DCT, "fast", lambda self, n, like: True)
    yield


@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
@pytest.mark.usefixtures("every_dct_by_fft")
def test_the_fast_form_keeps_the_contract_of_projectors(proj_type: str) -> None:
    """The grid of contract tests is small enough for ``auto`` to choose products everywhere."""
    for clause in contract.CONTRACT:
        clause("dct", proj_type)


def test_hadamard_is_signs_and_any_length() -> None:
    for n in (1, 2, 4, 8, 12, 20, 7):
        rows = Hadamard(1).vectors(n, torch.float64, CPU)
        assert_close(rows @ rows.mT, torch.eye(n, dtype=torch.float64))
    assert_close(
        Hadamard(1).vectors(8, torch.float64, CPU).abs() * 8**0.5, torch.ones(8, 8).double()
    )
