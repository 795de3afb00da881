"""Sparse Spectral Training against the paper's arithmetic, theorems and invariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, SSTAdamW8bit, memory
from lowrank_optim.engine.draws import seeded
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.factors import SAMPLING, order_of, sample, triplets
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.spectral import Spectral
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases, runs
from tests.compare import assert_close, relative
from tests.logged import Logged
from tests.oracles import sst as oracle
from tests.pairwise import in_turns, paired

F64 = torch.float64


def conditioned(shape: tuple[int, int], seed: int = 0, low: float = 1.0) -> Tensor:
    """A matrix with singular values from ``low`` to 2: no null space, so all vectors are unique."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=F64), False)
    return (u * torch.linspace(2.0, low, min(m, n), dtype=F64)) @ vh


def noisy(shape: tuple[int, ...], seed: int = 1) -> Callable[[int, Tensor], Tensor]:
    """A gradient that depends on step and weights."""

    def gradient(step: int, w: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return 0.3 * w + torch.randn(shape, generator=generator, dtype=F64)

    return gradient


def chooser(how: str, rank: int, seed: int = 0) -> Callable[[int, int, Tensor], Tensor]:
    """What the optimizer's first parameter draws; :func:`sample` has tests of its own."""

    def choose(step: int, iteration: int, s: Tensor) -> Tensor:
        noise = torch.empty(s.numel(), dtype=F64).exponential_(generator=seeded(seed, 0, step))
        return sample(how, s, rank, iteration, noise)

    return choose


def train(start: Tensor, gradient: Any, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
    """The weights after each step, and the optimizer."""
    cls = options.pop("cls", SSTAdamW)
    weight = nn.Parameter(start.clone())
    options = {"weight_decay": 0.0, "stagger": False, **options}
    optimizer = cls([{"params": [weight], "rank": options.pop("rank")}], **options)
    out = []
    for step in range(steps):
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
        out.append(weight.detach().clone())
    return out, optimizer


def compare(shape: tuple[int, int], steps: int, low: float = 1.0, **h: Any) -> None:
    """Optimizer and oracle, step by step."""
    start, gradient = conditioned(shape, low=low), noisy(shape)
    rank, k = min(h.pop("rank"), *shape), min(shape)
    sampling, per_iteration = h.pop("sampling", "mixed"), h.pop("per_iteration", 4)
    per_round, warmup = h.pop("per_round", None), h.pop("warmup", 2)
    got, _ = train(
        start, gradient, steps, rank=rank, sampling=sampling, steps_per_iteration=per_iteration,
        iterations_per_round=per_round, warmup_steps=warmup, **h,
    )  # fmt: skip
    want = oracle.sst(
        start, gradient, steps, rank=rank, per_iteration=per_iteration,
        per_round=per_round or math.ceil(k / rank), warmup=warmup,
        choose=chooser(sampling, rank), **h,
    )  # fmt: skip
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


@pytest.mark.parametrize(
    ("shape", "form", "sampling"),
    paired([(6, 11), (13, 7), (8, 8)], ["exact", "active"], [*SAMPLING]),
)
def test_oracle(shape: tuple[int, int], form: str, sampling: str) -> None:
    """30 steps: seven iterations, three rounds, decay, both forms, every way to draw."""
    compare(shape, 30, rank=3, sampling=sampling, factors=form, lr=5e-3, weight_decay=0.1)


@pytest.mark.parametrize("form", ["exact", "active"])
@pytest.mark.parametrize(
    "options",
    [
        {"enhanced": False},
        {"vector_lr_scale": 0.3, "s_lr_scale": 2.0},
        {"betas": (0.5, 0.7), "eps": 1e-3},
        {"warmup": 0, "per_iteration": 1},
        {"per_round": 1},
        {"rank": 99},
    ],
    ids=lambda o: next(iter(o)),
)
def test_oracle_options(form: str, options: dict[str, Any]) -> None:
    compare((6, 9), 17, **{"rank": 2, "factors": form, "lr": 5e-3, **options})


@pytest.mark.parametrize("form", ["exact", "active"])
@pytest.mark.parametrize("negative", ["clamp", "flip"])
def test_oracle_below_zero(form: str, negative: str) -> None:
    """Singular values that reach zero, some come back; within a round, as it has no unique end."""
    options = {"rank": 2, "per_round": 100, "per_iteration": 9, "factors": form, "lr": 0.04}
    compare((5, 8), 9 if form == "active" else 40, low=0.01, negative=negative, **options)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    rank=st.integers(1, 9),
    per_iteration=st.integers(1, 6),
    per_round=st.one_of(st.none(), st.integers(1, 4)),
    warmup=st.integers(0, 8),
    sampling=st.sampled_from(SAMPLING),
    form=st.sampled_from(["exact", "active"]),
    weight_decay=st.sampled_from([0.0, 0.5]),
)
def test_oracle_any_shape_and_schedule(
    shape: tuple[int, int],
    rank: int,
    per_iteration: int,
    per_round: int | None,
    warmup: int,
    sampling: str,
    form: str,
    weight_decay: float,
) -> None:
    compare(
        shape, 14, rank=rank, per_iteration=per_iteration, per_round=per_round, warmup=warmup,
        sampling=sampling, factors=form, weight_decay=weight_decay, lr=4e-3,
    )  # fmt: skip


# ---------------------------------------------------------------- factorisation


MATRICES: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: conditioned((6, 11), low=0.1),
    "tall": lambda: conditioned((11, 6), low=0.1),
    "zero": lambda: torch.zeros(5, 8, dtype=F64),
    "ones": lambda: torch.ones(7, 5, dtype=F64),
    "orthogonal": lambda: torch.linalg.qr(conditioned((6, 6)))[0],
    "low rank": lambda: conditioned((7, 3)) @ conditioned((3, 9), seed=4),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("fallback", [False, True])
def test_factorisation(name: str, fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is W, s sorted and not negative, rows orthonormal, null vectors included."""
    w = MATRICES[name]()
    if fallback:

        def fails(*_: Any, **__: Any) -> None:
            raise torch.linalg.LinAlgError

        monkeypatch.setattr(torch.linalg, "svd", fails)
    for dtype in (F64, torch.float32):
        u, s, v = triplets(w.to(dtype))
        x = (u.mT * s) @ v
        assert float((x - w).abs().max()) <= (1e-12 if dtype == F64 else 1e-5)
        assert bool((s >= 0).all()) and bool((s.diff() <= 0).all())
        # through the Gram matrix in float64 vectors are good to sqrt(eps) of small values
        slack = 1e-7 if fallback and name == "low rank" else 1e-12
        for rows in (u, v):
            gram = rows @ rows.mT
            error = (gram - torch.eye(len(gram), dtype=dtype)).abs().max()
            assert float(error) <= (slack if dtype == F64 else 1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_factorisation_is_a_function_of_the_matrix(name: str) -> None:
    """Signs, vectors of equal values and null vectors: those of the transposed, reordered problem.

    Another layout and another order of the arithmetic stand for another driver or device.
    """
    w = MATRICES[name]()
    u, s, v = triplets(w)
    noise = 1e-16 * w.norm() * torch.randn(w.shape, dtype=F64, generator=seeded(1))
    u2, s2, v2 = triplets(w.mT.contiguous().mT + noise)
    for a, b in ((u, u2), (s, s2), (v, v2)):
        assert float((a - b).abs().max()) <= 1e-10


def test_null_vectors_are_kept() -> None:
    """Two runs that differ by rounding agree after a factorisation of a matrix with null vectors.

    Singular values clamped to zero leave the basis of the null space to the driver, and with
    enhanced gradients that basis changes training.
    """
    u, _, v = triplets(conditioned((6, 9)))
    s = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.0], dtype=F64)
    w = (u.mT * s) @ v
    at = torch.sort(s, descending=True, stable=True).indices
    new_u, new_s, new_v = triplets(w, (u[at], v[at]))
    assert_close(new_s, s[at])
    assert_close(new_u[3:], u[[1, 3, 5]])
    assert_close(new_v[3:], v[[1, 3, 5]])


def test_an_infinite_weight_postpones(logged: Logged) -> None:
    """No factorisation: counted and reported, and taken once the weight is finite again."""
    weight = nn.Parameter(torch.full((4, 6), float("inf")))
    optimizer = SSTAdamW([{"params": [weight], "rank": 2}])
    weight.grad = torch.zeros(4, 6)
    optimizer.step()
    assert optimizer.postponed_refreshes() == {"parameter 0": 1}
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer.step()
    assert int(optimizer.state[weight]["refresh_step"]) == 1


# ---------------------------------------------------------------- drawing


@given(
    k=st.integers(1, 40),
    share=st.floats(0, 1),
    how=st.sampled_from(SAMPLING),
    iteration=st.integers(0, 9),
    zeros=st.integers(0, 40),
)
def test_draws_are_distinct(k: int, share: float, how: str, iteration: int, zeros: int) -> None:
    """r indices in [0, k), ascending, whatever the spectrum: all zero, or fewer values than r."""
    rank = max(1, round(share * k))
    s = torch.rand(k, generator=seeded(k), dtype=F64)
    s[:zeros] = 0
    noise = torch.empty(k, dtype=F64).exponential_(generator=seeded(k, iteration))
    chosen = sample(how, s, rank, iteration, noise)
    assert len(chosen) == rank == len(chosen.unique())
    assert int(chosen.min()) >= 0 and int(chosen.max()) < k
    assert torch.equal(chosen, chosen.sort().values)
    order = order_of(chosen, k)
    assert torch.equal(order.sort().values, torch.arange(k))
    if how == "multinomial":  # zero weight: only when no others are left
        assert int((s[chosen] == 0).sum()) == max(0, rank - int((s > 0).sum()))


@pytest.mark.parametrize("how", ["mixed", "multinomial", "uniform"])
def test_draws_have_the_probabilities_of_the_paper(how: str) -> None:
    """Two of five without replacement: ``p_i + sum_j p_j p_i / (1 - p_j)``, not ``2 p_i``."""
    s = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.5], dtype=F64)
    p = {"mixed": (s / s.sum() + 0.2) / 2, "multinomial": s / s.sum()}.get(
        how, torch.full((5,), 0.2, dtype=F64)
    )
    want = p + p * ((p / (1 - p)).sum() - p / (1 - p))
    count, generator, hits = 6000, seeded(3), torch.zeros(5, dtype=F64)
    for _ in range(count):
        noise = torch.empty(5, dtype=F64).exponential_(generator=generator)
        hits[sample(how, s, 2, 0, noise)] += 1
    assert float(want.sum()) == pytest.approx(2)
    assert float((hits / count - want).abs().max()) < 4 * 0.5 / count**0.5


def test_sequential_sees_every_vector_once_a_round() -> None:
    seen = torch.cat([sample("sequential", torch.ones(12), 4, i, torch.ones(12)) for i in range(3)])
    assert torch.equal(seen.sort().values, torch.arange(12))


@pytest.mark.parametrize("form", ["exact", "active"])
def test_two_ranks_draw_alike(form: str) -> None:
    """The same bits on two ranks whose global generators differ, which no draw touches."""
    results = []
    for rank in range(2):
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        options: dict[str, Any] = {"rank": 2, "steps_per_iteration": 3, "factors": form, "lr": 1e-2}
        out, _ = train(conditioned((6, 9)), noisy((6, 9)), 12, **options)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(out[-1])
    assert torch.equal(*results)
    other, _ = train(conditioned((6, 9)), noisy((6, 9)), 12, seed=5, **options)
    assert not torch.equal(other[-1], results[0])


# ---------------------------------------------------------------- one step


def spectral(w: Tensor, rank: int, **options: Any) -> tuple[Spectral, dict[str, Tensor]]:
    """A subspace and its state after a first refresh."""
    view = matrix_view(w.shape)
    assert view is not None and not view.flip
    subspace = Spectral(rank, **options)
    state = subspace.init(view, w)
    subspace.refresh_(state, w, RefreshContext(view, seeded(0), param=w))
    return subspace, state


def product(subspace: Spectral, state: dict[str, Tensor]) -> Tensor:
    u, v = subspace.in_order(state, "u"), subspace.in_order(state, "v")
    return (u.mT * state["basis_s"]) @ v


@pytest.mark.parametrize("enhanced", [True, False])
def test_gradients_are_the_chain_rule(enhanced: bool) -> None:
    w, g = conditioned((6, 9)), noisy((6, 9))(0, torch.zeros(()))
    subspace, state = spectral(w, 3, enhanced=enhanced)
    u, v = (subspace.in_order(state, side).mT for side in "uv")
    gu, gs, gv = oracle.gradients(g, u, state["basis_s"], v, enhanced)
    got = subspace.coords(state, g)
    chosen = state["basis_order"][:3].long()
    for a, b in ((got["u"], gu.mT[chosen]), (got["v"], gv.mT[chosen]), (got["s"][0], gs)):
        assert float((a - b).abs().max()) <= 1e-12


def test_projection_is_linear() -> None:
    """The mean of the ranks' coordinates is the coordinates of the mean."""
    subspace, state = spectral(conditioned((6, 9)), 3)
    a, b = (noisy((6, 9))(i, torch.zeros(())) for i in range(2))
    mean = subspace.coords(state, (a + b) / 2)
    first, second = (subspace.coords(state, x) for x in (a, b))
    for key, x in mean.items():
        assert float((x - (first[key] + second[key]) / 2).abs().max()) <= 1e-12


def step_(subspace: Spectral, state: State, update: dict[str, Tensor], lr: float) -> None:
    """A step of the factors without decay."""
    values = subspace.values([state], [update], lr, 1.0)
    sides = subspace.vectors([state], [update], lr, values, None)
    subspace.keep_([state], sides, values)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_step_descends(seed: int) -> None:
    """``<G, dW> <= 0`` for plain gradient steps while s >= 0."""
    w, g = conditioned((6, 9), low=0.05), noisy((6, 9), seed)(0, torch.zeros(()))
    subspace, state = spectral(w, 3)
    step_(subspace, state, subspace.coords(state, g), 1e-6)
    assert float((g * (product(subspace, state) - w)).sum()) < 0


@pytest.mark.parametrize("negative", ["clamp", "flip"])
def test_below_zero(negative: str) -> None:
    """Flipping a sign into u keeps the product; clamping changes it by ``|s_i|``."""
    w = conditioned((5, 8))
    for i in range(5):  # active and inactive ones
        subspace, state = spectral(w, 2, negative=negative)
        u, v = (subspace.in_order(state, side) for side in "uv")
        wanted = state["basis_s"].clone()
        wanted[i] = -0.25
        zero = {"u": torch.zeros(2, 5, dtype=F64), "v": torch.zeros(2, 8, dtype=F64)}
        moved = {**zero, "s": (state["basis_s"] - wanted)[None]}
        step_(subspace, state, moved, 1.0)
        assert bool((state["basis_s"] >= 0).all())
        change = float((product(subspace, state) - (u.mT * wanted) @ v).norm())
        assert change == pytest.approx(0.25 if negative == "clamp" else 0.0, abs=1e-12)


def test_enhanced_is_default_under_adam() -> None:
    """A constant factor per vector cancels in ``m / sqrt(v)``: equal for eps = 0 and s at rest.

    They part where singular values drift, where eps shows, and at s = 0, where the plain gradient
    of a vector is zero and the enhanced one is not.
    """
    options: dict[str, Any] = {"rank": 3, "lr": 1e-2, "steps_per_iteration": 5, "warmup_steps": 2}
    still = {**options, "s_lr_scale": 0.0, "eps": 0.0}

    def both(**own: Any) -> list[Tensor]:
        start, gradient = conditioned((6, 9)), noisy((6, 9))
        return [train(start, gradient, 12, enhanced=e, **own)[0][-1] for e in (True, False)]

    a, b = both(**still)
    assert_close(a, b)
    a, b = both(**options)
    assert relative(a, b) > 1e-6
    for enhanced in (True, False):
        subspace, state = spectral(torch.zeros(6, 9, dtype=F64), 3, enhanced=enhanced)
        got = subspace.coords(state, noisy((6, 9))(0, torch.zeros(())))
        assert bool(got["u"].any()) == enhanced


@pytest.mark.parametrize("form", ["exact", "active"])
def test_vectors_within_an_iteration(form: str) -> None:
    """Unit length after each step; those not drawn keep their bits until the next draw."""
    start, gradient = conditioned((6, 10)), noisy((6, 10))
    weight = nn.Parameter(start.clone())
    optimizer = SSTAdamW(
        [{"params": [weight], "rank": 2}], lr=0.05, steps_per_iteration=4, factors=form,
        stagger=False,
    )  # fmt: skip
    kept = None
    for step in range(12):
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
        state = optimizer.state[weight]
        for key in ("basis_u", "basis_v"):
            assert float((state[key].norm(dim=-1) - 1).abs().max()) <= 1e-14
        if form == "exact":
            now = [state[k].clone() for k in ("basis_u_rest", "basis_v_rest", "basis_order")]
            if step % 4:
                assert kept is not None
                assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
            kept = now
            (item,) = optimizer._items(optimizer.param_groups[0])
            assert isinstance(item.subspace, Spectral)
            assert_close(product(item.subspace, state), item.view.of(weight))  # type: ignore[union-attr]


def test_a_draw_leaves_the_product() -> None:
    """Vectors change places, bit for bit, and nothing else; sources say where they came from."""
    w, view = conditioned((7, 9)), matrix_view((7, 9))
    assert view is not None
    subspace, state = spectral(w, 3, iterations_per_round=10)
    before = [subspace.in_order(state, side) for side in "uv"]
    for count in range(1, 6):
        old = state["basis_u"].clone()
        moved = subspace.refresh_(state, w, RefreshContext(view, seeded(count), param=None))
        for x, side in zip(before, "uv", strict=True):
            assert torch.equal(subspace.in_order(state, side), x)
        source = moved["u"].source
        assert source is not None
        for j, i in enumerate(source.tolist()):
            assert i < 0 or torch.equal(state["basis_u"][j], old[i])


def test_active_form_is_a_low_rank_update() -> None:
    """What the triplets in use leave of W is constant, and an iteration changes W by rank 2r."""
    start, gradient, r = conditioned((10, 12)), noisy((10, 12)), 2
    weight = nn.Parameter(start.clone())
    optimizer = SSTAdamW(
        [{"params": [weight], "rank": r}], lr=0.05, steps_per_iteration=5, factors="active",
        stagger=False, weight_decay=0.0,
    )  # fmt: skip
    before, rest = start, torch.zeros(())
    for step in range(15):
        if step % 5 == 0:
            before = weight.detach().clone()
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
        state = optimizer.state[weight]
        now = weight.detach() - (state["basis_u"].mT * state["basis_s"]) @ state["basis_v"]
        if step % 5:
            assert float((now - rest).abs().max()) <= 1e-12
        rest = now
        assert int(torch.linalg.matrix_rank(weight.detach() - before, rtol=1e-9)) <= 2 * r


@pytest.mark.parametrize("form", ["exact", "active"])
def test_moments_restart_and_the_rate_warms_up(form: str) -> None:
    """After a draw: moments of one step, a rate of 1/20, 2/20, ..., 1; the group's untouched."""
    subspace = Spectral(2)
    assert [subspace.lr_factor(i) for i in (0, 1, 18, 19, 20, 500)] == [0.05, 0.1, 0.95, 1, 1, 1]
    assert Spectral(2, warmup_steps=0).lr_factor(0) == 1
    start, gradient = conditioned((6, 9)), noisy((6, 9))
    options: dict[str, Any] = {"rank": 2, "steps_per_iteration": 4, "factors": form, "lr": 1e-2}
    out, optimizer = train(start, gradient, 9, **options)
    ((_, state),) = optimizer.state.items()
    (item,) = optimizer._items(optimizer.param_groups[0])
    assert int(state["refresh_step"]) == 8
    coords = item.subspace.coords(state, gradient(8, out[-2]))
    for key in ("u", "v", "s"):  # one step after zero: v = (1 - b2) g^2; the vectors moved by then
        ratio = state[f"{key}.exp_avg_sq"] / state[f"{key}.exp_avg"].square()
        assert_close(ratio, torch.full_like(ratio, 0.001 / 0.01))
        assert state[f"{key}.exp_avg"].shape == coords[key].shape
    assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
def test_moments_may_stay(on_refresh: str) -> None:
    """``project`` carries the moments of vectors that stay; ``keep`` all, wherever they stood."""
    start, gradient = conditioned((6, 9)), noisy((6, 9))
    weight = nn.Parameter(start.clone())
    group = {"params": [weight], "rank": 4}
    optimizer = SSTAdamW(
        [group], steps_per_iteration=4, iterations_per_round=9, on_refresh=on_refresh, stagger=False
    )
    for step in range(4):
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
    state = optimizer.state[weight]
    before, order = state["u.exp_avg_sq"].clone(), state["basis_order"].clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for j, index in enumerate(state["basis_order"][:4].tolist()):
        stood = (order[:4] == index).nonzero().flatten().tolist()
        want = before[j] if on_refresh == "keep" else before[stood[0]] if stood else before[0] * 0
        assert_close(state["u.exp_avg_sq"][j], 0.999 * want)


# ---------------------------------------------------------------- state and memory


CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "active": {"factors": "active"},
    "narrow, on the host": {"factor_dtype": "bfloat16", "offload_inactive": True},
    "all of them": {"rank": 64},
    "8bit": {"cls": SSTAdamW8bit},
    "bfloat16": {"state_dtype": "bfloat16", "stochastic_rounding": True},
}


@pytest.mark.parametrize(("config", "dtype"), in_turns([*CONFIGS], (torch.float32, torch.bfloat16)))
def test_resume_in_the_middle_of_an_iteration(config: str, dtype: torch.dtype) -> None:
    """Through ``weights_only`` files, bit for bit, draws and factorisations included."""
    options = dict(CONFIGS[config])
    cls = options.pop("cls", SSTAdamW)
    options |= {"steps_per_iteration": 4, "warmup_steps": 2, "lr": 1e-2}
    rank = options.pop("rank", 3)
    params = list(runs.parameters(dtype).values())
    whole = cls([{"params": params, "rank": rank}], **options)
    runs.train(params, whole, range(6))
    copies = runs.copies(params)
    resumed = cls([{"params": copies, "rank": rank}], **options)
    resumed.load_state_dict(runs.loaded(runs.saved(whole)))
    runs.assert_same_state(runs.entries(resumed), runs.entries(whole))
    runs.train(params, whole, range(6, 16))
    runs.train(copies, resumed, range(6, 16))
    runs.assert_same(copies, params)
    runs.assert_same_state(runs.entries(resumed), runs.entries(whole))


@pytest.mark.parametrize("form", ["exact", "active"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_decay_on_the_device_widens_no_factor(
    capturable: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate in float64, as corrections of the device are; kernels take lengths as they take u."""
    found = []
    for accelerated in (False, True):
        cases.branching(monkeypatch, lambda _, own=accelerated: own)  # type: ignore[misc]
        params = [cases.parameter(shape, torch.float32) for shape in ((6, 9), (6, 9), (2, 5, 7))]
        options: dict[str, Any] = {"factors": form, "weight_decay": 0.5, "eps": 1e-3}
        options |= {"lr": torch.tensor(0.05, dtype=torch.float64)} if accelerated else {"lr": 0.05}
        options |= {"capturable": capturable and accelerated}
        optimizer = SSTAdamW([{"params": params, "rank": 3}], warmup_steps=2, **options)
        grads = [cases.gradients(p.shape, 2, torch.float32, n) for n, p in enumerate(params)]
        cases.run(optimizer, params, [*zip(*grads, strict=True)])
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


@pytest.mark.parametrize("shape", [(48, 64), (64, 40), (32, 32)])
@pytest.mark.parametrize("form", ["exact", "active"])
def test_memory_is_the_formula(shape: tuple[int, int], form: str) -> None:
    """By storage: ``k(m+n)+k + 2[r(m+n)+k]`` or ``3r(m+n)+3r`` elements, and the order of vectors.

    The estimate, made without memory, agrees to the byte.
    """
    r, (m, n) = 5, shape
    k = min(m, n)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = SSTAdamW([{"params": [weight], "rank": r}], factors=form)
    weight.grad = torch.randn(shape)
    optimizer.step()
    held = memory.report(optimizer)
    if form == "exact":
        assert held.basis == 4 * (k * (m + n) + k) + 4 * k  # and int32 places
        assert held.moments == 4 * 2 * (r * (m + n) + k)
    else:
        assert held.basis == 4 * (r * (m + n) + r)
        assert held.moments == 4 * 2 * (r * (m + n) + r)
    assert held.other == 16
    model = nn.Linear(n, m, bias=False, device="meta")
    estimate = memory.estimate(model, SSTAdamW, rank=r, factors=form)
    assert estimate.state == held.total


def test_active_state_is_059_of_adam() -> None:
    """Weights, gradient and state of 2048 x 2048 at rank 128, relative to dense AdamW."""
    model = nn.Linear(2048, 2048, bias=False, device="meta")
    active, exact, dense = (
        memory.estimate(
            model,
            SSTAdamW,
            groups=lambda m, r=r: [{"params": m.weight, "rank": r}],
            transients=False,
            **o,
        )
        for r, o in ((128, {"factors": "active"}), (128, {}), (None, {}))
    )
    assert active.peak / dense.peak == pytest.approx(0.594, abs=1e-3)
    assert exact.peak / dense.peak == pytest.approx(1.063, abs=1e-3)
    narrow = memory.estimate(model, SSTAdamW, rank=128, factor_dtype="bfloat16")
    assert narrow.basis < 0.6 * exact.basis


def test_vectors_on_the_host_are_the_same_run() -> None:
    """Offloaded or not: the same bits; narrow ones stay close and W remains what counts."""
    start, gradient = conditioned((12, 20)).float(), noisy((12, 20))
    options: dict[str, Any] = {"rank": 3, "steps_per_iteration": 3, "lr": 1e-2}

    def run(**own: Any) -> Tensor:
        return train(start, lambda t, w: gradient(t, w).float(), 20, **options, **own)[0][-1]

    want = run()
    assert torch.equal(run(offload_inactive=True), want)
    assert 0 < relative(run(factor_dtype="bfloat16"), want) < 2e-2


def test_more_vectors_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inactive vectors pass by in pieces: any size of piece gives the same weights."""
    start, gradient = conditioned((9, 12)), noisy((9, 12))
    options: dict[str, Any] = {"rank": 2, "steps_per_iteration": 3, "lr": 1e-2}
    want, _ = train(start, gradient, 8, **options)
    monkeypatch.setattr("lowrank_optim.subspaces.spectral_factors.CHUNK", 3)
    got, _ = train(start, gradient, 8, **options)
    assert_close(got[-1], want[-1])


def test_weights_are_authoritative() -> None:
    """Weights edited between steps keep the edit; the next round factors them as they are."""
    start, gradient = conditioned((6, 9)), noisy((6, 9))
    weight = nn.Parameter(start.clone())
    optimizer = SSTAdamW(
        [{"params": [weight], "rank": 6}], lr=1e-2, steps_per_iteration=2, stagger=False,
        weight_decay=0.0,
    )  # fmt: skip
    edit = conditioned((6, 9), seed=5)
    weight.grad = gradient(0, weight)
    optimizer.step()
    with torch.no_grad():
        weight.add_(edit)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert relative(weight, before) < 0.05
    before = weight.detach().clone()
    optimizer.step()
    state = optimizer.state[weight]
    assert_close((state["basis_u"].mT * state["basis_s"]) @ state["basis_v"], weight.detach())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps_per_iteration", 0), ("steps_per_iteration", 2.0), ("iterations_per_round", 0),
        ("warmup_steps", -1), ("sampling", "best"), ("factors", "some"), ("negative", "drop"),
        ("factor_dtype", "int8"), ("enhanced", "yes"), ("vector_lr_scale", -1.0),
        ("s_lr_scale", "1"),
    ],
)  # fmt: skip
def test_bad_values_raise(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        SSTAdamW([nn.Parameter(torch.zeros(4, 4))], **{key: value})


def test_experts_of_the_active_form() -> None:
    """A batch is stepped as separate matrices, which draw the same numbers."""
    start, grads = cases.parameter((3, 6, 10)).detach(), cases.gradients((3, 6, 10), 9)
    options: dict[str, Any] = {"factors": "active", "sampling": "mixed", "on_refresh": "reset"}
    batch, _ = cases.train("SSTAdamW", start, grads, **options)
    for i in range(3):
        one, _ = cases.train("SSTAdamW", start[i], [g[i] for g in grads], **options)
        assert_close(batch[i], one)
