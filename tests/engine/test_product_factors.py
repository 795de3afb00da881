"""Subspaces that are factors of the weight, with every rule, store and transport."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import SSTAdamW, SwitchLoRAAdamW
from lowrank_optim.groups import Group
from lowrank_optim.ops import dispatch, native
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Residual
from lowrank_optim.transports import TRANSPORTS
from tests import cases
from tests.compare import assert_mostly_close
from tests.engine.product_cases import REFUSED, RESIDUALS, RULES, hyper, residual_of
from tests.oracles.product import spectral, switched

READY, _ = native.available("cpu")
NATIVE = "native" if READY else "reference"
STEPS, LR, DECAY = 4, 0.0625, 0.125
SHAPES = [(5, 7), (6, 4), (2, 5, 7)]
OUTER: dict[str, dict[str, Any]] = {
    "SST": {"steps_per_iteration": 2, "iterations_per_round": 9, "warmup_steps": 1},
    "SwitchLoRA": {"interval": 10**6, "freeze_steps": 0},
}
"""A draw at steps 0 and 2, and no switch."""


def composed(method: str, rule: str, residual: Residual | None = None) -> type[LowRankOptimizer]:
    """The method with the direction of another rule, or with another residual."""
    base = SSTAdamW if method == "SST" else SwitchLoRAAdamW

    class Composed(base):  # type: ignore[misc, valid-type]
        rule_class = RULES[rule]

        def residual(self, group: Group) -> Residual:
            found: Residual = super().residual(group) if residual is None else residual
            return found

    return Composed


def built(method: str, rule: str, params: Any, residual: Any = None, **options: Any) -> Any:
    """Group keys of a rule that the constructor does not know come with the groups."""
    own: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "stagger": False, "rank": 2}
    own |= {**OUTER[method], **options}
    keys = hyper({"rule": rule, "eps": 1e-8})
    eps = keys.pop("eps", 1e-8)
    betas = keys.pop("betas", (0.8, 0.95))
    rank = own.pop("rank")
    groups = [{"params": params, "rank": rank, "eps": eps, **keys}]
    return composed(method, rule, residual)(groups, betas=betas, **own)


def steps(
    optimizer: Any, params: list[Tensor], grads: list[list[Tensor]], chosen: list[list[Any]]
) -> tuple[list[list[Tensor]], list[dict[str, Tensor]]]:
    """Weights after each step, and the state after a first one with a rate of zero."""
    after: list[list[Tensor]] = []
    (group,), first = optimizer.param_groups, []
    for s in range(STEPS):
        group["lr"] = LR if s else 0.0
        cases.run(optimizer, params, [[g[s] for g in grads]])
        states = [optimizer.state[p] for p in params]
        chosen.append([x["basis_order"].clone() if "basis_order" in x else None for x in states])
        if not s:
            items = optimizer._items(group)
            first = [{k: v.clone() for k, v in state.items()} for state in states]
            for item, own in zip(items, first, strict=True):
                if "basis_order" in own:
                    own["u"], own["v"] = (item.subspace.in_order(own, side) for side in "uv")
        after.append([p.detach().clone() for p in params])
    return after, first


def wanted(
    method: str, rule: str, on_refresh: str, i: int, e: int | None, scale: float,
    start: list[Tensor], grads: list[list[Tensor]], first: list[dict[str, Tensor]],
    chosen: list[list[Any]],
) -> list[Tensor]:  # fmt: skip
    """The oracle's weights of parameter ``i``, or of its expert ``e``."""
    rates = [0.0] + [LR] * (STEPS - 1)
    own = {k: (v if e is None or v.dim() < 2 else v[e]) for k, v in first[i].items()}

    def one(x: Tensor) -> Tensor:
        return (x if e is None else x[e]).double()

    keys = {"lrs": rates, "weight_decay": DECAY, **hyper({"rule": rule, "eps": 1e-8})}
    G = [one(g) for g in grads[i]]
    if method == "SwitchLoRA":
        A, B = own["basis_A"].double(), own["basis_B"].double().mT
        return switched(one(start[i]), A, B, G, rule=rule, alpha=scale, **keys)
    at = [(x[i] if e is None else x[i][e])[:2].tolist() for x in chosen]
    sigma = first[i]["basis_s"] if e is None else first[i]["basis_s"][e]
    flip = own["u"].shape[1] != start[i].shape[-2]  # a matrix is seen with its smaller side first
    W, G = one(start[i]), [g.mT if flip else g for g in G]
    out = spectral(
        W.mT if flip else W, own["u"].double(), sigma.double(), own["v"].double(), G, at,
        gap=2, rule=rule, on_refresh=on_refresh, **keys,
    )  # fmt: skip
    return [x.mT if flip else x for x in out]


CROSSED = [
    (method, rule, on_refresh, dtype)
    for method, rule, on_refresh, dtype in itertools.product(
        OUTER, RULES, TRANSPORTS, (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    # SwitchLoRA counts the steps of each row, and on_refresh means nothing to it
    if (method == "SST" or (rule != "adafactor" and on_refresh == "keep"))
    # a sign of what narrow formats round is a sign of the rounding
    and not (rule == "lion" and dtype.itemsize < 4)
]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", OUTER)
def test_every_rule_on_factors(method: str, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 weights with ``stochastic_rounding``, which bfloat16 alone has, raised in a GEMM.

    By default every other is rounded: a rule, a transport and a format each with and without.
    """
    for n, (own, rule, on_refresh, dtype) in enumerate(CROSSED):
        if own != method:
            continue
        for rounding in (False, True) if every else ((n + n // 4) % 2 == 1,):
            backend = "reference" if dtype == torch.float64 else NATIVE
            monkeypatch.setenv(dispatch.VARIABLE, backend)
            params = [torch.nn.Parameter(cases.parameter(x, dtype, i).detach() / 8)
                      for i, x in enumerate(SHAPES)]  # fmt: skip
            start = [p.detach().clone() for p in params]
            grads = [cases.gradients(x, STEPS, dtype, seed=i) for i, x in enumerate(SHAPES)]
            optimizer = built(
                method, rule, params, on_refresh=on_refresh, stochastic_rounding=rounding
            )
            chosen: list[list[Any]] = []
            after, first = steps(optimizer, params, grads, chosen)
            scale = optimizer.param_groups[0]["scale"]
            for i, shape in enumerate(SHAPES):
                for e in range(shape[0]) if len(shape) == 3 else [None]:
                    args = start, grads, first, chosen
                    want = wanted(method, rule, on_refresh, i, e, scale, *args)
                    for s in range(STEPS):
                        got = after[s][i] if e is None else after[s][i][e]
                        # one entry of 24 or 35, of a weight near zero, in narrow formats; two of 35
                        # in float16, in which factors are rounded at every step
                        rate = {torch.float16: 0.06, torch.bfloat16: 0.05}.get(dtype, 0.0)
                        assert_mostly_close(got, want[s], dtype, max_error_rate=rate)


@pytest.mark.parametrize("residual", [name for name in RESIDUALS if name != "dropped"])
@pytest.mark.parametrize("method", OUTER)
def test_no_other_residual_goes_with_factors(method: str, residual: str) -> None:
    """Nobody was asked what becomes of the rest: error feedback grew by every gradient."""
    param = torch.nn.Parameter(cases.parameter((5, 7)).detach())
    before, other = param.detach().clone(), residual_of(RESIDUALS[residual], False)
    optimizer = built(method, "adamw", [param], residual=other)
    param.grad = cases.gradients((5, 7), 1)[0]
    with pytest.raises(ValueError, match=REFUSED["factors of a weight and a residual"]):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_rows_of_their_own_age_need_a_rule_by_row() -> None:
    """Restarting a row of SwitchLoRA's moments would take Adafactor's means of all of them."""
    param = torch.nn.Parameter(cases.parameter((5, 7)).detach())
    optimizer = built("SwitchLoRA", "adafactor", [param])
    param.grad = cases.gradients((5, 7), 1)[0]
    with pytest.raises(
        ValueError, match=REFUSED["rows with steps of their own and a rule by the step"]
    ):
        optimizer.step()


def test_stochastic_rounding_rounds_the_weight_alone() -> None:
    """SST's vectors went into the product in bfloat16, though its sum was kept in float32."""
    param = torch.nn.Parameter(cases.parameter((12, 20), torch.bfloat16).detach())
    optimizer = built("SST", "adamw", [param], lr=0.5, stochastic_rounding=True, rank=4)
    (item,) = optimizer._items(optimizer.param_groups[0])

    def product() -> Tensor:
        u, v = (item.subspace.in_order(optimizer.state[param], x).double() for x in "uv")
        return (u.mT * optimizer.state[param]["basis_s"].double()) @ v

    first, second = cases.gradients((12, 20), 2, torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.0
    cases.run(optimizer, [param], [[first]])
    before, old = param.detach().double().clone(), product()
    optimizer.param_groups[0]["lr"] = 0.5
    cases.run(optimizer, [param], [[second]])
    exact = (1 - 0.5 * DECAY) * (before - old) + product()
    ulp = torch.exp2(exact.abs().log2().floor() - 7)
    assert bool(((param.detach().double() - exact).abs() <= ulp + 1e-5).all())
