"""APOLLO against the straight-line oracle in float64, on the projections that were drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import ApolloAdamW, ApolloAdamW8bit, GaLoreAdamW, lowrank_groups
from lowrank_optim.engine.draws import seeded
from lowrank_optim.subspaces.base import view_for
from lowrank_optim.subspaces.random import Gaussian
from lowrank_optim.subspaces.refresh import RefreshContext
from tests import cases
from tests.cases import matrices
from tests.compare import assert_close, relative
from tests.oracles.apollo import apollo
from tests.oracles.galore import side
from tests.pairwise import paired
from tests.runs import resumed

HYPER: dict[str, Any] = {"lr": 3e-2, "scale": 3.0, "weight_decay": 0.1, **cases.RULES["adamw"]}
STEPS, GAP = 10, 3
SCALE_TYPES = ["channel", "tensor"]
COMBINATIONS = [(kind, limiter) for kind in SCALE_TYPES for limiter in (1.01, None)]


def growing(size: tuple[int, ...], count: int = STEPS) -> list[Tensor]:
    """Gradients whose norm jumps up and down, so that the limiter acts, and lets go."""
    sizes = [1.0, 5.0, 0.3, 40.0, 40.0, 1e-2, 1e-2, 3.0, 3.0, 0.5]
    grads = cases.gradients(size, count)
    return [g * sizes[i % len(sizes)] for i, g in enumerate(grads)]


def expected(
    start: Tensor, grads: list[Tensor], drawn: dict[int, list[Tensor]], proj_type: str, **own: Any
) -> Tensor:
    """The oracle's weights after each gradient, expert by expert: ``(steps, *shape)``."""
    shape = start.shape
    if start.dim() == 4:
        start, grads = start.flatten(1), [g.flatten(1) for g in grads]
    where, runs = side(matrices(start.detach())[0].shape, proj_type), []
    for i, w in enumerate(matrices(start.detach())):
        given = {s: [matrices(x)[i].double() for x in found] for s, found in drawn.items()}
        sides = {
            s: {"left": (x[0], None), "right": (None, x[0])}.get(where, (x[0], x[-1]))
            for s, x in given.items()
        }
        runs.append(apollo(w, [matrices(g)[i] for g in grads], sides, **own))
    found = [torch.stack(x) if start.dim() == 3 else x[0] for x in zip(*runs, strict=True)]
    return torch.stack([x.reshape(shape) for x in found])


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize(
    ("shape", "proj_type", "combination", "projector"),
    paired([*cases.SHAPES], cases.PROJ_TYPES, COMBINATIONS, ["random", "svd", "dct", "hadamard"]),
)
def test_method_is_the_oracle(
    shape: str, proj_type: str, combination: tuple[str, float | None], projector: str
) -> None:
    """Same weights after every one of ten steps, four projections and a resume on the way."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), growing(size)
    param = torch.nn.Parameter(start.detach().clone())
    own = {**HYPER, **dict(zip(("scale_type", "limiter"), combination, strict=True))}
    if proj_type == "full":
        own["eps"] = 1e-4  # both sides of an SVD leave a diagonal, and rounding beside it
    optimizer = build(param, proj_type=proj_type, projector=projector, **own)
    drawn, got = {}, []
    for s, grad in enumerate(grads):
        if s == 5:  # between two refreshes
            fresh = build(param, proj_type=proj_type, projector=projector, **own)
            resumed(optimizer, fresh)
            optimizer = fresh
        cases.run(optimizer, [param], [[grad]])
        got.append(param.detach().clone())
        if s % GAP == 0:
            drawn[s] = bases_of(optimizer, param)
    assert_close(torch.stack(got), expected(start, grads, drawn, proj_type, **own))


def build(param: Tensor, **options: Any) -> ApolloAdamW:
    optimizer = cases.build("ApolloAdamW", [{"params": [param], "rank": cases.RANK}], **options)
    assert isinstance(optimizer, ApolloAdamW)
    return optimizer


def bases_of(optimizer: ApolloAdamW, param: Tensor) -> list[Tensor]:
    """P of the left side, and Q of the right, as far as they are: of the stored orientation."""
    ((item,),) = [optimizer._items(group) for group in optimizer.param_groups]
    assert item.subspace is not None and item.view is not None
    found = [x.clone() for x in item.subspace.bases(optimizer.state[param], item.view)]
    return found[::-1] if item.view.flip else found


@pytest.mark.parametrize(("scale_type", "limiter"), COMBINATIONS)
@pytest.mark.parametrize("shape", ["wide", "tall", "experts"])
def test_float32_follows_the_float64_oracle(
    shape: str, scale_type: str, limiter: float | None
) -> None:
    """The kernels that float64 does not run."""
    start, grads = cases.parameter(cases.SHAPES[shape]), growing(cases.SHAPES[shape], 6)
    own = {**HYPER, "scale_type": scale_type, "limiter": limiter}
    param = nn.Parameter(start.detach().float())
    optimizer, drawn = build(param, projector="random", **own), {}
    for s, grad in enumerate(grads):
        cases.run(optimizer, [param], [[grad.float()]])
        if s % GAP == 0:
            drawn[s] = bases_of(optimizer, param)
    assert_close(param, expected(start, grads, drawn, "std", **own)[-1], torch.float32)


@pytest.mark.parametrize("rank, scale_type", [(8, "channel"), (8, "tensor"), (1, "tensor")])
@pytest.mark.parametrize("cls, dtype, state_dtype, bound", [
    (ApolloAdamW, torch.float32, "bfloat16", 1e-2),
    (ApolloAdamW8bit, torch.float32, "8bit", 5e-2),
    (ApolloAdamW, torch.bfloat16, "float32", 3e-2),
])  # fmt: skip
def test_narrow_formats_follow_the_float64_oracle(
    cls: type[ApolloAdamW],
    dtype: torch.dtype,
    state_dtype: str,
    bound: float,
    rank: int,
    scale_type: str,
) -> None:
    """What the weights have moved is within the error of the format; rank 1 is APOLLO-Mini."""
    size = (24, 640)
    start = cases.parameter(size).detach().to(dtype)
    grads = [(cases.parameter(size) + cases.parameter(size, seed=s)).detach().to(dtype)
             for s in range(2, 8)]  # fmt: skip
    own = {**HYPER, "weight_decay": 0.0, "scale_type": scale_type, "lr": 1.0}
    param = nn.Parameter(start.clone())
    optimizer = cls(
        [param], rank=rank, update_proj_gap=GAP, stagger=False, state_dtype=state_dtype, **own
    )
    drawn = {}
    for s, grad in enumerate(grads):
        cases.run(optimizer, [param], [[grad]])
        if s % GAP == 0:
            drawn[s] = bases_of(optimizer, param)
    wide = [g.double() for g in grads]
    want = expected(start.double(), wide, drawn, "std", **own)[-1] - start.double()
    assert relative(param.double() - start.double(), want) < bound
    (state,) = optimizer.state.values()
    in_codes = state_dtype == "8bit" and rank * 640 >= 4096
    assert (state["low.exp_avg"].dtype == torch.uint8) == in_codes
    assert state["residual_norm"].dtype == torch.float32


def test_maximize_is_descent_on_the_negative() -> None:
    start, grads = cases.parameter((6, 11)).detach(), growing((6, 11))
    up, _ = cases.train("ApolloAdamW", start, grads, projector="random", maximize=True, **HYPER)
    down, _ = cases.train("ApolloAdamW", start, [-g for g in grads], projector="random", **HYPER)
    assert_close(up, down)


def test_mini_is_a_step_along_the_gradient_of_the_norm_that_adam_would_take() -> None:
    """Tensor-wise: W moves along G, and for noise as far as AdamW would, times the root of r/m.

    ``|N| / |R| |G| = sqrt(r n) / |R| |G|`` at the first step, and ``|R| = |G|`` on average.
    """
    m, n, rank = 64, 4096, 16
    weight = nn.Parameter(torch.zeros(m, n))
    options: dict[str, Any] = {"rank": rank, "lr": 1.0, "weight_decay": 0.0}
    optimizer = ApolloAdamW([weight], scale_type="tensor", scale=m / rank, **options)
    weight.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = weight.detach()
    cosine = torch.cosine_similarity(moved.flatten(), weight.grad.flatten(), 0)
    assert float(cosine) == pytest.approx(-1.0, abs=1e-5)
    assert float(moved.norm()) == pytest.approx(math.sqrt(m * n), rel=0.1)  # AdamW's is of signs


# ------------------------------------------------------------------ projections


def draw(seed: int, count: int, m: int = 400, rank: int = 50) -> Tensor:
    group = {"rank": rank, "scale": 0.0, "projector": "random", "proj_type": "std"}
    view = view_for(group, (m, 500))
    assert view is not None
    grad = torch.zeros(m, 500)
    return Gaussian.from_group(group, view).find(
        grad, None, RefreshContext(view, seeded(seed, 0, count))
    )


def test_entries_are_normal_of_variance_one_over_r() -> None:
    """As in algorithm 1; so norms stay on average (Johnson and Lindenstrauss)."""
    p = draw(0, 0)
    z = torch.cat([draw(seed, 0) for seed in range(8)]) * math.sqrt(50)
    assert abs(float(z.mean())) < 0.01 and float(z.var()) == pytest.approx(1, abs=0.02)
    assert float((z**4).mean()) == pytest.approx(3, abs=0.1)  # of a normal distribution
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(1))
    ratios = (p.mT @ x).norm(dim=0) / x.norm(dim=0)
    assert float(ratios.square().mean()) == pytest.approx(1, abs=0.1)


def test_projections_are_seeded_and_drawn_anew_every_gap() -> None:
    """Another step or seed is another draw; the same step and seed the same bits."""
    assert torch.equal(draw(0, 3), draw(0, 3))
    for other in (draw(0, 6), draw(1, 3)):
        cosine = torch.cosine_similarity(draw(0, 3).flatten(), other.flatten(), 0)
        assert abs(float(cosine)) < 0.03
    param = nn.Parameter(cases.parameter((30, 40)).detach())
    optimizer, found = build(param, projector="random"), []
    for grad in cases.gradients((30, 40), 7):
        cases.run(optimizer, [param], [[grad]])
        found.append(bases_of(optimizer, param)[0])
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(found)]
    assert changes == [False, False, True, False, False, True]


def test_a_gradient_of_zero_neither_moves_nor_locks() -> None:
    """The limiter compares with the last norm that was not zero, or with none."""
    param = nn.Parameter(cases.parameter((6, 11)).detach())
    optimizer = build(param, projector="random", weight_decay=0.0)
    grad = cases.gradients((6, 11), 1)[0]
    cases.run(optimizer, [param], [[grad]])
    before = param.detach().clone()
    cases.run(optimizer, [param], [[torch.zeros_like(grad)]])
    assert torch.equal(param, before)
    cases.run(optimizer, [param], [[grad]])
    assert float((param.detach() - before).norm()) > 1e-3


# ------------------------------------------------------------------ keys

RELEASED: list[dict[str, Any]] = [
    {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128,
     "update_proj_gap": 200, "proj_type": "std"},  # APOLLO-Mini
    {"rank": 4, "proj": "random", "scale_type": "channel", "update_proj_gap": 200, "scale": 1.0,
     "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-8},  # transformers
    {"rank": 4, "proj": "svd", "proj_type": "std", "update_proj_gap": 200, "scale": 32.0,
     "scale_type": "channel", "scale_front": False},  # LLaMA-Factory
    {"rank": 4, "scale_type": "channel", "disable_nl": True},
]  # fmt: skip


@pytest.mark.parametrize("keys", RELEASED)
def test_released_groups_train_as_ours(keys: dict[str, Any]) -> None:
    grad = cases.gradients((8, 12), 1)[0]
    ours = {"projector": keys.get("proj", "random"), "scale_type": keys["scale_type"]}
    ours |= {k: keys[k] for k in ("rank", "scale", "update_proj_gap") if k in keys}
    ours["limiter"] = None if keys.get("disable_nl") else 1.01
    weights = []
    for own in (keys, ours, {**keys, "scale_front": True}):
        param = nn.Parameter(cases.parameter((8, 12)).detach())
        optimizer = ApolloAdamW([{"params": [param], **own}], lr=0.1)
        cases.run(optimizer, [param], [[grad], [3 * grad]])
        weights.append(param.detach())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("keys", RELEASED)
def test_groups_of_a_model_say_whose_they_are(keys: dict[str, Any]) -> None:
    """``lowrank_groups`` keeps the keys by which GaLoreAdamW refuses them."""
    model = nn.Sequential(nn.Linear(8, 8))
    for given in (keys, {k: v for k, v in keys.items() if k != "scale_type"}):
        ApolloAdamW(lowrank_groups(model, **given))
        named = r"' in group 0 (is|are) APOLLO's.*train with ApolloAdamW"
        with pytest.raises(ValueError, match=named):
            GaLoreAdamW(lowrank_groups(model, **given))


def test_released_names_in_the_constructor() -> None:
    """As ``optim_args`` of transformers, or ``torch.distributed``'s wrappers, pass them on."""
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = ApolloAdamW([weight], rank=1, proj="svd", disable_nl=True, scale_front=True)
    (group,) = optimizer.param_groups
    assert (group["projector"], group["limiter"]) == ("svd", None)
    assert not {"proj", "disable_nl", "scale_front"} & group.keys()
    with pytest.raises(ValueError, match="projector='svd' and its alias proj='random' differ"):
        ApolloAdamW([{"params": [weight], "rank": 1, "projector": "svd", "proj": "random"}])
    with pytest.raises(ValueError, match="'proj' in the constructor is APOLLO's"):
        GaLoreAdamW([weight], proj="random", scale=128)


def test_the_summary_has_the_root_of_scale() -> None:
    weight = nn.Parameter(torch.zeros(256, 256))
    text = str(ApolloAdamW([weight], rank=1, lr=0.01, scale=100).summary())
    assert "learning rate 0.01 (0.1 of the projected part)" in text


@pytest.mark.parametrize(("options", "message"), [
    ({"scale_type": "row"}, "scale_type must be one of 'channel', 'tensor', got 'row'"),
    ({"limiter": 0.5}, "limiter must be None or a finite number of at least 1, got 0.5"),
    ({"scale": -1.0}, "scale must be a finite number of at least 0, got -1.0"),
    ({"projector": "block", "rank": 0.5}, "projector='block' has none: take one of 'dct', "),
    ({"projector": "columns"}, "projector='columns' has none: take one of 'dct', "),
    ({"on_refresh": "project"}, "does not go with projector='random' of ApolloAdamW: .*'keep'"),
])  # fmt: skip
def test_what_no_step_could_use_is_refused(options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        ApolloAdamW([weight], **options)
    with pytest.raises(ValueError, match=message):
        ApolloAdamW([{"params": [weight], "rank": 4, **options}])
    optimizer = ApolloAdamW([{"params": [weight], "rank": 4}])
    optimizer.param_groups[0].update(options)
    weight.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not weight.detach().any()
