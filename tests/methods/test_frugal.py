"""FRUGAL on one matrix against straight-line code, and what the paper promises of each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import (
    FrugalAdamW,
    FrugalAdamW8bit,
    FrugalLion,
    FrugalSGD,
    GaLoreAdamW,
    LowRankOptimizer,
    lowrank_groups,
)
from lowrank_optim.engine.draws import seeded
from lowrank_optim.ops import dispatch, native, tiles
from lowrank_optim.subspaces import RefreshContext, entries, make_projector
from lowrank_optim.subspaces.entries import RandK, permuted
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases
from tests.compare import assert_close, assert_mostly_close
from tests.oracles.frugal import down, frugal, up
from tests.oracles.galore import side, signed
from tests.pairwise import in_turns, paired

GAP, STEPS = 3, 8
CLASSES: dict[str, tuple[type[LowRankOptimizer], dict[str, Any]]] = {
    "adamw": (FrugalAdamW, {"betas": (0.8, 0.95), "eps": 1e-8}),
    "lion": (FrugalLion, {"betas": (0.8, 0.95)}),
    "sgd": (FrugalSGD, {"momentum": 0.9}),
}
INDEX = ["rows", "columns", "randk"]
BASES = ["svd", "rsvd", "random"]


def selected(optimizer: LowRankOptimizer, param: Tensor) -> Tensor:
    """Flat positions of the state-full entries, in the order of their moments."""
    (item,) = optimizer._items(optimizer.param_groups[0])
    state, (m, n) = optimizer.state[param], param.shape
    flat = torch.arange(m * n).view(m, n)
    if isinstance(item.subspace, RandK):
        tiles = item.subspace.tiles(m, n, int(state["key"]), param)
        return torch.cat([flat[t.rows].flatten()[t.places] for t in tiles])
    index = state["index"].long()
    assert item.view is not None
    return (flat.mT if item.view.flip else flat)[index].flatten()


def svd_parts(grads: Sequence[Tensor], rank: int, proj_type: str) -> list[Any]:
    """Bases of the gradients at each refresh, signs aligned."""
    where, P, Q, parts = side(grads[0].shape, proj_type), None, None, []
    for G in grads[::GAP]:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        P = None if where == "right" else signed(U[:, :rank].clone(), P)
        Q = None if where == "left" else signed(Vh[:rank].T.clone(), Q)
        parts.append((P, Q))
    return parts


def follow(
    name: str, start: Tensor, grads: Sequence[Tensor], **options: Any
) -> tuple[list[Tensor], list[Any], LowRankOptimizer]:
    """Weights after each step, the state-full part after each refresh, and the optimizer."""
    param = nn.Parameter(start.detach().clone())
    cls, own = CLASSES[name]
    # one group that names a density is projected whatever its size
    group = {"params": [param], "density": options.pop("density", 0.3)}
    common = {"lr": 0.1, "weight_decay": 0.1, "update_proj_gap": GAP, "stagger": False}
    optimizer = cls([group], **{**common, **own, **options})
    weights, parts = [], []
    for s, grad in enumerate(grads):
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
        if s % GAP == 0:
            state = optimizer.state[param]
            if "basis" in state:
                (item,) = optimizer._items(optimizer.param_groups[0])
                assert item.view is not None
                own_basis = state["basis"].clone()
                parts.append((None, own_basis) if item.view.flip else (own_basis, None))
            else:
                parts.append(selected(optimizer, param))
    return weights, parts, optimizer


@pytest.mark.parametrize(
    ("rule", "projector", "free", "on_refresh"),
    paired([*CLASSES], [*INDEX, *BASES], ["sign", "sgd", "none"], ["reset", "keep", "project"]),
)
def test_frugal_is_the_straight_line_code(
    rule: str, projector: str, free: str, on_refresh: str
) -> None:
    """float64, three refreshes, decay and all three factors, wide and tall."""
    for shape in ((6, 11), (13, 7)):
        start, grads = cases.parameter(shape).detach(), cases.gradients(shape, STEPS)
        factors = {"free_lr_scale": 0.3, "proj_params_lr_scale": 0.7, "scale": 0.8}
        options = {**factors, "free_rule": free, "on_refresh": on_refresh, "projector": projector}
        got, parts, _ = follow(rule, start, grads, **options)
        if projector in ("svd", "rsvd"):
            parts = svd_parts(grads, round(0.3 * min(shape)), "std")
        h = {**CLASSES[rule][1], **factors}
        want = frugal(
            start, grads, parts, gap=GAP, rule=rule, lr=0.1, free=free, on_refresh=on_refresh,
            weight_decay=0.1, **h,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            # a sign of a dense residual, or of Lion, flips within rounding of zero
            assert_mostly_close(a, b, max_error_rate=0.0 if rule != "lion" else 0.02)


@pytest.mark.parametrize("proj_type", ["left", "right", "reverse_std", "full"])
@pytest.mark.parametrize("free", ["sign", "sgd"])
def test_every_side_of_a_dense_basis(proj_type: str, free: str) -> None:
    """float64 against the straight-line code.

    At a refresh the core of a two-sided projection is diagonal but for rounding, which AdamW would
    divide by an eps as small: there eps is 1e-3.
    """
    eps = 1e-3 if proj_type == "full" else 1e-8
    for shape in ((6, 11), (13, 7), (8, 8)):
        start, grads = cases.parameter(shape).detach(), cases.gradients(shape, STEPS)
        param = nn.Parameter(start.clone())
        options: dict[str, Any] = {"projector": "svd", "proj_type": proj_type, "stagger": False}
        group = {"params": [param], "rank": 3}
        optimizer = FrugalAdamW(
            [group], lr=0.1, weight_decay=0.0, free_rule=free, update_proj_gap=GAP, eps=eps,
            **options,
        )  # fmt: skip
        cases.run(optimizer, [param], [[g] for g in grads])
        parts = svd_parts(grads, 3, proj_type)
        h = {"betas": (0.9, 0.999), "eps": eps}
        want = frugal(start, grads, parts, gap=GAP, rule="adamw", lr=0.1, free=free, **h)
        assert_close(param.detach(), want[-1])


# ---------------------------------------------------------------- testable facts


@pytest.mark.parametrize("projector", INDEX)
def test_density_1_is_adamw(projector: str) -> None:
    """Until a refresh; forever with ``project``, or no refresh. After a reset it starts anew."""
    start, grads = cases.parameter((6, 11)).detach(), cases.gradients((6, 11), STEPS)
    plain = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1, betas=(0.8, 0.95), foreach=False)
    cases.run(adamw, [plain], [[g] for g in grads])
    for options in ({"on_refresh": "project"}, {"update_proj_gap": 100}):
        got, _, _ = follow("adamw", start, grads, density=1.0, projector=projector, **options)
        assert_close(got[-1], plain.detach())
    got, _, _ = follow("adamw", start, grads, density=1.0, projector=projector)
    anew = nn.Parameter(got[GAP - 1].clone())
    adamw = torch.optim.AdamW([anew], lr=0.1, weight_decay=0.1, betas=(0.8, 0.95), foreach=False)
    cases.run(adamw, [anew], [[g] for g in grads[GAP : 2 * GAP]])
    assert_close(got[2 * GAP - 1], anew.detach())


@pytest.mark.parametrize("projector", [*INDEX, *BASES, "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_0_is_the_free_rule_alone(projector: str, dtype: torch.dtype) -> None:
    """``W <- (1 - lr wd) W - lr c sign(G)`` and nothing in state but counters."""
    start = cases.parameter((6, 11), dtype).detach()
    grads = cases.gradients((6, 11), 4, dtype)
    for free, f in (("sign", torch.sign), ("sgd", lambda g: g), ("none", torch.zeros_like)):
        param = nn.Parameter(start.clone())
        group = {"params": [param], "density": 0}
        optimizer = FrugalAdamW(
            [group], lr=0.1, weight_decay=0.1, free_rule=free, free_lr_scale=0.5,
            projector=projector,
        )  # fmt: skip
        want = start.clone()
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
            want = (1 - 0.1 * 0.1) * want - 0.1 * 0.5 * f(grad)
            assert_close(param.detach(), want)
        large = [k for k, x in optimizer.state[param].items() if x.numel() > 1]
        assert not large


@pytest.mark.parametrize("projector", INDEX)
def test_the_two_parts_are_exact_and_disjoint(projector: str) -> None:
    """``up(down(G)) + rest = G`` to the bit; a selected weight that the rule leaves alone stays.

    sign(0) is 0: with the rule's factor at zero only what is outside moves, with the free factor
    at zero only what is inside.
    """
    start, (grad,) = cases.parameter((6, 11)).detach(), cases.gradients((6, 11), 1)
    grad[2, 3] = 0.0
    moved = []
    for options in ({"scale": 0.0}, {"free_lr_scale": 0.0}):
        got, (part,), _ = follow(
            "adamw", start, [grad], projector=projector, weight_decay=0.0, **options
        )
        inside = torch.zeros(66, dtype=torch.bool)
        inside[part] = True
        moved.append((got[0] != start).flatten())
        assert torch.equal(up(part, down(part, grad), grad) + grad * ~inside.view(6, 11), grad)
        want = (~inside if "scale" in options else inside) & (grad.flatten() != 0)
        assert torch.equal(moved[-1], want)
    assert not (moved[0] & moved[1]).any()


@pytest.mark.parametrize("projector", ["svd", "random"])
def test_the_rest_is_orthogonal_to_the_basis(projector: str) -> None:
    """float32: ``G - P R`` has no share in the subspace; SVD's energy is that of the tail."""
    grad = cases.gradients((16, 24), 1, torch.float32)[0]
    start = torch.zeros(16, 24)
    options = {"projector": projector, "free_rule": "sgd", "scale": 0.0, "weight_decay": 0.0}
    (got, *_), ((P, _),), _ = follow("adamw", start, [grad], lr=1.0, **options)
    rest = -got
    assert_close(P.mT @ P, torch.eye(P.shape[1]))
    assert float((P.mT @ rest).norm() / grad.norm()) < 1e-5
    if projector == "svd":
        tail = torch.linalg.svdvals(grad)[P.shape[1] :].square().sum()
        assert_close(rest.square().sum(), tail, torch.float32)


@pytest.mark.parametrize("projector", BASES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_full_rank_adds_no_noise(projector: str, proj_type: str) -> None:
    """The residual of a complete basis is rounding, 95 % of it not zero, and a sign makes it ±1.

    The release then adds ±lr noise to almost every weight.
    """
    grads = cases.gradients((6, 11), 1, torch.float32)
    start = torch.zeros(6, 11)
    if projector == "random" and proj_type != "std":
        return  # six random directions of eleven leave a true rest
    param = nn.Parameter(start.clone())
    group = {"params": [param], "density": 1.0}
    options: dict[str, Any] = {"projector": projector, "proj_type": proj_type, "scale": 0.0}
    optimizer = FrugalAdamW([group], lr=1.0, weight_decay=0.0, **options)
    cases.run(optimizer, [param], [grads])
    assert torch.equal(param.detach(), start)


@given(
    density=st.floats(0, 1),
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    projector=st.sampled_from(INDEX),
    seed=st.integers(0, 1000),
)
def test_counts(density: float, shape: tuple[int, int], projector: str, seed: int) -> None:
    """floor(density n) columns, floor(density m) rows, floor(density m n) entries, each at least
    one; unique."""
    if density == 0.0:
        density = 1.0
    (m, n), param = shape, nn.Parameter(torch.zeros(shape))
    group = {"params": [param], "density": density}
    optimizer = FrugalAdamW([group], projector=projector, seed=seed)
    param.grad = torch.ones(shape)
    optimizer.step()
    part = selected(optimizer, param)
    want = {"columns": m * max(1, int(density * n)), "rows": n * max(1, int(density * m))}
    assert len(part) == want.get(projector, max(1, int(density * m * n)))
    assert part.unique().numel() == len(part)
    assert not len(part) or (int(part.min()) >= 0 and int(part.max()) < m * n)
    assert optimizer.state[param]["low.exp_avg"].numel() == len(part)


@given(rows=st.integers(1, 40), cols=st.integers(1, 60), key=st.integers(0, 2**62))
def test_the_permutation_is_one(rows: int, cols: int, key: int) -> None:
    """Every place once, whatever the sizes."""
    places = permuted(rows * cols, rows * cols, [key], torch.device("cpu"))[0]
    assert torch.equal(places.sort().values, torch.arange(rows * cols))


@pytest.mark.parametrize("shape", [(24, 32), (2, 300), (2, 151), (13, 31)])
def test_entries_are_drawn_evenly(shape: tuple[int, int]) -> None:
    """Over 500 keys every entry, and every pair of neighbours, is drawn as chance has it.

    The statistic is chi-squared, within five deviations of its mean.
    """
    m, n = shape
    k, keys = m * n // 4, 500
    hits, pairs = torch.zeros(m * n), torch.zeros(m * n - 1)
    for key in range(keys):
        generator = seeded(key)
        drawn = torch.zeros(m * n)
        number = int(torch.randint(1, 1 << 62, (), generator=generator))
        drawn[permuted(k, m * n, [number], torch.device("cpu"))[0]] = 1
        hits += drawn
        pairs += drawn[1:] * drawn[:-1]
    for count, p in ((hits, k / (m * n)), (pairs, k * (k - 1) / (m * n * (m * n - 1)))):
        chi = float(((count - keys * p).square() / (keys * p * (1 - p))).sum())
        assert abs(chi - len(count)) < 5 * math.sqrt(4 * len(count))


def test_entries_of_a_matrix_of_many_pieces() -> None:
    """Shares of the pieces add up, entries are unique, and what stays is carried exactly."""
    m, n = 700, 1000
    view = matrix_view((m, n), "left")
    assert view is not None
    subspace = make_projector({"projector": "randk", "rank": 0.3, "proj_type": "std"}, view)
    assert isinstance(subspace, RandK) and subspace.rank == 210_000
    param = torch.zeros(m, n)
    state = subspace.init(view, param)
    flat, parts = torch.arange(m * n).view(m, n), []
    for count in range(2):
        moved = subspace.refresh_(state, param, RefreshContext(view, seeded(0, 0, count)))
        tiles = list(subspace.tiles(m, n, int(state["key"]), param))
        parts.append(torch.cat([flat[t.rows].flatten()[t.places] for t in tiles]))
    assert len(tiles) == 3 and all(p.unique().numel() == 210_000 for p in parts)
    carry = moved["low"].carry
    assert carry is not None
    old = torch.randn(210_000)
    assert torch.equal(carry(old), down(parts[1], up(parts[0], old, param)))


def test_pieces_that_a_device_takes_at_once_have_the_same_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several matrices too, whose pieces are 3 rows and the last one of fewer."""
    n, rank, keys = 7, 50, [5, 2**61 + 3, 11]
    monkeypatch.setattr(entries, "TILE", 3 * n + 2)
    for m in (1, 3, 6, 8, 20, 21, 22):
        subspace, like, flat = (
            RandK(min(rank, m * n)),
            torch.zeros(m, n),
            torch.arange(m * n).view(m, n),
        )
        want = [subspace.tiles(m, n, key, like) for key in keys]
        places = [torch.cat([flat[t.rows].flatten()[t.places] for t in own]) for own in want]
        with monkeypatch.context() as patch:
            cases.branching(patch, lambda tensor: True)
            for room in (1, 2 * 8 * 3 * n, 1 << 20):
                patch.setattr(tiles, "ACCELERATOR_TILE_ELEMENTS", room)
                found = list(subspace.tiles_of(m, n, keys, like))
                if room == 1 << 20:  # all whole pieces, and what is left
                    assert len(found) == 1 + (m > 3 and m % 3 > 0)
                for own, place in zip(zip(*found, strict=True), places, strict=True):
                    got = torch.cat([flat[t.rows].flatten()[t.places] for t in own])
                    assert torch.equal(got, place)
                    assert [t.slots.stop for t in own][-1] == subspace.rank


@pytest.mark.parametrize("projector", [*INDEX, "svd", "random", "block"])
def test_decay_and_factors(projector: str) -> None:
    """Decay is the same inside and outside, and knows nothing of ``proj_params_lr_scale``.

    Outside scales with ``free_lr_scale``, inside does not.
    """
    start, (grad,) = cases.parameter((6, 11)).detach(), cases.gradients((6, 11), 1)

    def step(**options: Any) -> Tensor:
        param = nn.Parameter(start.clone())
        other = nn.Parameter(start.clone())
        group = {"params": [param, other], "density": 0.5}
        base = {"lr": 0.1, "weight_decay": 0.0, "projector": projector, "stagger": False}
        optimizer = FrugalAdamW([group], **{**base, **options})
        cases.run(optimizer, [param, other], [[grad, grad]])
        return torch.stack([param.detach(), other.detach()]) - start

    plain = step()
    decay = -0.1 * 0.5 * start
    assert_close(step(weight_decay=0.5), plain + decay)
    assert_close(step(weight_decay=0.5, proj_params_lr_scale=0.3), 0.3 * plain + decay)
    inside = step(free_rule="none")
    assert_close(step(free_lr_scale=0.2) - inside, 0.2 * (plain - inside))


@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_embeddings_norms_and_head_are_adamw(density: float) -> None:
    """Bit for bit, at every density: by default only the linear weights are in two parts."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 12)
            self.up_proj, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
            self.lm_head = nn.Linear(16, 20, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.norm(self.up_proj(self.embed_tokens(x))))

    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    params = list(models[0].named_parameters())
    optimizer = FrugalAdamW(params, lr=0.01, density=density, projector="columns")
    adamw = torch.optim.AdamW(models[1].parameters(), lr=0.01, foreach=False)
    for step in range(6):
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = cases.gradients(p.shape, 1, torch.float32, seed=step)[0]
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for (name, p), q in zip(params, models[1].parameters(), strict=True):
        if name != "up_proj.weight":
            assert torch.equal(p, q), name
    assert "index" in optimizer.state[models[0].up_proj.weight]


def test_released_groups_work_as_they_are() -> None:
    """Keys and values of the three released families; theirs and ours may not differ."""
    weight, bias = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(8, 12))
    groups = [
        {"params": [bias], "is_proj_params": False},
        {
            "params": [weight], "is_proj_params": True, "density": 0.5, "update_gap": 7,
            "proj_side": "left", "coord_choice": "rows", "inactive_update_rule": "sgd",
            "inactive_lr_scale": 0.1, "proj_params_lr_scale": 0.3, "reset_statistics": False,
            "block_order": "descending",
        },
    ]  # fmt: skip
    optimizer = FrugalAdamW(groups, lr=0.1)
    dense, projected = optimizer.param_groups
    want = {
        "rank": 0.5, "update_proj_gap": 7, "proj_type": "left", "projector": "rows",
        "free_rule": "sgd", "free_lr_scale": 0.1, "proj_params_lr_scale": 0.3,
        "on_refresh": "keep", "block_order": "descending",
    }  # fmt: skip
    assert {k: projected[k] for k in want} == want and dense["rank"] is None
    other = FrugalAdamW(
        [
            {"params": [bias], "is_proj_params": False},
            {"params": [weight], "is_proj_params": True, "proj_type": "svd", "proj_side": "std"},
        ],
        density=0.125,
    )
    assert other.param_groups[1]["rank"] == 0.125 and other.param_groups[1]["projector"] == "svd"
    third = GaLoreAdamW([("w", weight)], rank=2, proj_type="random")
    assert (third.defaults["projector"], third.defaults["proj_type"]) == ("random", "std")
    with pytest.raises(ValueError, match=r"projector='dct' and proj_type='svd'.*differ"):
        FrugalAdamW([("w", weight)], density=0.125, proj_type="svd", projector="dct")
    with pytest.raises(ValueError, match=r"projector='dct' and proj_type='svd'.*differ"):
        FrugalAdamW([{"params": [weight], "proj_type": "svd", "projector": "dct"}])
    for bias_step in (optimizer, other):
        cases.run(bias_step, [bias, weight], [[torch.ones(8, 12)] * 2])
        assert "exp_avg" in bias_step.state[bias] and "low.exp_avg" in bias_step.state[weight]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"density must be in \[0, 1\], got 1\.5"),
        ({"density": "a"}, r"density must be in \[0, 1\], got 'a'"),
        ({"density": 0.5, "rank": 4}, "density=0.5 and rank=4 are both given"),
        ({"rank": 4}, "projector='block' takes a density .*, got rank=4"),
        ({"free_rule": "same"}, "free_rule must be one of 'sign', 'sgd', 'none', got 'same'"),
        ({"free_lr_scale": -1.0}, "free_lr_scale must be a finite number of at least 0, got -1.0"),
        (
            {"proj_params_lr_scale": -1.0},
            "proj_params_lr_scale must be a finite number of at least 0, got -1.0",
        ),
        ({"block_order": "up"}, "block_order must be one of 'random', .*, got 'up'"),
        ({"block_order": "mirror", "density": 1.0}, "an even number of active blocks, got 1 of 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrugalAdamW([nn.Parameter(torch.zeros(8, 12))], **options)


def test_a_density_of_0_or_1_is_frugals_alone() -> None:
    """For GaLore a rank of 1.0 says nothing: one direction, or all?"""
    model = nn.Linear(8, 12)
    for density in (0, 1):
        groups = lowrank_groups(model, density=density, projector="columns")
        FrugalAdamW(groups)
        with pytest.raises(ValueError, match="rank must be a positive int or a fraction"):
            GaLoreAdamW(groups)
    (group,) = [g for g in lowrank_groups(model, density=0.5) if g.get("rank")]
    assert group["rank"] == 0.5


def test_momentum_starts_at_zero() -> None:
    """Released: at the weights. w = 10, g = 1, momentum 0.9, lr 1 moved to 0 instead of 9."""
    for density, projector in ((1.0, "rows"), (1.0, "block"), (1.0, "randk")):
        param = nn.Parameter(torch.full((4, 4), 10.0))
        group = {"params": [param], "density": density}
        optimizer = FrugalSGD([group], lr=1.0, momentum=0.9, projector=projector)
        param.grad = torch.ones(4, 4)
        optimizer.step()
        assert torch.equal(param.detach(), torch.full((4, 4), 9.0))


# ---------------------------------------------------------------- formats, batches, devices


@pytest.mark.parametrize("projector", [*INDEX, "svd"])
@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
def test_maximising_is_minimising_the_negative(projector: str, free: str) -> None:
    start, grads = cases.parameter((6, 11)).detach(), cases.gradients((6, 11), STEPS)
    options = {"projector": projector, "free_rule": free}
    up_, *_ = follow("adamw", start, grads, maximize=True, **options)
    down_, *_ = follow("adamw", start, [-g for g in grads], **options)
    assert_close(up_[-1], down_[-1])


@pytest.mark.parametrize("projector", [*INDEX, "block"])
def test_experts_and_convolutions(projector: str) -> None:
    """A batch is its matrices, with the same places in each; a kernel is a flattened matrix."""
    options: dict[str, Any] = {"projector": projector, "density": 0.4, "lr": 0.1, "stagger": False}
    start, grads = cases.parameter((3, 6, 10)).detach(), cases.gradients((3, 6, 10), STEPS)

    def train(w: Tensor, gs: Sequence[Tensor]) -> Tensor:
        param = nn.Parameter(w.clone())
        optimizer = FrugalAdamW([{"params": [param], **options, "update_proj_gap": 3}])
        cases.run(optimizer, [param], [[g] for g in gs])
        return param.detach()

    batch = train(start, grads)
    for i in range(3):
        assert_close(batch[i], train(start[i], [g[i] for g in grads]))
    start, grads = cases.parameter((6, 4, 3, 3)).detach(), cases.gradients((6, 4, 3, 3), STEPS)
    flat = train(start.flatten(1), [g.flatten(1) for g in grads])
    assert_close(train(start, grads).flatten(1), flat)
    last = start.to(memory_format=torch.channels_last)
    assert_close(train(last, grads), train(start, grads))


@pytest.mark.parametrize("projector", INDEX)
@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
def test_tiles_are_the_fused_pass(projector: str, free: str, monkeypatch: Any) -> None:
    """Where no kernel takes a term it goes in tiles, of a device too: the same arithmetic."""
    start = cases.parameter((6, 11), torch.float32).detach()
    grads = cases.gradients((6, 11), STEPS, torch.float32)
    options = {"projector": projector, "free_rule": free}
    want, *_ = follow("adamw", start, grads, **options)
    monkeypatch.setattr("lowrank_optim.engine.step.FUSED", ())
    monkeypatch.setattr("lowrank_optim.subspaces.coordinate._takes", lambda term: False)
    got, *_ = follow("adamw", start, grads, **options)
    assert_close(got[-1], want[-1])
    cases.branching(monkeypatch, lambda tensor: True)
    got, *_ = follow("adamw", start, grads, lr=torch.tensor(0.1), **options)
    assert_close(got[-1], want[-1])


@pytest.mark.parametrize("projector", [*INDEX, "block"])
def test_a_bad_gradient_changes_nothing(projector: str) -> None:
    """One NaN, inside or outside the selected part, on both paths: index subspaces look at all."""
    grads = cases.gradients((6, 11), 4, torch.float32)
    for place in ((0, 0), (5, 10), (3, 4)):
        for forced in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if forced:
                    cases.branching(patch, lambda tensor: True)
                params = [nn.Parameter(cases.parameter((6, 11), torch.float32)) for _ in range(4)]
                group = {"params": params, "density": 0.25, "projector": projector}
                optimizer = FrugalAdamW([group], lr=0.1)
                for grad in grads:
                    bad = grad.clone()
                    bad[place] = float("nan") if grad is grads[2] else bad[place]
                    if projector == "block" and forced and grad is grads[2]:
                        # an active block is a dense parameter, which is not guarded there
                        active = [p for p in params if "exp_avg" in optimizer.state[p]]
                    else:
                        active = []
                    before = [p.detach().clone() for p in params]
                    for p in params:
                        p.grad = grad if any(p is a for a in active) else bad
                    optimizer.step()
                    for p, old in zip(params, before, strict=True):
                        assert bool(p.isfinite().all())
                        still = grad is grads[2] and not any(p is a for a in active)
                        assert torch.equal(p, old) == still


@pytest.mark.parametrize(("projector", "free"), in_turns([*INDEX, "block"], ("sign", "sgd")))
def test_bfloat16_weights_follow_float32_ones(projector: str, free: str) -> None:
    """With stochastic rounding small steps add up: 100 of 1e-3 on weights of 1, where half a unit
    in the last place is 4e-3."""
    options: dict[str, Any] = {"projector": projector, "density": 0.5, "update_proj_gap": 20}
    options |= {"lr": 1e-3, "weight_decay": 0.0, "stochastic_rounding": True, "free_rule": free}
    params = [nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = FrugalAdamW([{"params": params}], **options)
    grads = torch.ones(64, 96, dtype=torch.bfloat16)
    for _ in range(100):
        for p in params:
            p.grad = grads
        optimizer.step()
    for p in params:
        assert 1 - float(p.detach().double().mean()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("projector", [*INDEX, "svd", "block"])
def test_8bit_moments(projector: str) -> None:
    """Codes where a moment is large enough, and a run close to that in float32."""
    start = cases.parameter((96, 128), torch.float32).detach()
    # no decaying spectrum: squares of a millionth of their block's largest are kept as 0
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(96, 128, generator=generator) + 0.5 for _ in range(6)]
    ends = []
    for cls in (FrugalAdamW, FrugalAdamW8bit):
        params = [nn.Parameter(start.clone()) for _ in range(2)]
        group = {"params": params, "density": 0.5}
        optimizer = cls([group], lr=0.1, projector=projector, update_proj_gap=100, stagger=False)
        cases.run(optimizer, params, [[g, g] for g in grads])
        ends.append(torch.stack([p.detach() for p in params]) - start)
        kinds = {x.dtype for p in params for k, x in optimizer.state[p].items() if "exp_avg" in k}
        assert (torch.uint8 in kinds) == (cls is FrugalAdamW8bit)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 0.05


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_one_pass_takes_the_steps_of_the_phases(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across a refresh, a gradient of infinity, decay and a scale: to the bit where csrc serves."""
    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(70, 45))
        if not whole:
            monkeypatch.setattr("lowrank_optim.engine.step.FUSED", ())
        group = {"params": [param], "density": 0.3, "projector": kind, "update_proj_gap": 3}
        optimizer = FrugalAdamW([group], lr=1e-2, weight_decay=0.1)
        for step in range(7):
            param.grad = torch.randn(70, 45)
            if step == 4:
                param.grad[3, 5] = torch.inf
            optimizer.step()
        found.append(param.detach())
    if dispatch.backend(found[0]) is native:
        assert torch.equal(*found)
    assert_close(*found)
