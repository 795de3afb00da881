"""Coordinates in bfloat16: what is lost, that it has no bias, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, attach_in_backward
from lowrank_optim.memory import estimate, storage_bytes
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from tests import cases, runs
from tests.backward.nets import (
    METHODS,
    assert_same,
    batches,
    bitwise,
    loss_of,
    make,
    projectable,
    train,
)
from tests.compare import assert_close
from tests.pairwise import in_turns

SHAPE = (24, 40)


def one(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any):
    """A matrix and its optimizer, whose basis has been found."""
    weight = nn.Parameter(cases.parameter(SHAPE, torch.float32).detach().to(dtype))
    options = {"rank": 6, "projector": "svd", "update_proj_gap": 100, "seed": seed, **options}
    optimizer = GaLoreAdamW([weight], lr=1e-2, **options)
    send(weight, gradients(1)[0])
    optimizer.step()
    optimizer.zero_grad()
    return weight, optimizer


def gradients(count: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(SHAPE, generator=generator) + 0.3 for _ in range(count)]


def send(weight: nn.Parameter, gradient: Tensor) -> None:
    """A backward whose gradient is ``gradient``."""
    (weight * gradient.to(weight.dtype)).sum().backward()


def low(weight: nn.Parameter) -> Tensor:
    assert isinstance(weight.grad, ProjectedGrad)
    return weight.grad.coords["low"]


def products(weight: nn.Parameter, optimizer: LowRankOptimizer, grads: list[Tensor]) -> Tensor:
    """``P^T G`` of each, as torch's product gives it in the weights' dtype."""
    basis = optimizer.state[weight]["basis"]
    return torch.stack([basis.mT @ g.to(weight.dtype) for g in grads]).double()


FORMATS = [
    (torch.float64, "auto", torch.float64),
    (torch.float64, "float32", torch.float64),
    (torch.float32, "auto", torch.float32),
    (torch.float32, "float32", torch.float32),
    (torch.float32, "bfloat16", torch.bfloat16),
    (torch.float16, "auto", torch.float32),
    (torch.bfloat16, "auto", torch.bfloat16),
    (torch.bfloat16, "bfloat16", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32),
]


@pytest.mark.parametrize(("dtype", "asked", "kept"), FORMATS, ids=str)
def test_the_format_is_the_one_asked_for(dtype: Any, asked: Any, kept: torch.dtype) -> None:
    weight, optimizer = one(dtype)
    with attach_in_backward(optimizer, coords_dtype=asked):
        for g in gradients(2):
            send(weight, g)
            assert low(weight).dtype == kept
        assert weight.grad is not None and weight.grad.dtype == dtype


@pytest.mark.parametrize(("name", "asked"), in_turns(METHODS, ("auto", "float32")))
def test_one_micro_batch_loses_nothing(name: str, asked: Any) -> None:
    """bfloat16 products are kept as they come: the run without it, to the bit, refreshes too."""
    if not projectable(name):
        return
    plain, inside = (make(name, dtype=torch.bfloat16, projector="rsvd") for _ in range(2))
    train(*plain)
    with attach_in_backward(inside[1], coords_dtype=asked):
        train(*inside)
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float32_adds_up_as_float32(dtype: torch.dtype) -> None:
    """In float32, or the weights' wider format, sums are torch's own, bit for bit."""
    weight, optimizer = one(dtype)
    grads = gradients(5)
    found = products(weight, optimizer, grads).to(torch.promote_types(dtype, torch.float32))
    total = found[0].clone()
    for x in found[1:]:
        total += x
    attach_in_backward(optimizer, coords_dtype="float32")
    for g in grads:
        send(weight, g)
    assert torch.equal(low(weight), total)


def test_a_sum_is_one_of_its_two_neighbours() -> None:
    """Of two micro-batches: exact in float32, then up or down to what bfloat16 has."""
    weight, optimizer = one()
    grads = gradients(2)
    exact = products(weight, optimizer, grads).sum(0)
    attach_in_backward(optimizer)
    for g in grads:
        send(weight, g)
    bits = exact.float().view(torch.int32)
    down = (bits & -65536).view(torch.float32).double()
    up = ((bits & -65536) + 65536).view(torch.float32).double()
    found = low(weight).double()
    on_grid = exact == down
    assert ((found == down) | (found == up))[~on_grid].all() and (found == exact)[on_grid].all()
    assert (found == down).any() and (found == up).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_have_no_bias(dtype: torch.dtype) -> None:
    """Over 100 seeds the mean of a sum of 12 is the sum, within what its spread allows.

    Later gradients are so small that rounding to nearest would drop nearly all of each.
    """
    weight, optimizer = one(dtype)
    first, *small = gradients(12)
    grads = [first, *(g / 500 for g in small)]
    exact = products(weight, optimizer, grads).sum(0)
    attach_in_backward(optimizer, coords_dtype="bfloat16")
    found = []
    for seed in range(100):
        optimizer.param_groups[0]["seed"] = seed
        for g in grads:
            send(weight, g)
        found.append(low(weight).double().clone())
        optimizer.zero_grad()
    values = torch.stack(found)
    z = (values.mean(0) - exact) / (values.std(0) / len(found) ** 0.5)
    assert float(z.square().mean().sqrt()) == pytest.approx(1, abs=0.2)
    assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
    nearest = first.to(torch.bfloat16)
    for g in grads[1:]:
        nearest = nearest + g.to(torch.bfloat16)  # what is avoided does lose them
    lost = (nearest.double() - sum(g.double() for g in grads)).norm() / sum(grads[1:]).norm()
    assert lost > 0.5


def test_seeds_are_of_parameter_step_and_micro_batch() -> None:
    """The same gradient four times draws differently each time, and so does another parameter."""
    weights = [nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = GaLoreAdamW(weights, lr=0.0, rank=6, projector="svd", update_proj_gap=100)
    noise = gradients(1)[0]
    attach_in_backward(optimizer)
    seen = []
    for _ in range(3):
        for p in weights:
            send(p, noise)
        for _ in range(3):
            before = [low(p).double() for p in weights]
            for p in weights:
                send(p, noise / 300)
            seen += [low(p).double() - x for p, x in zip(weights, before, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    for i, x in enumerate(seen):
        assert x.count_nonzero() and not any(torch.equal(x, y) for y in seen[:i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_interrupted_and_resumed_among_micro_batches(dtype: torch.dtype) -> None:
    """Four micro-batches a step, refreshes among them: resumed, it is the same run to the bit."""
    data = batches(8)
    options = {"dtype": dtype, "update_proj_gap": 3}
    whole = make("GaLoreAdamW", **options)
    attach_in_backward(whole[1], coords_dtype="bfloat16")
    train(*whole, pieces=4, data=data[:5])
    weights, state = runs.through_a_file([x.state_dict() for x in whole])
    train(*whole, pieces=4, data=data[5:])
    resumed = make("GaLoreAdamW", seed=7, **options)
    attach_in_backward(resumed[1], coords_dtype="bfloat16")
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    train(*resumed, pieces=4, data=data[5:])
    assert_same(whole, resumed, bitwise)


def test_zeroed_in_place_rounds_the_same() -> None:
    """``zero_grad(set_to_none=False)`` begins to count again."""
    runs = []
    for set_to_none in (True, False):
        weight, optimizer = one()
        attach_in_backward(optimizer)
        for _ in range(3):
            for g in gradients(4):
                send(weight, g)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        runs.append(weight.detach())
    assert torch.equal(*runs)


def test_zeroed_in_place_and_removed() -> None:
    """What is empty goes with the hooks, else later gradients would count for nothing."""
    runs = []
    for zeroed_before in (True, False):
        weight, optimizer = one()
        handle = attach_in_backward(optimizer)
        send(weight, gradients(1)[0])
        optimizer.step()
        if zeroed_before:
            optimizer.zero_grad(set_to_none=False)
            handle.remove()
        else:
            handle.remove()
            optimizer.zero_grad(set_to_none=False)
            send(weight, gradients(1)[0])
            with pytest.raises(RuntimeError, match="with set_to_none=True"):
                optimizer.step()
            optimizer.zero_grad()
        send(weight, gradients(1)[0])
        optimizer.step()
        runs.append(weight.detach().clone())
    assert torch.equal(*runs) and not torch.equal(runs[0], one()[0])


def test_norms_are_not_rounded_and_factors_are() -> None:
    """The norm that clips is float32's; coordinates are scaled as torch scales bfloat16."""
    weight, optimizer = one()
    attach_in_backward(optimizer)
    for g in gradients(3):
        send(weight, g)
    before = low(weight).clone()
    norm = nn.utils.clip_grad_norm_([weight], 0.5)
    assert norm.dtype == torch.float32
    assert_close(norm.double(), before.double().norm(), torch.float32)
    assert torch.equal(low(weight), before * (0.5 / (norm + 1e-6)))
    assert float(low(weight).double().norm()) == pytest.approx(0.5, rel=1e-3)


def test_clipping_in_the_step() -> None:
    """``max_norm`` of bfloat16 coordinates and of float32 ones: the same run within a digit."""
    runs = []
    for asked in ("float32", "bfloat16"):
        model, optimizer = make("GaLoreAdamW", dtype=torch.float32, update_proj_gap=3)
        with attach_in_backward(optimizer, max_norm=0.5, coords_dtype=asked):  # type: ignore[arg-type]
            train(model, optimizer, data=batches(2))
        runs.append([p.detach() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert_close(a, b, torch.bfloat16)


@pytest.mark.parametrize("infinite", [(), (1, 3)])
def test_grad_scaler_unscales_and_skips(infinite: tuple[int, ...]) -> None:
    """Scales are powers of two, which move no digit: the run without a scaler, to the bit."""
    runs = []
    for scale in (False, True):
        model, optimizer = make("GaLoreAdamW", dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scale)
        attach_in_backward(optimizer, coords_dtype="bfloat16")
        for n, batch in enumerate(batches(6)):
            broken = n in infinite
            if broken and not scale:
                continue
            for piece in batch.chunk(2):
                loss = loss_of(model, piece) * (float("inf") if broken else 0.5)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    assert_same(*runs, bitwise)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """In any micro-batch: no sum hides it, and the step is skipped."""
    for at in range(3):
        weight, optimizer = one()
        before = weight.detach().clone()
        attach_in_backward(optimizer)
        for n, g in enumerate(gradients(3)):
            if n == at:
                g[2, 3] = bad
            send(weight, g)
        assert not low(weight).isfinite().all()
        optimizer.step()
        assert torch.equal(weight, before)


def test_formats_do_not_mix_in_a_bucket() -> None:
    """Attached again in another format while coordinates wait: each is stepped from its own."""
    weights = [nn.Parameter(torch.randn(SHAPE)) for _ in range(2)]
    optimizer = GaLoreAdamW(weights, lr=1e-2, rank=6, update_proj_gap=100)
    for p in weights:
        send(p, gradients(1)[0])
    optimizer.step()
    optimizer.zero_grad()
    with attach_in_backward(optimizer, coords_dtype="float32"):
        send(weights[0], gradients(1)[0])
    with attach_in_backward(optimizer, coords_dtype="bfloat16"):
        send(weights[1], gradients(1)[0])
        before = [p.detach().clone() for p in weights]
        optimizer.step()
    assert {low(p).dtype for p in weights} == {torch.float32, torch.bfloat16}
    assert not any(torch.equal(p, x) for p, x in zip(weights, before, strict=True))


def test_an_unknown_format_is_an_error() -> None:
    _, optimizer = one()
    match = "coords_dtype must be 'auto', 'float32' or 'bfloat16', got 'float16'"
    with pytest.raises(ValueError, match=match):
        attach_in_backward(optimizer, coords_dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=match):
        estimate(nn.Linear(4, 4), GaLoreAdamW, coords_dtype="float16")  # type: ignore[arg-type]
    attach_in_backward(optimizer).remove()  # nothing was attached


# ---------------------------------------------------------------- what the estimate says

KINDS = {
    **{
        f"{projector}, {asked}": ("GaLoreAdamW", {"projector": projector}, asked)
        for projector in cases.projector_names()
        if projector not in ("block", "dct")
        for asked in (["auto", "float32"] if projector == "svd" else ["bfloat16"])
    },
    **{  # chosen by the device unless it is said
        f"dct by {transform}, auto": ("DCTAdamW", {"transform": transform}, "auto")
        for transform in ("fft", "matmul")
    },
    "SSTAdamW, auto": ("SSTAdamW", {"steps_per_iteration": 3}, "auto"),
    "both sides": ("GaLoreAdamW", {"projector": "svd", "proj_type": "full"}, "auto"),
    "all at once": ("GaLoreAdamW", {"stagger": False}, "auto"),
}


class Weights(nn.Module):
    """Matrices of several shapes, experts, and vectors; the loss is linear in all."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(12, 20), (20, 12), (16,), (16, 16), (3, 12, 14), (30, 10), (12, 20), (9, 31)]
        self.all = nn.ParameterList(torch.randn(s) for s in shapes)

    def backward(self) -> None:
        sum((p * torch.randn_like(p)).sum() for p in self.all).backward()


@pytest.mark.usefixtures("held_or_stepped")
@pytest.mark.parametrize(("kind", "dtype"), in_turns([*KINDS], (torch.float32, torch.bfloat16)))
def test_the_estimate_is_what_the_worst_step_holds(kind: str, dtype: torch.dtype) -> None:
    """To the byte, over two gaps: coordinates in their formats, and what is due whole.

    Of one micro-batch the largest to be projected counts as in flight, due at that step or not.
    """
    name, options, asked = KINDS[kind]
    options = {"rank": 4, "update_proj_gap": 3, **options}
    if name == "SSTAdamW":
        del options["update_proj_gap"]
    model = Weights().to(dtype)
    cls = type(cases.build(name, [nn.Parameter(torch.ones(2, 2))]))
    optimizer = cls(model.named_parameters(), lr=1e-2, **options)
    largest = max(p.nbytes for p in model.parameters())
    most = single = 0
    with attach_in_backward(optimizer, coords_dtype=asked):
        for step in range(7):
            model.backward()
            taken = [p for p in model.parameters() if isinstance(p.grad, ProjectedGrad)]
            grads = [p.grad for p in model.parameters()]
            held = sum(
                storage_bytes(g.coords.values() if isinstance(g, ProjectedGrad) else [g])
                for g in grads
            )
            if step:
                most = max(most, held)
                single = max(single, held + max((p.nbytes for p in taken), default=0))
            optimizer.step()
            optimizer.zero_grad()
    common = {"in_backward": "project", "coords_dtype": asked, **options}
    found = {n: estimate(model, cls, accumulation_steps=n, **common).live_gradients for n in (1, 2)}
    assert found[2] == most + largest
    projected = max(p.nbytes for p in optimizer.state if "refresh_step" in optimizer.state[p])
    assert single <= found[1] == most + projected


def test_the_estimate_of_a_first_basis_on_the_boundary_is_all_gradients() -> None:
    model = Weights()
    common = {"rank": 4, "in_backward": "project", "accumulation_steps": 2}
    found = estimate(model, GaLoreAdamW, first_basis="boundary", **common)
    assert found.live_gradients == found.gradients + found.largest_gradient
    with pytest.raises(ValueError, match="first_basis must be"):
        estimate(model, GaLoreAdamW, first_basis="last", **common)


def test_the_first_step_does_not_hold_two_bases() -> None:
    """The basis found inside backward becomes the state's before the next matrix has zeros.

    All the zeros were made first: for LLaMA-7B at rank 1024 that was 1.75 GiB at the first step.
    """
    model = Weights()
    optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4)
    seen: list[int] = []
    attach_in_backward(optimizer)
    model.backward()
    fresh = {
        p: p.grad.fresh["basis"] for p in model.parameters() if isinstance(p.grad, ProjectedGrad)
    }
    optimizer._make_state()
    seen = [optimizer.state[p]["basis"].data_ptr() for p in fresh]
    assert len(fresh) == 7 and seen == [x.data_ptr() for x in fresh.values()]
