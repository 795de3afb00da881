"""Blocks: whose turn it is, what an idle one holds, and that nothing else is disturbed."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import (
    FiraAdamW,
    FrugalAdamW,
    FrugalSGD,
    GaLoreAdamW,
    LowRankOptimizer,
    memory,
    ops,
)
from lowrank_optim.engine.draws import seeded
from lowrank_optim.ops import quant
from lowrank_optim.subspaces.block import BLOCK_ORDERS, Block
from tests import cases, runs
from tests.compare import assert_close
from tests.oracles.frugal import frugal
from tests.pairwise import in_turns, paired

GAP = 3
RELEASED = ("ascending", "descending", "mirror")


def weights(count: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Of different shapes, so that nothing can be mixed up."""
    return [nn.Parameter(cases.parameter((3 + i, 5), dtype, seed=i)) for i in range(count)]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    return [
        cases.gradients(p.shape, 1, p.dtype, seed=97 * step + i)[0] for i, p in enumerate(params)
    ]


def holders(optimizer: LowRankOptimizer, params: Sequence[Tensor]) -> set[int]:
    """Which parameters hold moments now."""
    return {i for i, p in enumerate(params) if "exp_avg" in optimizer.state[p]}


def released_schedule(order: str, n: int, k: int, switches: int) -> list[set[int]]:
    """The release's cursors, as it moves them."""
    found, start = [], n - 1 if order == "descending" else 0
    for _ in range(switches):
        if order == "ascending":
            found.append({i % n for i in range(start, start + k)})
            start += k
            if start >= n:
                start -= n
        elif order == "descending":
            found.append({i % n for i in range(start, start - k, -1)})
            start -= k
            if start < 0:
                start += n
        else:
            pairs = [i % (n // 2) for i in range(start, start + k // 2)]
            found.append(set(pairs) | {n - 1 - i for i in pairs})
            start += k // 2
            if start >= n // 2:
                start -= n // 2
    return found


@given(n=st.integers(1, 30), density=st.floats(0, 1), order=st.sampled_from(RELEASED))
def test_the_order_is_the_releases(n: int, density: float, order: str) -> None:
    """Active sets as functions of the number of switches are those of its moving cursors."""
    block = Block(1, density=density, block_order=order, count=n)
    if order == "mirror" and (block.size % 2 or n < 2):
        return
    sets = [set(block.active(c, seeded(0))) for c in range(25)]
    assert sets == released_schedule(order, n, block.size, 25)
    count = round(density * n) or (density > 0)
    assert all(len(s) == count for s in sets)


def test_how_many_are_active() -> None:
    """``round(density N)``, Python's: 0.25 of 6, 10, 14 tensors are 2, 2, 4; of 2 it is one."""
    assert [Block(1, density=0.25, count=n).size for n in (2, 6, 10, 14)] == [1, 2, 2, 4]
    assert Block(1, density=0.0, count=9).size == 0


def test_everyone_has_a_turn() -> None:
    """Once in ceil(N / k) switches where k divides N; random draws are even (chi-squared)."""
    for order in (*RELEASED, "shuffled"):
        block = Block(1, density=0.25, block_order=order, count=16)
        turns = [i for c in range(4) for i in block.active(c, seeded(block.draw(c)))]
        assert sorted(turns) == list(range(16))
    block, draws = Block(1, density=0.25, count=16), 2000
    counts = torch.zeros(16)
    for c in range(draws):
        for i in block.active(c, seeded(3, 0, c)):
            counts[i] += 1
    chi = float(((counts - draws / 4).square() / (draws * 3 / 16)).sum())
    assert abs(chi - 16) < 5 * math.sqrt(2 * 16)


@pytest.mark.parametrize(
    ("order", "free", "on_refresh"),
    paired(BLOCK_ORDERS, ["sign", "sgd", "none"], ["reset", "keep", "project"]),
)
def test_blocks_are_the_straight_line_code(order: str, free: str, on_refresh: str) -> None:
    """float64, four switches of six tensors: each is a matrix that is all or nothing."""
    params = weights(6)
    starts = [p.detach().clone() for p in params]
    factors = {"free_lr_scale": 0.3, "proj_params_lr_scale": 0.7}
    optimizer = FrugalAdamW(
        [{"params": params, "density": 0.66}], lr=0.1, weight_decay=0.1, betas=(0.8, 0.95),
        update_proj_gap=GAP, block_order=order, free_rule=free, on_refresh=on_refresh, **factors,
    )  # fmt: skip
    active, grads = [], []
    for step in range(4 * GAP):
        grads.append(gradients(params, step))
        cases.run(optimizer, params, [grads[-1]])
        assert len(holders(optimizer, params)) == 4
        active += [holders(optimizer, params)] if step % GAP == 0 else []
    for i, param in enumerate(params):
        parts = [torch.arange(param.numel() if i in now else 0) for now in active]
        want = frugal(
            starts[i], [g[i] for g in grads], parts, gap=GAP, rule="adamw", lr=0.1, free=free,
            on_refresh=on_refresh, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-8, **factors,
        )  # fmt: skip
        assert_close(param.detach(), want[-1])


def test_an_active_block_is_torch_adamw_to_the_bit() -> None:
    """Until the switch, in float32."""
    params = weights(1, torch.float32)
    other = nn.Parameter(params[0].detach().clone())
    optimizer = FrugalAdamW([{"params": params, "density": 1.0}], lr=0.1)
    adamw = torch.optim.AdamW([other], lr=0.1, foreach=False)
    for step in range(5):
        grads = gradients(params, step)
        cases.run(optimizer, params, [grads])
        cases.run(adamw, [other], [grads])
        assert torch.equal(params[0], other)


@pytest.mark.parametrize("state_dtype", ["8bit", "4bit"])
def test_an_idle_block_holds_no_scales_either(
    state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of moments in codes comes and goes together, over two switches."""
    monkeypatch.setattr(quant, "MIN_SIZE", 1)
    params = weights(4, torch.float32)
    group = {"params": params, "density": 0.5}
    optimizer = FrugalAdamW([group], update_proj_gap=1, state_dtype=state_dtype)
    whole = {f"exp_avg{square}{scale}" for square in ("", "_sq") for scale in ("", "_scale")}
    for step in range(3):
        cases.run(optimizer, params, [gradients(params, step)])
        kept = [{key for key in optimizer.state[p] if "exp_avg" in key} for p in params]
        assert sorted(map(len, kept)) == [0, 0, 4, 4]
        assert all(own == whole for own in kept if own)


def test_a_step_that_raises_as_a_block_begins_leaves_none_of_its_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are no entries of the state before, so that there is nothing to put back of them."""
    params = weights(2, torch.float32)
    group = {"params": params, "density": 0.5}
    optimizer = FrugalAdamW(
        [group], update_proj_gap=1, block_order="ascending", state_dtype="bfloat16"
    )
    cases.run(optimizer, params, [gradients(params, 0)])
    before, held = runs.entries(optimizer), holders(optimizer, params)
    starts = [p.detach().clone() for p in params]

    def fails(*_: Any) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "add_all_", fails)
        with pytest.raises(MemoryError, match="none left"):
            cases.run(optimizer, params, [gradients(params, 1)])
    (begun,) = {0, 1} - held
    assert holders(optimizer, params) <= held
    assert torch.equal(params[begun], starts[begun])
    runs.assert_same_state([runs.entries(optimizer)[begun]], [before[begun]])
    optimizer.step()
    assert holders(optimizer, params) == {begun}


def test_a_checkpoint_without_the_moments_of_an_active_block_is_refused() -> None:
    """An idle one has none; the moments of an active one would have begun again without a word."""
    params = weights(2, torch.float32)
    optimizer = FrugalAdamW([{"params": params, "density": 0.5}])
    cases.run(optimizer, params, [gradients(params, 0)])
    (active,) = holders(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        del saved["state"][active][key]
    before = runs.entries(optimizer)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(saved)
    runs.assert_same_state(runs.entries(optimizer), before)


def test_idle_blocks_hold_no_bytes() -> None:
    """Of a report before and after a switch, and the estimate of the first step, to the byte."""
    params = weights(8, torch.float32)
    model = nn.ParameterList(params)
    options: dict[str, Any] = {"density": 0.25, "block_order": "ascending", "update_proj_gap": 2}
    optimizer = FrugalAdamW([{"params": params, **options}])
    for step in range(6):
        cases.run(optimizer, params, [gradients(params, step)])
        turn = step // 2
        live = {2 * turn % 8, (2 * turn + 1) % 8}
        held = memory.report(optimizer)
        assert holders(optimizer, params) == live
        assert held.moments == sum(8 * params[i].numel() for i in live)
        assert held.other == 8 * 12 and held.basis == 0
        if step == 0:
            guess = memory.estimate(
                model, FrugalAdamW, groups=lambda m: [{"params": [*m.parameters()], **options}]
            )
            assert guess.state == held.total and guess.moments == held.moments


def test_a_parameter_without_gradient_changes_nobodys_schedule() -> None:
    """Released: the first tensor of a group without a gradient wiped all states every step.

    The first has none at all, the second now and then, the third is frozen; and a turn that is
    over frees the moments of those too.
    """
    params, twins = weights(6), weights(6)
    lacking = {0: range(100), 1: (1, 2, 3, 4), 2: range(100)}
    params[2].requires_grad_(False)
    options: dict[str, Any] = {"lr": 0.1, "block_order": "ascending", "update_proj_gap": GAP}
    optimizer = FrugalAdamW([{"params": params, "density": 0.5}], **options)
    other = FrugalAdamW([{"params": twins, "density": 0.5}], **options)
    for step in range(4 * GAP):
        grads = gradients(params, step)
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = None if step in lacking.get(i, ()) else grads[i].clone()
            q.grad = grads[i].clone()
        optimizer.step()
        other.step()
        live = {i % 6 for i in range(3 * (step // GAP), 3 * (step // GAP) + 3)}
        assert holders(other, twins) == live
        assert holders(optimizer, [p for p in params if p.requires_grad]) == {
            i - (i > 2) for i in live - {2}
        }
        for p, q in zip(params[3:], twins[3:], strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(("order", "saved"), in_turns(BLOCK_ORDERS, [1, 4, 6, 8]))
def test_resumed_is_uninterrupted(order: str, saved: int) -> None:
    """Bit for bit, from ``weights_only=True``, at a switch and between: who holds moments differs
    between the checkpoint and an optimizer of any other age."""
    options: dict[str, Any] = {"lr": 0.1, "block_order": order, "update_proj_gap": 2, "seed": 5}
    params, twins = weights(8, torch.float32), weights(8, torch.float32)
    optimizer = FrugalAdamW([{"params": params, "density": 0.5}], **options)
    for step in range(saved):
        cases.run(optimizer, params, [gradients(params, step)])
    data = runs.saved(optimizer)
    for age in (0, 1, 3):
        resumed = FrugalAdamW([{"params": twins, "density": 0.5}], **options)
        for step in range(age):
            cases.run(resumed, twins, [gradients(twins, step)])
        resumed.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    for step in range(saved, saved + 6):
        for own, who in ((optimizer, params), (resumed, twins)):
            cases.run(own, who, [gradients(who, step)])
    runs.assert_same(twins, params)
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


@pytest.mark.parametrize("order", BLOCK_ORDERS)
def test_one_by_one_is_together(order: str) -> None:
    """``step_param`` in any order of the parameters, as inside backward, is ``step``."""
    options: dict[str, Any] = {"lr": 0.1, "block_order": order, "update_proj_gap": 2}
    params, twins = weights(6), weights(6)
    together = FrugalAdamW([{"params": params, "density": 0.7}], **options)
    alone = FrugalAdamW([{"params": twins, "density": 0.7}], **options)
    for step in range(9):
        grads = gradients(params, step)
        cases.run(together, params, [grads])
        for i in torch.randperm(6, generator=seeded(step)).tolist():
            twins[i].grad = grads[i].clone()
            alone.step_param(twins[i])
        runs.assert_same(twins, params)
        assert holders(alone, twins) == holders(together, params)


def test_galore_and_momentum_take_blocks_too() -> None:
    """GaLore on blocks drops what is idle (BAdam): only decay moves it."""
    params = weights(4)
    starts = [p.detach().clone() for p in params]
    group = {"params": params, "rank": 0.5, "projector": "block", "block_order": "ascending"}
    optimizer = GaLoreAdamW([group], lr=0.1, weight_decay=0.5)
    cases.run(optimizer, params, [gradients(params, 0)])
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        decayed = torch.equal(p.detach(), start * (1 - 0.1 * 0.5))
        assert decayed == (i >= 2)
    momentum = FrugalSGD([{"params": weights(4), "density": 0.5}], momentum=0.9)
    own = momentum.param_groups[0]["params"]
    cases.run(momentum, own, [gradients(own, 0)])
    assert sum("momentum_buffer" in momentum.state[p] for p in own) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_fira_takes_blocks_too(scaling: str, dtype: torch.dtype) -> None:
    """An idle one has no coordinates, whose norms are 0 whatever the format: nothing moves it."""
    params = weights(2, dtype)
    starts = [p.detach().clone() for p in params]
    group = {"params": params, "rank": 0.5, "projector": "block", "block_order": "ascending"}
    optimizer = FiraAdamW([group], lr=0.1, weight_decay=0.0, scaling=scaling)  # type: ignore[arg-type]
    cases.run(optimizer, params, [gradients(params, 0)])
    assert not torch.equal(params[0], starts[0]) and bool(params[0].isfinite().all())
    assert torch.equal(params[1], starts[1])


def test_ranks_agree_whatever_the_global_generator() -> None:
    """Random turns come from (seed, group, switch)."""
    found = []
    for seed in (0, 0, 1):
        params = weights(12)
        group = {"params": params, "density": 0.5}
        optimizer = FrugalAdamW([group], update_proj_gap=1, seed=seed)
        torch.manual_seed(len(found))
        found.append([])
        for step in range(4):
            cases.run(optimizer, params, [gradients(params, step)])
            found[-1].append(holders(optimizer, params))
    assert found[0] == found[1] != found[2]
    assert len({frozenset(s) for s in found[0]}) > 1
