"""When a basis is refreshed, how much of the gradient it holds, and what happens when it fails."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim import LowRankOptimizer
from lowrank_optim.engine import step as stepping
from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.draws import seeded
from lowrank_optim.ops.devices import as_accelerators
from lowrank_optim.subspaces import RandomizedSVD, RefreshContext
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases
from tests.compare import assert_close
from tests.logged import Logged


def refresh_steps(count: int, steps: int, **options: Any) -> list[list[int]]:
    """The steps, from 0, at which each of ``count`` matrices took a new basis."""
    params = [torch.nn.Parameter(cases.parameter((6, 9)).detach()) for _ in range(count)]
    optimizer = cases.build("GaLoreAdamW", params, rank=2, projector="random", **options)
    taken: list[list[int]] = [[] for _ in params]
    for step in range(steps):
        cases.run(optimizer, params, [[torch.ones_like(p) for p in params]])
        for own, param in zip(taken, params, strict=True):
            if int(optimizer.state[param]["refresh_step"]) == step:
                own.append(step)
    return taken


def test_fact_05_unstaggered_refreshes_are_at_0_t_2t() -> None:
    """Counted from 0, before the increment: n steps take ceil(n / T) factorisations."""
    options = {"stagger": False, "update_proj_gap": 3}
    assert refresh_steps(3, 10, **options) == [[0, 3, 6, 9]] * 3
    assert refresh_steps(1, 4, stagger=False, update_proj_gap=1) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("gap", [4, 10])
def test_staggered_refreshes_keep_the_gap_and_spread(gap: int) -> None:
    """All at step 0 (there is no basis yet), then each every ``gap`` steps, few at a time.

    The golden ratio puts between floor and ceil of the mean, give or take one, on each step.
    """
    count = 24
    taken = refresh_steps(count, 4 * gap, update_proj_gap=gap, stagger=True)
    load: Counter[int] = Counter()
    for own in taken:
        assert own[0] == 0
        assert {b - a for a, b in itertools.pairwise(own[1:])} == {gap}
        assert own[1] - own[0] <= gap
        load.update(own[1:])
    steady = [load[step] for step in range(gap + 1, 3 * gap + 1)]
    assert sum(steady) == 2 * count
    assert max(steady) <= count / gap + 2
    assert min(steady) >= count / gap - 2


def energy(basis: Tensor, grad: Tensor) -> float:
    return float((basis.mT @ grad).square().sum())


def basis_of(grad: Tensor, rank: int, previous: Tensor | None = None, seed: int = 0) -> Tensor:
    view = matrix_view(grad.shape, "left")
    assert view is not None
    return RandomizedSVD(rank).find(grad, previous, RefreshContext(view, seeded(seed)))


def with_spectrum(values: Tensor, m: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=values.dtype)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=values.dtype)).Q
    return (u * values) @ v.mT


DIMENSIONS = st.tuples(st.integers(24, 60), st.integers(24, 80), st.integers(1, 12))


@given(DIMENSIONS, st.floats(0.3, 1.5), st.integers(0, 1000))
def test_rsvd_holds_99_percent_on_decaying_spectra(
    dims: tuple[int, int, int], power: float, seed: int
) -> None:
    """Singular values falling as ``i**-power``: at least 0.99 of what the exact basis holds."""
    m, n, rank = dims
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    grad = with_spectrum(values, m, n, seed).float()
    best = float(values[:rank].square().sum())
    assert energy(basis_of(grad, rank, seed=seed), grad) >= 0.99 * best


@given(DIMENSIONS, st.sampled_from(["flat", "random", "step", "decay"]), st.integers(0, 1000))
def test_rsvd_is_within_1_percent_of_one_more_power_iteration(
    dims: tuple[int, int, int], spectrum: str, seed: int
) -> None:
    """On any spectrum the iteration stops only where going on would not pay: the promise of rsvd.

    The next iteration is taken from the basis returned, as the next refresh's warm start would.
    """
    m, n, rank = dims
    k = min(m, n)
    generator = torch.Generator().manual_seed(seed)
    values = {
        "flat": torch.ones(k),
        "random": torch.rand(k, generator=generator).sort(descending=True).values,
        "step": torch.cat([torch.ones(rank), torch.full((k - rank,), 0.9)]),
        "decay": 0.8 ** torch.arange(k),
    }[spectrum].double()
    grad = with_spectrum(values, m, n, seed).float()
    for previous in (None, torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q):
        basis = basis_of(grad, rank, previous, seed)
        more = torch.linalg.qr(grad @ (grad.mT @ basis)).Q
        assert energy(more, grad) <= 1.01 * energy(basis, grad) * (1 + 1e-5)


@pytest.mark.parametrize("exponent", [-18, -12, 12, 16])
def test_rsvd_does_not_depend_on_the_scale_of_the_gradient(exponent: int) -> None:
    """Loss scaling or a tiny loss: squares of 1e-18 are next to float32's smallest numbers."""
    values = 0.8 ** torch.arange(40, dtype=torch.float64)
    grad = with_spectrum(values, 40, 60, 0).float()
    basis = basis_of(grad * 10.0**exponent, 6)
    assert_close(basis.mT @ basis, torch.eye(6))
    assert energy(basis, grad) >= 0.99 * float(values[:6].square().sum())


def failing(exact: Any, times: list[int], fails: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        times.append(args[0].dtype.itemsize)
        if fails(args[0]):
            raise LinAlgError("did not converge")
        return exact(*args, **kwargs)

    return wrapper


STAGES = {
    "float32 fails": (lambda x: x.dtype == torch.float32, [4, 8], []),
    "float64 fails too": (lambda x: True, [4, 8], [8]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_factorisation_is_retried_in_float64_then_on_the_gram_matrix(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage finds the basis that a working driver finds; nothing is postponed."""
    start = cases.parameter((6, 11), torch.float32)
    grads = cases.gradients((6, 11), 4, torch.float32)
    want, _ = cases.train("GaLoreAdamW", start, grads)
    fails, svd_calls, eigh_calls = STAGES[stage]
    svds: list[int] = []
    eighs: list[int] = []
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, svds, fails))
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, eighs, lambda x: False))
    got, optimizer = cases.train("GaLoreAdamW", start, grads)
    assert svds == 2 * svd_calls  # refreshes at 0 and 3
    assert eighs == 2 * eigh_calls
    assert optimizer.postponed_refreshes() == {}
    assert_close(got, want, torch.float32)


def test_a_driver_that_returns_nan_is_retried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some drivers do not raise: a basis that is not finite counts as a failure."""
    start = cases.parameter((6, 11), torch.float32)
    grads = cases.gradients((6, 11), 4, torch.float32)
    want, _ = cases.train("GaLoreAdamW", start, grads)
    exact = torch.linalg.svd

    def nan(x: Tensor, **kwargs: Any) -> Any:
        u, s, vh = exact(x, **kwargs)
        u = u * float("nan") if x.dtype == torch.float32 else u
        return torch.return_types.linalg_svd((u, s, vh))

    monkeypatch.setattr(torch.linalg, "svd", nan)
    got, _ = cases.train("GaLoreAdamW", start, grads)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("projector", ["svd", "rsvd"])
def test_total_failure_postpones_and_is_counted(
    projector: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No factorisation works at the second refresh: the old basis goes on, and the run with it."""
    cases.branching(monkeypatch, lambda tensor: forced)
    grads = cases.gradients((20, 31), 6)
    param = torch.nn.Parameter(cases.parameter((20, 31)).detach())
    optimizer = cases.build("GaLoreAdamW", [param], projector=projector)
    cases.run(optimizer, [param], [[g] for g in grads[:3]])
    basis = optimizer.state[param]["basis"].clone()
    with monkeypatch.context() as patch:
        for name in ("svd", "eigh"):
            patch.setattr(torch.linalg, name, failing(None, [], lambda x: True))
        before = param.detach().clone()
        cases.run(optimizer, [param], [[g] for g in grads[3:5]])
    assert torch.equal(optimizer.state[param]["basis"], basis)
    assert optimizer.postponed_refreshes() == {"parameter 0": 2}
    moved = (param - before).detach()
    assert float(moved.norm()) > 1e-3  # still trained, in the old span
    assert float((moved - basis @ (basis.mT @ moved)).norm()) < 0.02 * float(before.norm())
    cases.run(optimizer, [param], [grads[5:]])
    assert int(optimizer.state[param]["refresh_step"]) == 5


def test_a_gradient_of_zeros_is_no_news_and_one_that_is_not_finite_is(logged: Logged) -> None:
    """Both postpone a refresh; an expert without tokens does so at every step."""
    param = torch.nn.Parameter(cases.parameter((20, 31)).detach())
    optimizer = cases.build("GaLoreAdamW", [param])
    zeros = torch.zeros_like(param)
    cases.run(optimizer, [param], [[zeros], [zeros]])
    assert not logged.records
    cases.run(optimizer, [param], [[zeros + math.nan]])
    assert any("refresh of parameter 0 postponed at step" in text for text in logged.messages)
    assert optimizer.postponed_refreshes() == {"parameter 0": 3}


def basis_in(optimizer: LowRankOptimizer, param: Tensor) -> Tensor:
    """P, a copy."""
    (item,) = optimizer._items(optimizer.param_groups[0])
    assert item.subspace is not None and item.view is not None
    return item.subspace.bases(optimizer.state[param], item.view)[0].clone()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("projector", cases.basis_names())
def test_an_expert_without_tokens_at_a_refresh_neither_loses_its_basis_nor_stops_the_others(
    projector: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert's gradient is zero at a refresh: the SVD of zero is coordinate axes.

    It replaced a good basis for a whole period, and as a first basis it lets no gradient outside
    those axes through. rsvd divided by the zero norm, and postponed all experts for ever.
    """
    cases.branching(monkeypatch, lambda tensor: forced)
    param = torch.nn.Parameter(torch.zeros(2, 30, 40))
    optimizer = cases.build("GaLoreSGD", [param], projector=projector, update_proj_gap=2)
    busy = cases.gradients((2, 30, 40), 1, torch.float32)[0]
    idle = busy.clone()
    idle[1] = 0
    outside = busy.clone()
    outside[1, :4] = 0  # orthogonal to the first four axes
    before = param.detach().clone()
    cases.run(optimizer, [param], [[idle], [outside]])
    moved = (param.detach() - before).norm(dim=(-2, -1))
    assert bool((moved > 1e-4).all())
    cases.run(optimizer, [param], [[busy]])  # a refresh that sees both
    basis = basis_in(optimizer, param)
    cases.run(optimizer, [param], [[busy], [idle]])  # one that sees the first
    assert optimizer.postponed_refreshes() == {}
    if projector != "random":
        overlap = basis.mT @ basis_in(optimizer, param)
        assert float(overlap[1].square().sum() / overlap.shape[-1]) > 0.99


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("projector", [x for x in cases.basis_names() if x != "random"])
def test_experts_of_which_one_is_not_finite_keep_their_bases(
    projector: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a refresh: of all, bit for bit, and none of them moves."""
    cases.branching(monkeypatch, lambda tensor: forced)
    param = torch.nn.Parameter(torch.zeros(2, 30, 40))
    optimizer = cases.build("GaLoreSGD", [param], projector=projector, update_proj_gap=2)
    first, other, bad = cases.gradients((2, 30, 40), 3, torch.float32)
    cases.run(optimizer, [param], [[first], [first]])
    basis, before = basis_in(optimizer, param), param.detach().clone()
    bad[1, 2, 3] = torch.nan
    draws = torch.get_rng_state()
    cases.run(optimizer, [param], [[bad]])
    assert torch.equal(torch.get_rng_state(), draws)  # what stands in for it is drawn apart
    assert torch.equal(basis_in(optimizer, param), basis)
    assert torch.equal(param, before)
    cases.run(optimizer, [param], [[other]])  # it is still due
    assert optimizer.postponed_refreshes() == {"parameter 0": 1}
    assert not torch.equal(basis_in(optimizer, param), basis)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("projector", cases.basis_names())
def test_an_expert_without_tokens_keeps_the_basis_it_had(
    projector: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others get a new one at that refresh; its own stays, bit for bit."""
    cases.branching(monkeypatch, lambda tensor: forced)
    param = torch.nn.Parameter(torch.zeros(2, 30, 40))
    optimizer = cases.build("GaLoreSGD", [param], projector=projector, update_proj_gap=2)
    busy = cases.gradients((2, 30, 40), 3, torch.float32)
    busy[2] = busy[2].roll((7, 7), dims=(-2, -1))  # the largest entries are elsewhere now
    busy[2][1] = 0
    cases.run(optimizer, [param], [[g] for g in busy[:2]])
    before = basis_in(optimizer, param)
    cases.run(optimizer, [param], [[busy[2]]])
    after = basis_in(optimizer, param)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("projector", sorted({*cases.projector_names()} - {*cases.basis_names()}))
def test_a_set_that_is_drawn_is_that_of_all_experts(projector: str) -> None:
    """Indices do not depend on gradients: an expert without tokens stays, the others step as ever.

    With ``on_refresh="project"`` the moments of a batch follow their common indices; they were
    taken for those of one matrix, and the step raised.
    """
    start = cases.parameter((2, 30, 40)).detach()
    options = {"projector": projector, "on_refresh": "project", "weight_decay": 0.0}
    both, one = cases.gradients((2, 30, 40), 6), cases.gradients((2, 30, 40), 6)
    for grad in one:
        grad[1] = 0
    for name in ("GaLoreAdamW", "GaLoreAdafactor"):
        want, _ = cases.train(name, start, both, **options)
        got, optimizer = cases.train(name, start, one, **options)
        assert torch.equal(got[0], want[0]) and not torch.equal(got[0], start[0])
        assert torch.equal(got[1], start[1]) and not torch.equal(want[1], start[1])
        assert optimizer.postponed_refreshes() == {}


@pytest.mark.parametrize("device", ["host", "accelerator"])
def test_matrices_that_search_for_a_basis_come_last_on_an_accelerator(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host waits for a factorisation; what others do is on its device by then, to the bit."""
    stepped: list[list[str]] = []
    step_bucket = stepping.step_bucket

    def noted(bucket: Bucket) -> None:
        stepped.append([item.name for item in bucket.items])
        step_bucket(bucket)

    monkeypatch.setattr(stepping, "step_bucket", noted)
    within = as_accelerators() if device == "accelerator" else nullcontext()
    shapes = [(6, 9), (6, 9), (9, 7), (6, 9), (9,)]

    def run(own: list[int]) -> list[Tensor]:
        params = [torch.nn.Parameter(cases.parameter(shape, seed=n).detach()) for n, shape in
                  enumerate(shapes)]  # fmt: skip
        named = [(f"w{n}", params[n]) for n in own]
        optimizer = cases.build("GaLoreAdamW", named, rank=2, update_proj_gap=4, stagger=True)
        for count in range(9):
            del stepped[:]
            for n in own:
                params[n].grad = cases.parameter(shapes[n], seed=10 * count + n).detach()
            was = {p: int(x.get("refresh_step", 0)) for p, x in optimizer.state.items()}
            optimizer.step()
            due = {
                name
                for name, p in named
                if int(optimizer.state[p].get("refresh_step", 0)) != was.get(p, 0)
            }
            seen.append((count, due, [*stepped]))
        return [params[n].detach() for n in own]

    seen: list[tuple[int, set[str], list[list[str]]]] = []
    with within:
        together = run([0, 1, 2, 3, 4])
        some = [own for own in seen if own[0] and own[1]]
        alone = [run([n])[0] for n in range(5)]
    assert len(some) >= 3
    for _, due, order in some:
        flat = [name for own in order for name in own]
        last = [{*own} <= due for own in order]
        assert sorted(flat) == [f"w{n}" for n in range(5)]
        if device == "accelerator":
            assert last == sorted(last) and any(last)
    if device == "host":
        assert len({str(order) for _, _, order in some}) == 1
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
