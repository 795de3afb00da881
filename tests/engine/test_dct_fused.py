"""DCT-AdamW where kernels take a tile from gradient to weights: the oracle, resumption, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import DCTAdamW, DCTAdamW8bit, GaLoreAdamW, attach_in_backward
from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.fused import FusedCosines
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import native
from tests import cases, runs
from tests.compare import TOLERANCES, relative
from tests.ops.ops_cases import strided
from tests.oracles.dct_adamw import dct_adamw

AVAILABLE, REASON = native.available("cpu")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-4}


def stepped(
    start: Tensor, grads: list[Tensor], how: str = "rows", **options: Any
) -> tuple[Tensor, DCTAdamW, int]:
    """Weights, optimizer, and how many of its steps the kernels took."""
    weight = torch.nn.Parameter(strided(start.clone(), how))
    group = {"params": [weight], "rank": options.pop("rank", 4), "transform": "fft"}
    cls = options.pop("cls", DCTAdamW)
    optimizer = cls([group], **{"stagger": False, **HYPER, **options})
    fused = 0
    for grad in grads:
        weight.grad = strided(grad, how)
        if optimizer.state:
            (item,) = optimizer._items(optimizer.param_groups[0])
            chosen = optimizer._strategies(optimizer.param_groups[0])
            lr = optimizer.param_groups[0]["lr"]
            state = optimizer.state[weight]
            fused += FusedCosines().can_step(Bucket([item], [state], chosen, lr, 0.0, Undo()))
        optimizer.step()
    return weight.detach(), optimizer, fused


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    m=st.integers(2, 70),
    n=st.integers(2, 200),
    rank=st.integers(1, 40),
    gap=st.integers(1, 4),
    basis=st.sampled_from(["dct2", "dct3"]),
    ranking=st.sampled_from([1, 2]),
    side=st.sampled_from(["left", "right"]),
    how=st.sampled_from(["rows", "columns", "slice"]),
    own_age=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.filterwarnings("ignore:rank")
def test_the_oracle_in_float64(
    m: int, n: int, rank: int, gap: int, basis: str, ranking: int, side: str, how: str,
    own_age: bool, seed: int,
) -> None:  # fmt: skip
    """Any length and side, tiles and tails, any strides: float32 kernels beside float64 lines."""
    start, grads = cases.parameter((m, n)).detach(), cases.gradients((m, n), 5, seed=seed)
    want, _ = dct_adamw(start, grads, rank=rank, gap=gap, basis=basis, ranking=ranking, side=side,
                        own_age=own_age, **HYPER)  # fmt: skip
    got, _, fused = stepped(
        start.float(), [g.float() for g in grads], how, rank=rank, update_proj_gap=gap,
        basis=basis, ranking=f"l{ranking}", proj_type=side, slot_bias_correction=own_age,
    )  # fmt: skip
    assert fused == (4 if native.takes_length(m if side == "left" else n) else 0)
    # a coefficient near zero over the root of its square: rounding of the largest, over eps
    assert float((got - want[-1]).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_refresh", ["project", "keep", "reset"])
def test_kernels_are_the_phases(
    dtype: torch.dtype, on_refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run through torch's FFT and separate ops; a weight's every transport."""
    start = cases.parameter((24, 130), dtype).detach()
    grads = cases.gradients((24, 130), 9, dtype)
    ends = []
    for backend in ("native", "reference"):
        monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
        own = {"update_proj_gap": 2, "on_refresh": on_refresh}
        end, optimizer, fused = stepped(start, grads, **own)
        assert fused == (8 if backend == "native" else 0)
        ends.append([end, *optimizer.state_dict()["state"][0].values()])
    for a, b in zip(*ends, strict=True):
        # by norm: where v is small, rounding of the largest coefficient is a larger part of one
        limit = TOLERANCES[dtype].rtol
        assert relative(a, b) < limit if a.is_floating_point() and bool(b.any()) else a.equal(b)


@pytest.mark.parametrize("cls", [DCTAdamW, DCTAdamW8bit])
def test_resumed_is_uninterrupted(cls: type[DCTAdamW]) -> None:
    """Bit for bit, saved at every step of two gaps, moments in 8 bits too."""
    start, grads = cases.parameter((12, 600), torch.float32).detach(), []
    grads = cases.gradients((12, 600), 8, torch.float32)
    whole, optimizer, _ = stepped(start, grads, cls=cls, update_proj_gap=3)
    for cut in range(1, 8):
        weight, first, _ = stepped(start, grads[:cut], cls=cls, update_proj_gap=3)
        again = torch.nn.Parameter(weight.clone())
        group = {"params": [again], "rank": 4, "transform": "fft"}
        second = cls([group], **{"stagger": False, **HYPER, "update_proj_gap": 3})
        second.load_state_dict(first.state_dict())
        for grad in grads[cut:]:
            again.grad = grad
            second.step()
        assert torch.equal(again, whole)
        runs.assert_same_state(runs.entries(second), runs.entries(optimizer))


def test_a_gradient_that_is_not_a_number_changes_nothing() -> None:
    """Nor one entry of it, on a step that would choose anew and on one that would not."""
    for gap in (1, 100):
        start, grads = cases.parameter((20, 50), torch.float32).detach(), []
        grads = cases.gradients((20, 50), 3, torch.float32)
        weight, optimizer, _ = stepped(start, grads, update_proj_gap=gap)
        (param,) = optimizer.param_groups[0]["params"]
        before = {k: v.clone() for k, v in optimizer.state[param].items()}
        param.grad = grads[0].clone()
        param.grad[7, 33] = torch.inf
        optimizer.step()
        assert torch.equal(param, weight)
        for key, value in optimizer.state[param].items():
            if key not in ("step", "postponed"):
                assert torch.equal(value, before[key]), key
        assert int(optimizer.state[param]["postponed"]) == (gap == 1)


def test_a_bucket_of_which_one_is_bad() -> None:
    """Matrices of one shape go through one call; each is stepped as if alone."""
    starts = [cases.parameter((18, 40), torch.float32).detach() + i for i in range(3)]
    grads = [cases.gradients((18, 40), 4, torch.float32, seed=i) for i in range(3)]
    grads[1][2] = torch.full_like(grads[1][2], torch.nan)
    weights = [torch.nn.Parameter(s.clone()) for s in starts]
    group = {"params": weights, "rank": 5, "transform": "fft", "update_proj_gap": 2}
    optimizer = DCTAdamW([group], **HYPER, stagger=False)
    for step in range(4):
        for weight, own in zip(weights, grads, strict=True):
            weight.grad = own[step]
        optimizer.step()
    for weight, start, own in zip(weights, starts, grads, strict=True):
        assert torch.equal(weight, stepped(start, own, rank=5, update_proj_gap=2)[0])


def test_inside_backward_is_a_step() -> None:
    """Bitwise: one matrix at a time is a bucket of one."""
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(24, 24, bias=False) for _ in range(3)))
        group = {"params": list(model.parameters()), "rank": 6, "transform": "fft"}
        optimizer = DCTAdamW([group], **HYPER)
        if inside:
            attach_in_backward(optimizer, "step")
        for n in range(4):
            model(torch.arange(48.0).sin().view(2, 24) + n).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    runs.assert_same(*ends)


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_a_fused_step_is_its_parts_to_the_bit(how: str) -> None:
    """Coefficients, a direction of float32 moments, a lift: the arithmetic is the same."""
    found = []
    start = cases.parameter((36, 200), torch.float32).detach()
    grads = cases.gradients((36, 200), 5, torch.float32)
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr("lowrank_optim.engine.step.FUSED", ())
            end, optimizer, _ = stepped(start, grads, how, slot_bias_correction=True)
            found.append([end, *optimizer.state_dict()["state"][0].values()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_other_rules_and_methods_use_the_same_transform() -> None:
    """GaLore in cosines, a learning rate that is a tensor: phases, transformed by kernels."""
    start = cases.parameter((20, 64), torch.float32).detach()
    grads = cases.gradients((20, 64), 5, torch.float32)
    ends = []
    for transform in ("fft", "matmul"):
        weight = torch.nn.Parameter(start.clone())
        group = {"params": [weight], "rank": 5, "projector": "dct", "transform": transform}
        optimizer = GaLoreAdamW([group], lr=torch.tensor(0.05), update_proj_gap=2, eps=1e-4)
        cases.run(optimizer, [weight], [[g] for g in grads])
        ends.append(weight.detach())
    assert float((ends[0] - ends[1]).abs().max()) < 5e-5
