"""SwitchLoRA over dense weights, against LoRA parameters with an explicit W0."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer, SwitchLoRAAdamW, SwitchLoRAAdamW8bit, memory
from lowrank_optim.subspaces import switching
from lowrank_optim.subspaces.lora import balance_, published_stds
from lowrank_optim.subspaces.switching import Schedule
from tests import cases, runs
from tests.compare import assert_close, relative
from tests.oracles import switchlora as oracle
from tests.pairwise import in_turns

SHAPE, R = (10, 14), 4
EVERY_STEP = {"interval": R, "freeze_steps": 2}  # one vector a step, as long as slots are free


def noisy(shape: tuple[int, ...], steps: int) -> Any:
    """A gradient that depends on the weights and the step."""
    noise = [cases.gradients(shape, 1, seed=t)[0] for t in range(steps)]
    return lambda w, t: 0.3 * w + noise[t]


def train(
    shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[Tensor], SwitchLoRAAdamW, Tensor]:
    """Weights after each step, the optimizer and the parameter."""
    param = nn.Parameter(cases.parameter(shape, dtype).detach())
    own = {"lr": 0.02, **EVERY_STEP}
    group = {"params": [param], "rank": R}
    optimizer = SwitchLoRAAdamW([group], **{**own, **options})
    gradient, out = noisy(shape, steps), []
    for t in range(steps):
        param.grad = gradient(param.detach().double(), t).to(dtype)
        optimizer.step()
        out.append(param.detach().clone())
    return out, optimizer, param


def first_pools(shape: tuple[int, int], **options: Any) -> tuple[Tensor, Tensor]:
    """The candidates that a run starts from."""
    _, optimizer, param = train(shape, 1, **{**options, "lr": 0.0})
    state = optimizer.state[param]
    return state["host.pool_A"], state["host.pool_B"]


def wanted(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    """Let the schedule ask for these counts; what is free decides then."""
    monkeypatch.setattr(Schedule, "count", lambda self, step, rank, generator: counts[step])


COUNTS = [1, 0, 2, 1, 0, 0, 3, 0, 0, 1] * 4


@pytest.mark.parametrize(
    ("options", "shape"),
    in_turns(
        [
            {},
            {"freeze_step_counter": False},
            {"weight_decay": 0.1},
            {"freeze_steps": 0},
            {"scale": 3.0, "freeze_steps": 1},
            {"proj_type": "reverse_std"},
            {"proj_type": "full"},
        ],
        [(10, 14), (14, 9), (8, 8)],
    ),
)
def test_dense_weights_follow_lora_parameters(
    shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W0 stays implicit for 40 steps and 36 requests to switch: the trajectory is the module's.

    The oracle holds W0, A and B, moves W0 at every switch and counts the steps of each vector.
    ``proj_type`` has no say.
    """
    wanted(monkeypatch, COUNTS)
    got, optimizer, param = train(shape, 40, **options)
    start = cases.parameter(shape).detach()
    reference = oracle.SwitchLoRA(
        start,
        *first_pools(shape, **options),
        R,
        lr=0.02,
        weight_decay=options.get("weight_decay", 0.0),
        freeze=options.get("freeze_steps", 2),
        pause=options.get("freeze_step_counter", True),
        alpha=options.get("scale", 1.0),
    )
    want = oracle.run(reference, noisy(shape, 40), COUNTS)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    state = optimizer.state[param]
    assert state["host.held"].tolist() == [reference.sel["A"], reference.sel["B"]]
    assert_close(state["basis_A"], reference.x["A"])
    assert_close(state["basis_B"], reference.x["B"])
    assert sum(COUNTS) > state["host.held"].numel()


def test_decay_of_the_weight_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``decay_on="weight"`` multiplies W, as AdamW does; on factors W is drawn to W0 instead."""
    wanted(monkeypatch, [0] * 3)
    zero = [torch.zeros(SHAPE, dtype=torch.float64)] * 3
    start = cases.parameter(SHAPE).detach()
    ends = {}
    for decay_on in ("weight", "factors"):
        param = nn.Parameter(start.clone())
        options = {"lr": 0.1, "weight_decay": 0.5, "rank": R, "decay_on": decay_on}
        optimizer = SwitchLoRAAdamW([param], **options)
        cases.run(optimizer, [param], [[g] for g in zero])
        ends[decay_on] = param.detach()
    assert_close(ends["weight"], start * 0.95**3)
    pool_a, pool_b = first_pools(SHAPE)
    held = switching.start_held(R, 10)
    product = pool_b[held[1]].mT @ pool_a[held[0]] / R
    assert_close(ends["factors"], start + product * (0.95**6 - 1))


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize("order", ["fifo", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fact_11_a_switch_leaves_the_weight_as_it_is(dtype: torch.dtype, order: str) -> None:
    """To the bit, in any dtype: 30 steps without a learning rate switch every slot many times.

    The module of the release rounds W0 at each switch: .4 % in bfloat16 after ten of them.
    """
    weights, optimizer, param = train(SHAPE, 30, dtype, lr=0.0, order=order)
    start = cases.parameter(SHAPE, dtype).detach()
    assert all(torch.equal(w, start) for w in weights)
    assert int(optimizer.state[param]["host.head"][0]) != 0 or order == "random"
    held = switching.start_held(R, 10)
    assert not torch.equal(optimizer.state[param]["host.held"], held)


@pytest.mark.parametrize("cls", [SwitchLoRAAdamW, SwitchLoRAAdamW8bit])
def test_fact_12_only_the_counterpart_starts_again(
    cls: type[SwitchLoRAAdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of b does not depend on b: its moments stay, also in 8 bits; those of a go."""
    wanted(monkeypatch, [0, 0, 0, 1, 0])
    shape = (64, 1100) if cls is SwitchLoRAAdamW8bit else SHAPE
    param = nn.Parameter(cases.parameter(shape).detach())
    optimizer = cls([param], rank=R, lr=0.02)
    grads = cases.gradients(shape, 5)
    cases.run(optimizer, [param], [[g] for g in grads[:3]])
    state = optimizer.state[param]
    before = {k: v.clone() for k, v in state.items()}
    seen: list[dict[str, Tensor]] = []
    real = type(optimizer._items(optimizer.param_groups[0])[0].subspace).coords

    def coords(self: Any, state: Any, grad: Tensor) -> dict[str, Tensor]:
        seen.append({k: v.clone() for k, v in state.items()})
        out = real(self, state, grad)
        seen.append({k: v.clone() for k, v in out.items()})
        return out

    monkeypatch.setattr("lowrank_optim.subspaces.switched.Switched.coords", coords)
    cases.run(optimizer, [param], [[grads[3]]])
    at, low = seen
    for side, other, slot in (("A", "B", 0), ("B", "A", R // 2)):
        assert not torch.equal(at[f"basis_{side}"][slot], before[f"basis_{side}"][slot])
        assert at[f"{side}.age"][slot] == 3 and at[f"{other}.age"][slot] == 0
        zero = {"exp_avg": 0, "exp_avg_sq": 0}
        if at["A.exp_avg"].dtype == torch.uint8 and side == "B":  # A is large enough for 8 bits
            zero = {"exp_avg": 127, "exp_avg_sq": 0}
        for moment, value in zero.items():
            rows = [i for i in range(R) if i != slot]
            kept = at[f"{other}.{moment}"]
            assert torch.equal(kept[rows], before[f"{other}.{moment}"][rows])
            assert bool((kept[slot] == value).all())
            scale = f"{other}.{moment}_scale"  # what is encoded anew has another where -1 was none
            assert scale not in at or torch.equal(at[scale], before[scale])
            assert before[f"{other}.{moment}"][slot].any()
    s = 1 / R
    g = grads[3]
    free_b = [i for i in range(R) if i != 0]  # B's slot 0 is frozen, A's slot 2
    free_a = [i for i in range(R) if i != R // 2]
    assert_close(low["A"][free_a], s * before["basis_B"][free_a].double() @ g)
    assert_close(low["B"][free_b], s * before["basis_A"][free_b].double() @ g.mT)
    assert not low["A"][R // 2].any() and not low["B"][0].any()


@pytest.mark.parametrize(("pause", "first"), [(True, 1.0), (False, 0.5221)])
def test_fact_13_frozen_for_exactly_five_steps(
    pause: bool, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it moves: by the learning rate, or by .5221 of it with the counter of the release."""
    wanted(monkeypatch, [0, 0, 1] + [0] * 8)
    param = nn.Parameter(cases.parameter(SHAPE).detach())
    options = {"rank": R, "lr": 1e-6, "eps": 0.0, "freeze_step_counter": pause}
    optimizer = SwitchLoRAAdamW([param], **options)
    grad, rows = cases.gradients(SHAPE, 1)[0], []
    for _ in range(11):
        param.grad = grad.clone()
        optimizer.step()
        rows.append(optimizer.state[param]["basis_B"][0].clone())
    moved = [not torch.equal(a, b) for a, b in zip(rows[1:], rows[:-1], strict=True)]
    assert moved == [True] + [False] * 5 + [True] * 4
    sizes = (rows[7] - rows[6]).abs() / 1e-6
    assert_close(sizes, torch.full_like(sizes, sizes[0].item()), torch.float32)
    assert float(sizes[0]) == pytest.approx(first, abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9), st.integers(0, 7), st.integers(0, 4), st.integers(0, 3),
    st.sampled_from(["fifo", "random"]), st.integers(0, 99),
)  # fmt: skip
def test_fact_14_invariants(
    rank: int, extra: int, freeze: int, slack: int, order: str, seed: int
) -> None:
    """Indices in use are distinct, windows keep their distance, nothing frozen is switched.

    For any rank, pool, freeze and frequency up to the highest that is allowed.
    """
    k = rank + extra
    options = {"order": order, "freeze_steps": freeze, "seed": seed, "stochastic_rounding": True}
    param = nn.Parameter(torch.zeros(max(k, 2), k + 3, dtype=torch.float64))
    group = {"params": [param], "rank": rank}
    optimizer = SwitchLoRAAdamW([group], lr=0.0, interval=max(1, 2 * freeze) + slack, **options)
    param.grad = torch.zeros_like(param)
    tags: Tensor | None = None
    for step in range(25):
        before = {k: v.clone() for k, v in optimizer.state[param].items()} if step else {}
        optimizer.step()
        state = optimizer.state[param]
        held, frozen, head = (state[f"host.{k}"] for k in ("held", "frozen", "head"))
        size = len(state["host.pool_A"])
        assert all(len(set(x)) == rank and 0 <= min(x) <= max(x) < size for x in held.tolist())
        assert int(head[1] - head[0]) % rank == (rank // 2) % rank
        assert int(frozen.max()) <= freeze and int(frozen.min()) >= 0
        if step == 0:
            tags = state["host.pool_A"].clone()
            continue
        changed = before["host.held"] != held
        thawed = (before["host.frozen"] - 1).clamp(min=0)
        assert not (changed & (thawed > 0)).any(), "switched while frozen"
        assert torch.equal(frozen, torch.where(changed.flip(0), freeze, thawed))
        assert not (changed[0] & changed[1]).any()
        if size <= rank or rank == 1:
            assert not changed.any()
        # fact 15: with no training every vector is still what it was
        assert torch.equal(state["basis_A"], tags[held[0]])


def test_fact_15_a_vector_comes_back_as_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, swapped out, and bit for bit the same when its index returns, also in bfloat16."""
    wanted(monkeypatch, [0, 0] + [1, 0, 0] * 20)
    for dtype in (torch.float64, torch.bfloat16):
        param = nn.Parameter(cases.parameter((6, 9), dtype).detach())
        optimizer = SwitchLoRAAdamW([param], rank=R, lr=0.02, freeze_steps=1)
        left: dict[int, Tensor] = {}
        returned = 0
        for grad in cases.gradients((6, 9), 40, dtype):
            state = optimizer.state.get(param, {})
            before = {k: v.clone() for k, v in state.items()}
            pool: Tensor | None = None
            param.grad = grad.clone()
            optimizer.step()
            state = optimizer.state[param]
            if not before:
                continue
            for slot in range(R):
                old, new = int(before["host.held"][0, slot]), int(state["host.held"][0, slot])
                if old == new:
                    continue
                left[old] = before["basis_A"][slot]
                pool = state["host.pool_A"]
                assert torch.equal(pool[old], left[old])
                if new in left:
                    assert torch.equal(pool[new], left[new])
                    returned += 1
        assert returned > 3


def test_fact_16_frequency() -> None:
    """The published schedules, and a stochastic rounding that keeps the expectation."""
    schedule = Schedule(interval=40, total_steps=40_000, descent_ratio=0.1)
    assert schedule.rate(3999) == pytest.approx(0.3)
    assert schedule.rate(0) == pytest.approx(0.3 ** (1 / 4000))
    assert schedule.rate(10**6) == 1e-8
    assert sum(schedule.rate(t) for t in range(40_000)) / 40 == pytest.approx(83.05, abs=0.005)
    z = Schedule(interval=40, total_steps=40_000, descent="Z")
    assert z.rate(4000) == pytest.approx(0.5) and z.rate(0) == pytest.approx(
        1 / (1 + math.exp(-10))
    )
    assert z.rate(40_000) < 1e-10
    assert Schedule().rate(10**6) == 1.0
    generator = torch.Generator().manual_seed(0)
    for rank in (3, 128):
        counts = [Schedule(interval=40).count(t, rank, generator) for t in range(20_000)]
        mean = rank / 40
        assert set(counts) == {math.floor(mean), math.ceil(mean)}
        assert sum(counts) / 20_000 == pytest.approx(mean, abs=0.015)
    param = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="interval must be at least twice freeze_steps=5, got 9"):
        SwitchLoRAAdamW([param], interval=9)
    SwitchLoRAAdamW([param], interval=10)


@pytest.mark.parametrize(("rows", "cols", "rank"), [(300, 900, 24), (900, 300, 100)])
@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_fact_17_the_first_factors(rows: int, cols: int, rank: int, alpha: float) -> None:
    """s B A has the deviation of a default linear layer, and both factors move it alike."""
    std_a, std_b = published_stds(rows, cols, rank, alpha)
    assert math.sqrt(cols) * std_a**2 == pytest.approx(math.sqrt(rows) * std_b**2)
    param = nn.Parameter(torch.zeros(rows, cols))
    optimizer = SwitchLoRAAdamW([{"params": [param], "rank": rank, "alpha": alpha}], lr=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    product = alpha / rank * state["basis_B"].mT @ state["basis_A"]
    assert float(product.std()) == pytest.approx(1 / math.sqrt(3 * cols), rel=0.05)
    assert float(state["host.pool_A"].std()) == pytest.approx(std_a, rel=0.02)
    assert float(state["host.pool_B"].std()) == pytest.approx(std_b, rel=0.02)


FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "bfloat16"}),
    "8bit": (torch.float32, {"state_dtype": "8bit"}),
    "random": (torch.float32, {"order": "random", "pool_device": "param"}),
    "restart": (torch.float32, {"restart_every": 4, "freeze_step_counter": False}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_fact_20_resume_at_every_step_is_exact(name: str) -> None:
    """While vectors are frozen, across switches and restarts: weights, factors, pools, moments.

    The formats take turns at the steps: each resumes at every third.
    """
    dtype, options = FORMATS[name]

    def new(params: list[nn.Parameter]) -> SwitchLoRAAdamW:
        return SwitchLoRAAdamW(params, lr=0.05, rank=3, interval=4, freeze_steps=2, **options)

    whole = [*runs.parameters(dtype).values(), nn.Parameter(torch.zeros(40, 120, dtype=dtype))]
    optimizer = new(whole)
    points = []
    for step in range(9):
        points.append((runs.saved(optimizer), runs.copies(whole)))
        runs.train(whole, optimizer, [step])
    frozen = optimizer.state[whole[0]]["host.frozen"]
    assert int(frozen.max()) == 2
    for step in range([*FORMATS].index(name) % 3, 9, 3):
        data, params = points[step]
        resumed = new(params)
        resumed.load_state_dict(runs.loaded(data))
        torch.randn(step + 1)
        runs.train(params, resumed, range(step, 9))
        runs.assert_same(params, whole)
        runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def test_every_rank_chooses_alike() -> None:
    """Whatever the global generator has been used for: the same switches, factors and weights.

    The release draws from a global generator, and replicas of different histories part silently.
    """
    ranks = []
    for rank in range(2):
        torch.manual_seed(rank)
        params = list(runs.parameters().values())
        options = {"lr": 0.05, "rank": 3, "interval": 7, "freeze_steps": 1, "order": "random"}
        optimizer = SwitchLoRAAdamW(params, **options)
        for step in range(12):
            torch.randn(rank * 100 + 1)
            runs.train(params, optimizer, [step])
        ranks.append((params, runs.entries(optimizer)))
    (first, state), (second, other) = ranks
    runs.assert_same(first, second)
    runs.assert_same_state(state, other)


def test_fact_09_ranks_may_reduce_the_small_gradients() -> None:
    """The mean of the projected gradients is the projection of the mean."""
    _, optimizer, param = train(SHAPE, 3)
    space = optimizer._items(optimizer.param_groups[0])[0].subspace
    assert space is not None
    grads = cases.gradients(SHAPE, 4)
    state = optimizer.state[param]
    item = optimizer._items(optimizer.param_groups[0])[0]
    assert item.view is not None
    each = [space.coords(state, item.view.of(g)) for g in grads]
    mean = space.coords(state, item.view.of(sum(grads) / 4))
    for side in ("A", "B"):
        assert_close(sum(x[side] for x in each) / 4, mean[side])


def test_fact_21_and_23_without_switches_it_is_lora_under_adamw() -> None:
    """A rank of min(m, n) leaves no candidate: ``torch.optim.AdamW`` on two factors."""
    shape = (4, 9)
    got, optimizer, param = train(shape, 12, weight_decay=0.1)
    state = optimizer.state[param]
    assert state["A.age"].shape == state["B.age"].shape == (R,)
    assert state["A.age"].dtype == torch.float32 and state["A.age"].unique().tolist() == [12]
    pool_a, pool_b = first_pools(shape)
    held = switching.start_held(R, 4)
    assert torch.equal(state["host.held"], held)
    a, b = nn.Parameter(pool_a[held[0]].clone()), nn.Parameter(pool_b[held[1]].mT.clone())
    w0 = cases.parameter(shape).detach() - (b @ a).detach() / R
    adamw = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0.1)
    gradient = noisy(shape, 12)
    for t, weight in enumerate(got):
        w = w0 + b @ a / R
        adamw.zero_grad()
        w.backward(gradient(w.detach(), t))
        adamw.step()
        assert_close(weight, w0 + b @ a / R)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_fact_22_refactorisation_is_exact_and_balanced(batch: tuple[int, ...]) -> None:
    """B A stays and B^T B = A A^T, also of a product of lower rank."""
    for r, rank in ((4, 4), (5, 2)):
        a = cases.parameter((*batch, r, 12), seed=1).detach()
        b = cases.parameter((*batch, r, 7), seed=2).detach() * 30
        a[..., rank:, :] = a[..., :1, :]
        product = b.mT @ a
        balance_(a, b)
        assert_close(b.mT @ a, product)
        assert_close(b @ b.mT, a @ a.mT)
        assert relative(a @ a.mT, torch.diag_embed((a @ a.mT).diagonal(dim1=-2, dim2=-1))) < 1e-10


def test_restarts_refactorise_and_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """W stays; moments, ages and frozen counters start again; in between nothing differs."""
    wanted(monkeypatch, [1, 0] * 10)
    plain, _, _ = train(SHAPE, 8)
    restarted, optimizer, param = train(SHAPE, 8, restart_every=6)
    assert all(torch.equal(a, b) for a, b in zip(plain[:6], restarted[:6], strict=True))
    assert not torch.equal(plain[6], restarted[6])
    state = optimizer.state[param]
    live = state["host.frozen"] == 0
    assert state["A.age"][live[0]].unique().tolist() == [2]
    _, optimizer, param = train(SHAPE, 6, restart_every=6)
    state, before = optimizer.state[param], param.detach().clone()
    product = state["basis_B"].mT @ state["basis_A"]
    wanted(monkeypatch, [0] * 10)
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert_close(state["basis_B"].mT @ state["basis_A"], product)
    assert_close(state["basis_B"] @ state["basis_B"].mT, state["basis_A"] @ state["basis_A"].mT)
    assert not state["A.exp_avg"].any() and not state["B.exp_avg_sq"].any()


# ---------------------------------------------------------------- the rest of the contract


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [SHAPE, (3, 6, 10)])
def test_a_bad_gradient_moves_nothing(bad: float, shape: tuple[int, ...]) -> None:
    """Weights stay to the bit and moments live on; switches go on, as on any step."""
    _, optimizer, param = train(shape, 4, lr=0.05)
    before = param.detach().clone()
    param.grad = torch.full_like(param, 0.1)
    param.grad.view(-1)[7] = bad
    optimizer.step()
    assert torch.equal(param, before)
    state = optimizer.state[param]
    assert all(bool(v.isfinite().all()) for v in state.values() if v.is_floating_point())
    cases.run(optimizer, [param], [[g] for g in cases.gradients(shape, 2)])
    assert not torch.equal(param, before) and bool(param.isfinite().all())


def test_a_weight_stored_in_out_is_its_transpose() -> None:
    """``fan_in_fan_out`` says which side is the input: A and the published deviations follow."""
    start, grads = cases.parameter((12, 7)).detach(), cases.gradients((12, 7), 12)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.mT.clone())
    options = {"rank": R, "lr": 0.05, **EVERY_STEP}
    first = SwitchLoRAAdamW([plain], **options)
    second = SwitchLoRAAdamW([turned], fan_in_fan_out=True, **options)
    cases.run(first, [plain], [[g] for g in grads])
    cases.run(second, [turned], [[g.mT] for g in grads])
    assert_close(turned.mT, plain)
    assert first.state[plain]["basis_A"].shape == (R, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [SwitchLoRAAdamW, SwitchLoRAAdamW8bit])
@pytest.mark.parametrize("pool_device", ["cpu", "param"])
def test_memory_is_the_formula(
    cls: type[SwitchLoRAAdamW], dtype: torch.dtype, pool_device: str
) -> None:
    """Device: factors r(m+n), moments 2r(m+n), row steps 2r. Host: k(m+n), and 4r + 2 counters."""
    m, n, r = 64, 2048, 16
    model = nn.Linear(n, m, bias=False, dtype=dtype)
    optimizer = cls(model.parameters(), rank=r, pool_device=pool_device)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    held = memory.report(optimizer)
    estimate = memory.estimate(model, cls, rank=r, pool_device=pool_device, transients=False)
    assert (estimate.basis, estimate.moments, estimate.other) == held
    pool, counters = 4 * m * (m + n), 8 * (4 * r + 2)
    moments = 2 * 4 * r * (m + n)
    if cls is SwitchLoRAAdamW8bit:  # B's moments have fewer than 4096 elements
        moments = 2 * (r * n + 4 * r * n // 256 + 4 * r * m)
    assert held.basis == 4 * r * (m + n)
    on_host = pool_device == "cpu"
    if on_host:
        assert held.moments == moments + 2 * 4 * r
        assert held.other == pool + counters + 12
    assert held.total == held.basis + moments + 8 * r + pool + counters + 12
    assert memory.host_bytes(optimizer) == estimate.host == counters + (pool if on_host else 0)
    assert estimate.peak == estimate.weights + estimate.gradients + held.total - estimate.host


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be a positive int, got 0"),
        ({"freeze_steps": -1}, "freeze_steps must be an int of at least 0, got -1"),
        ({"total_steps": 0}, "total_steps must be None or a positive int, got 0"),
        ({"restart_every": 2.5}, "restart_every must be None or a positive int, got 2.5"),
        ({"descent_ratio": 0.0}, r"descent_ratio must be a number in \(0, 1\], got 0.0"),
        ({"descent": "linear"}, "descent must be one of 'exponential', 'Z', got 'linear'"),
        ({"order": "lifo"}, "order must be one of 'fifo', 'random', got 'lifo'"),
        ({"pool_device": "disk"}, "pool_device must be one of"),
        ({"decay_on": "bias"}, "decay_on must be one of"),
        ({"freeze_step_counter": 1}, "freeze_step_counter must be True or False, got 1"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ],
    ids=str,
)
def test_errors_at_construction(options: dict[str, Any], message: str) -> None:
    param = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        SwitchLoRAAdamW([param], rank=2, **options)
    with pytest.raises(ValueError, match=message):
        SwitchLoRAAdamW([{"params": [param], "rank": 2, **options}])


def test_released_names() -> None:
    """Options of the release, in a group, mean ours."""
    param = nn.Parameter(torch.zeros(8, 8))
    released = {"lora_alpha": 2.0, "switch_lora_interval": 30, "switch_lora_descent_rate": 0.2}
    released |= {"switch_descend_type": "Z", "adam_warm_step": 3}
    (group,) = SwitchLoRAAdamW([{"params": [param], "rank": 2, **released}]).param_groups
    ours = {"scale": 2.0, "interval": 30, "descent_ratio": 0.2, "descent": "Z", "freeze_steps": 3}
    assert {k: group[k] for k in ours} == ours


def test_a_state_waits_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools in host memory are written by the device of each weight, current or not."""
    optimizer = SwitchLoRAAdamW([nn.Parameter(torch.randn(8, 6))], rank=2)
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(LowRankOptimizer, "state_dict", lambda self: {})
    weights = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1, 1)]
    optimizer.param_groups = [{"params": weights}]
    optimizer.state_dict()
    assert sorted(map(str, waited)) == ["cuda:0", "cuda:1"]
