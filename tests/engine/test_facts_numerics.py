"""Facts about the arithmetic: 9, 10, 15 to 18 and 21, with torch's conventions for 9, 10, 17."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import PROJECTORS, GaLoreAdamW
from tests import cases
from tests.compare import assert_close
from tests.pairwise import paired

SHAPE = (6, 11)
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        (name, rank)
        for name in cases.method_names()
        for rank in (3, None)
        if rank is None or name not in cases.DECAYS_FACTORS
    ],
)
def test_fact_09_decay_is_decoupled_first_and_uses_the_raw_learning_rate(
    name: str, rank: int | None
) -> None:
    """``W_with - W_without = -lr wd W_0`` after one step: no scale, no bias correction in it.

    The release decays after the update, which differs by ``lr wd dW``.
    """
    start, grads = cases.parameter(SHAPE), cases.gradients(SHAPE, 1)
    options = {"rank": rank, "lr": 0.1, "scale": 0.25}
    plain, _ = cases.train(name, start, grads, weight_decay=0.0, **options)
    decayed, _ = cases.train(name, start, grads, weight_decay=0.5, **options)
    assert_close(decayed - plain, -0.1 * 0.5 * start)


@pytest.mark.parametrize("rank", [3, None])
def test_fact_10_eps_is_added_after_bias_correction(rank: int | None) -> None:
    """Step 1 is ``lr R / (|R| + eps)``: half of lr at ``|R| = eps``.

    The release adds eps before the correction, which makes it 31.6 times larger at step 1.
    """
    eps, start = 1e-3, torch.zeros(4, 5, dtype=torch.float64)
    grad = torch.zeros_like(start)
    for i in range(3):  # already in its own singular basis
        grad[i, i] = (i + 1) * 1e-3
    options = {"rank": rank, "eps": eps, "lr": 0.1, "scale": 1.0, "weight_decay": 0.0}
    got, _ = cases.train("GaLoreAdamW", start, [grad], **options)
    assert_close(got, -0.1 * grad / (grad.abs() + eps))
    assert float(got[0, 0]) == pytest.approx(-0.05, rel=1e-6)


def snapshot(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    kept = {k: v.clone() for k, v in optimizer.state[param].items() if v.dim()}
    return {**kept, "weights": param.detach().clone()}


@pytest.mark.parametrize(
    ("shape", "step", "bad"),
    [
        (SHAPE, 3, math.nan),
        (SHAPE, 4, math.inf),
        ((3, 6, 10), 4, math.nan),
        ((3, 6, 10), 3, -math.inf),
    ],
)
@pytest.mark.parametrize(("name", "projector"), cases.params(cases.pairs()))
def test_fact_15_a_bad_gradient_changes_nothing(
    name: str, projector: str, shape: tuple[int, ...], step: int, bad: float
) -> None:
    """One NaN or Inf, at a refresh (step 3) or not (4): weights, basis and moments stay.

    The release hands it to the SVD, whose LinAlgError ends the run. A refresh that looks at the
    gradient stays due: the next good one takes it. One that does not is taken all the same.
    """
    param = torch.nn.Parameter(cases.parameter(shape).detach())
    options = {"projector": projector, "on_refresh": "keep"}
    optimizer = cases.build(name, [{"params": [param], "rank": 4}], **options)
    *grads, last = cases.gradients(shape, step + 1)
    cases.run(optimizer, [param], [[g] for g in grads])
    before = snapshot(optimizer, param)
    poisoned = last.clone()
    poisoned.view(-1)[7] = bad
    cases.run(optimizer, [param], [[poisoned]])
    after = snapshot(optimizer, param)
    waits = PROJECTORS[projector].needs_grad
    assert before.keys() == after.keys()
    kept = [k for k in before if waits or step == 4 or not k.startswith("index")]
    assert all(torch.equal(before[k], after[k]) for k in kept)
    late = waits and step == 3
    assert optimizer.postponed_refreshes() == ({"parameter 0": 1} if late else {})
    cases.run(optimizer, [param], [[last]])
    if projector != "block":  # its moments began with the first step
        assert int(optimizer.state[param]["refresh_step"]) == (4 if late else 3)
    assert not torch.equal(param, before["weights"]) and bool(param.isfinite().all())


@pytest.mark.parametrize(
    ("name", "shape", "bad"), paired(cases.method_names(), [(), (5,), SHAPE], BAD)
)
def test_fact_15_also_for_dense_parameters(name: str, shape: tuple[int, ...], bad: float) -> None:
    """A parameter without a subspace skips a bad gradient as well."""
    param = torch.nn.Parameter(cases.parameter(shape).detach())
    optimizer = cases.build(name, [{"params": [param], "rank": None}])
    *grads, last = cases.gradients(shape, 3)
    cases.run(optimizer, [param], [[g] for g in grads])
    before = snapshot(optimizer, param)
    cases.run(optimizer, [param], [[last * bad]])
    after = snapshot(optimizer, param)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("shape", [SHAPE, (3, 6, 10)])
@pytest.mark.parametrize(("name", "projector"), cases.params(cases.pairs()))
def test_fact_16_a_zero_first_gradient_does_not_freeze_the_weights(
    name: str, shape: tuple[int, ...], projector: str
) -> None:
    """LoRA's A, unused experts: the first gradient is zero, the second is not.

    The release takes coordinate axes from the zero matrix and keeps them for a whole period; a
    gradient outside those axes then moves nothing. A set drawn at random without looking is no
    worse for a zero gradient, so there the whole second gradient is given.
    """
    start, grads = cases.parameter(shape), cases.gradients(shape, 1)
    grad, looks = grads[0].clone(), PROJECTORS[projector].needs_grad
    if looks:
        grad[..., :4, :] = grad[..., :4] = 0  # nothing along the axes an SVD of zero returns
    zero = torch.zeros_like(grad)
    options = {"projector": projector, "weight_decay": 0.0, "update_proj_gap": 100, "rank": 4}
    still, _ = cases.train(name, start, [zero], **options)
    assert torch.equal(still, start)
    got, optimizer = cases.train(name, start, [zero, grad], **options)
    moved = (got - start).reshape(-1, *shape[-2:])
    assert bool((moved.norm(dim=(-2, -1)) > 1e-4).all())
    assert optimizer.postponed_refreshes() == ({"parameter 0": 1} if looks else {})


ADAMW = list(
    itertools.product(
        [torch.float32, torch.float64], [0.0, 0.01, 0.3], [False, True], [False, True]
    )
)


@pytest.mark.parametrize("dtype, weight_decay, maximize, tensor_lr", ADAMW)
def test_fact_17_a_group_without_rank_is_torch_adamw_bit_for_bit(
    dtype: torch.dtype, weight_decay: float, maximize: bool, tensor_lr: bool
) -> None:
    """``torch.optim.AdamW(foreach=False)`` for every shape, while another group has a rank."""
    shapes = [(), (7,), (5, 6), (2, 3, 4), (4, 3, 2, 2)]
    mine = [torch.nn.Parameter(cases.parameter(s, dtype).detach()) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    matrix = torch.nn.Parameter(cases.parameter(SHAPE, dtype).detach())
    lr: Any = torch.tensor(3e-3, dtype=dtype) if tensor_lr else 3e-3
    args = {"lr": lr, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": weight_decay}
    ours = GaLoreAdamW(
        [{"params": mine}, {"params": [matrix], "rank": 2}], maximize=maximize, **args
    )
    want = torch.optim.AdamW(theirs, foreach=False, maximize=maximize, **args)
    for step in range(12):
        grads = [cases.gradients(s, 1, dtype, seed=step)[0] for s in shapes]
        cases.run(want, theirs, [grads])
        cases.run(ours, [*mine, matrix], [[*grads, torch.ones_like(matrix)]])
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(ours.state[a][key], want.state[b][key])


@pytest.mark.parametrize(
    "state_dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_fact_18_the_second_moment_of_bfloat16_weights_decays(state_dtype: str) -> None:
    """From 1, with gradients of 0.01 for 800 steps: v must follow, to 0.22 but for its rounding.

    At beta2 = 0.9981 a step takes 1.9e-3 of v away, less than half a unit in the last place of
    bfloat16: rounded to nearest, v stays at 2.1 for ever. That was so for dense parameters with
    bfloat16 state, which went through torch's own single-tensor AdamW.
    """
    params = [torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [p], "rank": rank} for p, rank in zip(params, (2, None), strict=True)]
    options = {"update_proj_gap": 100_000, "state_dtype": state_dtype, "projector": "svd"}
    optimizer = GaLoreAdamW(groups, lr=1e-6, betas=(0.9, 0.9981), **options)
    for step in range(801):
        for param, key in zip(params, ("low.exp_avg_sq", "exp_avg_sq"), strict=True):
            if step < 2:
                size = 0.01 if step else 1.0  # P^T G has size and 0
                param.grad = size * torch.eye(8, dtype=torch.bfloat16)
            if step == 1:
                optimizer.state[param][key].fill_(1.0)
        optimizer.step()
    for param, key in zip(params, ("low.exp_avg_sq", "exp_avg_sq"), strict=True):
        assert float(optimizer.state[param][key].max()) < 0.5


def test_fact_21_group_keys_are_read_live() -> None:
    """Edits of ``scale`` and ``update_proj_gap`` take effect; the release froze them."""
    start, grads = cases.parameter(SHAPE), cases.gradients(SHAPE, 6)
    param = torch.nn.Parameter(start.detach().clone())
    options = {"rank": 3, "weight_decay": 0.0, "lr": 0.1}
    optimizer = cases.build("GaLoreSGD", [param], momentum=0.0, scale=1.0, **options)
    group, state = optimizer.param_groups[0], optimizer.state

    def step(grad: Tensor) -> Tensor:
        before = param.detach().clone()
        cases.run(optimizer, [param], [[grad]])
        return param.detach() - before

    first = step(grads[0])
    group["scale"] = 0.5
    assert_close(step(grads[0]), 0.5 * first)
    group["update_proj_gap"] = 2
    refreshed = []
    for grad in grads[2:]:
        step(grad)
        refreshed.append(int(state[param]["refresh_step"]))
    assert refreshed == [2, 2, 4, 4]
