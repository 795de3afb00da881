"""A step from inside backward is the step after it; memory is what it says."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, attach_in_backward, methods
from lowrank_optim import nn as lowrank_nn
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from tests import cases, runs
from tests.backward.nets import (
    METHODS,
    STEPS,
    Net,
    Now,
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


@pytest.mark.parametrize(
    ("name", "way"),
    in_turns(
        [*METHODS],
        [
            (dtype, stagger)
            for stagger in (False, True)
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        ],
    ),
)
def test_projecting_one_batch_is_the_step_to_the_bit(name, way) -> None:
    """Without accumulation nothing is reordered: parameters and state are the same bits."""
    dtype, stagger = way
    if not projectable(name):
        with pytest.raises(ValueError, match="use mode='step'"):
            attach_in_backward(make(name)[1])
        return
    plain, inside = (make(name, dtype=dtype, stagger=stagger, projector="rsvd") for _ in range(2))
    train(*plain)
    with attach_in_backward(inside[1]):
        train(*inside)
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize("projector", [n for n in cases.projector_names() if n != "block"])
def test_projecting_with_every_projector(projector: str) -> None:
    """Sets of indices, of which a step asks for the norm of what they leave out, too."""
    options = {"projector": projector, "update_proj_gap": 3}
    plain, inside = (make("GaLoreAdamW", **options) for _ in range(2))
    train(*plain)
    with attach_in_backward(inside[1], max_norm=1e9):
        train(*inside)
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("projector", ["svd", "columns", "rows", "randk", "dct"])
def test_an_entry_that_is_not_finite_is_seen_wherever_it_is(projector: str, first: bool) -> None:
    """One entry of one gradient; indices may not select it, and its coordinates must tell anyway.

    Without it a matrix would step on a gradient that is broken, and ``GradScaler`` would not skip.
    """
    for at in range(12):
        weight = nn.Parameter(cases.parameter((6, 12), torch.float32).detach())
        optimizer = cases.build("GaLoreAdamW", [weight], projector=projector, rank=2)
        with attach_in_backward(optimizer):
            if not first:
                weight.sin().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            before = weight.detach().clone()
            factor = torch.ones(6, 12)
            factor[at % 6, at] = float("nan")
            (weight * factor).sum().backward()
            assert not any(x.isfinite().all() for x in weight.grad.coords.values())
            optimizer.step()
        assert torch.equal(weight, before)


REFUSED = {
    "what the limiter scales": ("FiraAdamW", {}, "does not see"),
    "the free rule": ("FrugalAdamW", {}, "does not see"),
    "error feedback": (
        "DCTAdamW",
        {"error_feedback": "8bit", "update_proj_gap": 3},
        "does not see",
    ),
    "blocks": ("FrugalAdamW", {"projector": "block", "free_rule": "none"}, "whole or not at all"),
    "a basis for every step": ("DCTAdamW", {"update_proj_gap": 1}, "at every step"),
    "switches at every step": ("SwitchLoRAAdamW", {}, "at every step"),
    "iterations of one step": ("SSTAdamW", {"steps_per_iteration": 1}, "at every step"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_methods_that_need_whole_gradients_refuse_to_project(what: str) -> None:
    """At once, naming the parameter; the optimizer is as it was and takes the other mode."""
    name, options, why = REFUSED[what]
    model, optimizer = make(name, **options)
    with pytest.raises(ValueError, match=f"{name} .*parameter 0.*{why}|{why}.*use mode='step'"):
        attach_in_backward(optimizer)
    loss_of(model, batches(1)[0]).backward()
    assert not any(isinstance(p.grad, ProjectedGrad) for p in model.parameters())
    attach_in_backward(optimizer, "step").remove()


@pytest.mark.parametrize("name", ["DCTAdamW", "SSTAdamW"])
def test_methods_whose_subspace_rests_in_between_project(name: str) -> None:
    """A basis of cosines refreshed every third step; factors, whose coordinates are linear in G."""
    model, optimizer = make(name)
    with attach_in_backward(optimizer):
        train(model, optimizer, data=batches(4))
        loss_of(model, batches(1)[0]).backward()
        taken = [isinstance(p.grad, ProjectedGrad) for p in model.parameters()]
    assert sum(taken) >= 4


@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
def test_projecting_every_side(proj_type: str) -> None:
    plain, inside = (
        make("GaLoreAdamW", proj_type=proj_type, maximize=True, on_refresh="project")
        for _ in range(2)
    )
    train(*plain)
    with attach_in_backward(inside[1]):
        train(*inside)
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize("name", [n for n in METHODS if projectable(n) and "Lion" not in n])
def test_accumulated_coordinates_are_those_of_the_whole_batch(name: str) -> None:
    """Four micro-batches, refreshes among the steps: the un-split batch, up to rounding."""
    whole, split = make(name), make(name)
    train(*whole)
    with attach_in_backward(split[1], accumulation_steps=4, first_basis="boundary"):
        train(*split, pieces=4)
    assert_same(whole, split, assert_close)


def test_the_first_basis_of_a_micro_batch_is_the_only_difference() -> None:
    """An oracle that takes its first bases from the first piece alone, then sees whole batches."""
    data = batches()
    oracle, split = (make("GaLoreAdamW", update_proj_gap=3) for _ in range(2))
    probe = make("GaLoreAdamW", update_proj_gap=3)
    train(*probe, data=[data[0][:1]])
    (loss_of(oracle[0], data[0])).backward()
    model, optimizer = oracle
    optimizer._make_state()
    for p, q in zip(model.parameters(), probe[0].parameters(), strict=True):
        if "basis" in probe[1].state[q]:
            for key in ("basis", "refresh_step"):
                optimizer.state[p][key] = probe[1].state[q][key].clone()
    optimizer.zero_grad()
    train(*oracle, data=data)
    with attach_in_backward(split[1]):
        train(*split, pieces=4, data=data)
    for p, q in zip(model.parameters(), split[0].parameters(), strict=True):
        assert_close(p, q)


def test_clipping_takes_the_norm_of_what_is_applied() -> None:
    """The oracle steps a copy to learn the basis of this step, and scales whole gradients.

    ``|P^T G|`` of every matrix and ``|g|`` of every dense parameter make the global norm; a copy of
    the run has refreshed what is due.
    """
    limit, clipped = 0.5, 0
    model, optimizer = make("GaLoreAdamW")
    inside = make("GaLoreAdamW")
    with attach_in_backward(inside[1], max_norm=limit):
        train(*inside)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for batch in batches():
        loss_of(model, batch).backward()
        grads = [p.grad for p in model.parameters()]
        ahead_model, ahead = copy.deepcopy((model, optimizer))
        for p, g in zip(ahead_model.parameters(), grads, strict=True):
            p.grad = None if g is None else g.clone()
        ahead.step()
        norms = []
        for item in ahead._items(ahead.param_groups[0]):
            if item.param.grad is None:
                continue
            x = item.param.grad
            if item.view is not None:
                x = ahead.state[item.param]["basis"].mT @ item.view.of(x)
            norms.append(x.norm())
        factor = (limit / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
        clipped += int(factor < 1)
        for g in grads:
            if g is not None:
                g.mul_(factor)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert clipped > 2
    for p, q in zip(model.parameters(), inside[0].parameters(), strict=True):
        assert_close(p, q)


def test_torch_clips_coordinates() -> None:
    """``clip_grad_norm_`` of a training loop: the norm is that of ``P R``, and R is scaled."""
    model, optimizer = make("GaLoreAdamW", update_proj_gap=100)
    attach_in_backward(optimizer)
    train(model, optimizer, data=batches(1))
    loss_of(model, batches(2)[1]).backward()
    applied, pairs = [], []
    for item in optimizer._items(optimizer.param_groups[0]):
        g = item.param.grad
        if g is None:
            continue
        pairs.append((g, g.coords["low"].clone() if isinstance(g, ProjectedGrad) else g.clone()))
        applied.append(
            optimizer.state[item.param]["basis"] @ pairs[-1][1] if item.view is not None else g
        )
    norm = torch.stack([x.norm() for x in applied]).norm()
    assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), norm)
    for g, before in pairs:
        now = g.coords["low"] if isinstance(g, ProjectedGrad) else g
        assert_close(now, before * (1e-3 / (norm + 1e-6)))


def amp_run(attach: bool, infinite: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """float32 under GradScaler; scales are powers of two, so that unscaling is exact."""
    model, optimizer = make("GaLoreAdamW", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if attach:
        attach_in_backward(optimizer)
    seen = []
    for n, batch in enumerate(batches()):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        loss = loss_of(model, batch) * (float("inf") if n in infinite else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((before, copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))))
    return (model, optimizer), seen


def test_grad_scaler_skips_and_nothing_changes() -> None:
    """An infinite loss at the first step and at one where refreshes fall due.

    Not a bit of weights or state changes then, no basis is made, and the run is that without
    ``attach_in_backward`` to the bit.
    """
    infinite = (0, 4)
    plain, _ = amp_run(False, infinite)
    inside, seen = amp_run(True, infinite)
    for n in infinite:
        before, after = seen[n]
        assert all(
            torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True)
        )
        assert before[1].keys() == after[1].keys()
        for one, two in zip(before[1].values(), after[1].values(), strict=True):
            assert all(torch.equal(one[k], two[k]) for k in one) and one.keys() == two.keys()
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        # one piece is measured to the bit of every method, and with every projector, above
        pytest.param(name, pieces, marks=pytest.mark.slow if pieces == 1 and i % 4 else ())
        for i, name in enumerate(METHODS)
        for pieces in (1, 3)
    ],
)
def test_stepping_inside_backward_is_the_step(name: str, pieces: int) -> None:
    """Every method, steps on the boundary only: the same bits as gradients that wait in p.grad."""
    plain, inside = (make(name, stagger=True) for _ in range(2))
    data = batches(size=3)
    train(*plain, pieces=pieces, data=data)
    with attach_in_backward(inside[1], "step", accumulation_steps=pieces):
        train(*inside, pieces=pieces, data=data)
    assert_same(plain, inside, bitwise)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
@pytest.mark.parametrize("reset", ["keep", "reset"])
def test_stepping_blocks(order: str, reset: str) -> None:
    """Blocks that gain and lose moments while backward runs from the last layer to the first.

    One has no gradient at first and then at every second step: it must switch with the others, and
    come back in the right turn, which a count of its own steps would get wrong.
    """
    options = {"projector": "block", "rank": 0.5, "update_proj_gap": 2, "block_order": order}
    runs = []
    for attach in (False, True):
        layers = [nn.Parameter(cases.parameter((5, 5), seed=i).detach()) for i in range(4)]
        optimizer = cases.build("FrugalAdamW", layers, on_refresh=reset, **options)
        if attach:
            attach_in_backward(optimizer, "step")
        held = []
        for n in range(13):
            used = layers if n % 2 else [layers[0], *layers[2:]]
            torch.linalg.multi_dot(used[::-1]).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            held.append([k for p in layers for k in optimizer.state[p]])
        runs.append((nn.ParameterList(layers), optimizer, held))
    assert_same(runs[0], runs[1], bitwise)
    assert runs[0][2] == runs[1][2] and len({tuple(x) for x in held}) > 1


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_block_that_the_last_micro_batch_misses(pieces: int) -> None:
    """``step()`` takes it, and it is the same step for the blocks: their clock ticks once."""
    runs = []
    for attach in (False, True):
        layers = [nn.Parameter(cases.parameter((5, 5), seed=i).detach()) for i in range(4)]
        options = {"projector": "block", "rank": 0.5, "update_proj_gap": 1}
        optimizer = cases.build("FrugalAdamW", layers, **options)
        if attach:
            attach_in_backward(optimizer, "step", accumulation_steps=pieces)
        for n in range(8):
            late = n % 4
            for piece in range(pieces):
                used = layers if piece == 0 else layers[:late] + layers[late + 1 :]
                torch.linalg.multi_dot(used).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((nn.ParameterList(layers), optimizer))
    assert_same(*runs, bitwise)


@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize("form", ["sst", "switchlora"])
def test_factors_of_modules_wait_for_their_siblings(form: str, mode: Any) -> None:
    """Backward brings them one by one, and they step together; other parameters need not wait."""
    runs = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        groups = lowrank_nn.convert(model, form, rank=3, target_modules=["twice", "up", "down"])
        cls = {"sst": "SSTAdamW", "switchlora": "SwitchLoRAAdamW"}[form]
        own = cases.METHOD_ARGS[cls] if form == "sst" else {"interval": 10, "freeze_steps": 2}
        optimizer = getattr(methods, cls)(groups, lr=1e-2, **own)
        if attach:
            attach_in_backward(optimizer, mode, accumulation_steps=2, first_basis="boundary")
        train(model, optimizer, pieces=2)
        runs.append((model, optimizer))
    assert_same(*runs, bitwise)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_loss_is_an_error_in_step_mode(unscale: bool) -> None:
    """Gradients were applied with the factor in them: the scaler's first step must not pass.

    It passed them by with an assertion of torch that names neither. Once removed, a scaler works.
    """
    model, optimizer = make("GaLoreAdamW", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    handle = attach_in_backward(optimizer, "step")
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"scaled by a GradScaler.*mode='project'"):
        scaler.step(optimizer)
    handle.remove()
    plain = copy.deepcopy((model, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    scaler.step(optimizer)
    loss_of(plain[0], batches(1)[0]).backward()
    plain[1].step()
    assert_same(plain, (model, optimizer), bitwise)


def test_a_scaler_that_is_off_is_no_error() -> None:
    plain, inside = (make("GaLoreAdamW", dtype=torch.float32) for _ in range(2))
    train(*plain, data=batches(2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    attach_in_backward(inside[1], "step")
    for batch, lr in zip(batches(2), (1e-2, 0.9e-2), strict=True):
        inside[1].param_groups[0]["lr"] = lr
        scaler.scale(loss_of(inside[0], batch)).backward()
        scaler.step(inside[1])
        scaler.update()
    for a, b in zip(plain[0].parameters(), inside[0].parameters(), strict=True):
        assert_close(a, b)


def test_stepping_frees_every_gradient_that_backward_reaches() -> None:
    model, optimizer = make("GaLoreAdamW")
    start = model.embed.weight.detach().clone()
    attach_in_backward(optimizer, "step", accumulation_steps=2)
    loss_of(model, batches(1)[0]).backward()
    assert torch.equal(model.embed.weight, start) and model.embed.weight.grad is not None
    loss_of(model, batches(1)[0]).backward()
    assert not torch.equal(model.embed.weight, start)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_one_micro_batch_misses_is_stepped_by_step() -> None:
    """It has fewer arrivals than the others; its gradient waits, and ``step()`` takes it."""
    results = []
    for attach in (False, True):
        a, b = (nn.Parameter(cases.parameter((6, 9), seed=i).detach()) for i in (1, 2))
        optimizer = cases.build("GaLoreAdamW", [a, b])
        if attach:
            attach_in_backward(optimizer, "step", accumulation_steps=2)
        for _ in range(4):
            (a.square().sum() + b.sin().sum()).backward()
            a.cos().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((a.detach(), b.detach()))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_step_mode_clips_each_parameter_and_says_so() -> None:
    a, b = (nn.Parameter(cases.parameter((6, 9), seed=i).detach()) for i in (1, 2))
    c, d = (nn.Parameter(x.detach().clone()) for x in (a, b))
    inside, plain = cases.build("GaLoreSGD", [a, b]), cases.build("GaLoreSGD", [c, d])
    with pytest.warns(UserWarning, match="clips the gradient of each parameter") as caught:
        attach_in_backward(inside, "step", max_norm=0.1)
    assert caught[0].filename == __file__
    for _ in range(3):
        (a.square().sum() + b.sin().sum()).backward()
        inside.step()
        (c.square().sum() + d.sin().sum()).backward()
        for p in (c, d):
            nn.utils.clip_grad_norm_([p], 0.1)
        plain.step()
        plain.zero_grad()
    assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_interrupted_and_resumed(mode: Any) -> None:
    """One state_dict, read with weights_only, with and without the hooks on either side."""
    data = batches(STEPS)
    whole = make("GaLoreAdamW")
    with attach_in_backward(whole[1], mode):
        train(*whole, data=data[:5])
        saved = [runs.through_a_file([x.state_dict() for x in whole]) for _ in range(2)]
        train(*whole, data=data[5:])
    for attach, (weights, state) in zip((False, True), saved, strict=True):
        resumed = make("GaLoreAdamW", seed=7)
        if attach:
            attach_in_backward(resumed[1], mode)
        resumed[0].load_state_dict(weights)
        resumed[1].load_state_dict(state)
        train(*resumed, data=data[5:])
        assert_same(whole, resumed, bitwise)


@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_checkpointed_and_compiled_models(mode: Any, how: str) -> None:
    plain, inside = make("GaLoreAdamW"), make("GaLoreAdamW")
    train(*plain, pieces=2)
    model, optimizer = inside
    if how == "checkpoint":
        model.segment = lambda f, x: checkpoint(f, x, use_reentrant=False)
    run = torch.compile(model, backend="aot_eager") if how == "compile" else model
    options = {"accumulation_steps": 2, "first_basis": "boundary"}
    with attach_in_backward(optimizer, mode, **options):
        train(run, optimizer, pieces=2)
    assert_same(plain, inside, assert_close)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_is_compiled_again_between_two_micro_batches(backend: str) -> None:
    """For another length, while gradients are coordinates: that was an error of the compiler's."""
    found, kinds = [], set()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)
        counter = CompileCounterWithBackend(backend)
        run = torch.compile(model, backend=counter, dynamic=False) if compiled else model
        with attach_in_backward(optimizer, accumulation_steps=2):
            for lengths in ((4, 5), (4, 6), (7, 4)):
                for n in lengths:
                    run(torch.arange(12.0 * n).sin().view(n, 12)).square().mean().backward()
                kinds.add(type(model[0].weight.grad))
                optimizer.step()
                optimizer.zero_grad()
        assert counter.frame_count == 4 * compiled
        found.append([p.detach().clone() for p in model.parameters()])
    assert ProjectedGrad in kinds
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


def test_reentrant_checkpoints_that_share_a_parameter_are_refused() -> None:
    """They deliver its gradient in two pieces, and no hook knows which is the last."""
    model, optimizer = make("GaLoreAdamW")
    model.segment = lambda f, x: checkpoint(f, x, use_reentrant=True)
    attach_in_backward(optimizer, "step")
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        train(model, optimizer)


def test_projecting_takes_the_pieces_of_reentrant_checkpoints() -> None:
    plain, inside = make("GaLoreAdamW"), make("GaLoreAdamW")
    train(*plain)
    inside[0].segment = lambda f, x: checkpoint(f, x, use_reentrant=True)
    with attach_in_backward(inside[1], first_basis="boundary"):
        train(*inside)
    assert_same(plain, inside, assert_close)


@pytest.mark.parametrize("first_basis", ["micro", "boundary"])
def test_gradients_zeroed_in_place(first_basis: Any) -> None:
    """``zero_grad(set_to_none=False)`` leaves an empty gradient; refreshes still get whole ones."""
    plain, inside = make("GaLoreAdamW"), make("GaLoreAdamW")
    train(*plain)
    attach_in_backward(inside[1], first_basis=first_basis)
    inside[1].zero_grad = lambda: LowRankOptimizer.zero_grad(inside[1], set_to_none=False)
    del inside[0].unused  # zeros are a gradient to torch
    model, optimizer = inside
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for batch in batches():
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    del plain[0].unused
    for a, b in zip(plain[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("to_none", [True, False])
def test_coordinates_of_before_a_load_are_not_stepped(to_none: bool) -> None:
    """They are in other bases than those that a load brings: the batch is begun again, or no step.

    Micro-batches on both sides of the load were added up in the old bases, and lifted by the new.
    """
    other, first, again = make("GaLoreAdamW", seed=3), make("GaLoreAdamW"), make("GaLoreAdamW")
    train(*other, data=batches(2))
    before, after = batches(2)
    attach_in_backward(first[1])
    train(*first, data=batches(4))
    loss_of(first[0], before).backward()
    first[1].load_state_dict(other[1].state_dict())
    loss_of(first[0], after).backward()
    weights, state = copy.deepcopy((first[0].state_dict(), first[1].state_dict()))
    with pytest.raises(RuntimeError, match=r"projected before load_state_dict.*zero_grad"):
        first[1].step()
    for key, x in first[0].state_dict().items():
        assert torch.equal(x, weights[key]), key
    first[1].zero_grad(set_to_none=to_none)
    train(*first, data=batches(2))
    again[0].load_state_dict(weights)
    again[1].load_state_dict(state)
    train(*again, data=batches(2))
    assert_same(again, first, bitwise)


def test_parameters_unfrozen_later_are_taken_up() -> None:
    model, optimizer = make("GaLoreAdamW")
    attach_in_backward(optimizer)
    train(model, optimizer, data=batches(1))
    model.frozen.requires_grad_(True)
    train(model, optimizer, data=batches(1))
    train(model, optimizer, data=batches(1))
    loss_of(model, batches(1)[0]).backward()
    assert int(optimizer.state[model.frozen.weight]["step"]) == 2
    assert isinstance(model.frozen.weight.grad, ProjectedGrad)


def test_misuse_is_an_error() -> None:
    model, optimizer = make("GaLoreAdamW")
    handle = attach_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(closure\) cannot compute gradients"):
        optimizer.step(lambda: loss_of(model, batches(1)[0]).backward())
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3.0) == 3.0
    with pytest.raises(RuntimeError, match="already"):
        attach_in_backward(optimizer)
    train(model, optimizer, data=batches(1))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(NotImplementedError, match=r"needs a whole gradient.*mul_.*remove\(\)"):
        model.up.weight.grad.isnan()
    optimizer.zero_grad()
    handle.remove()
    loss_of(model, batches(1)[0]).backward()
    assert not any(isinstance(p.grad, ProjectedGrad) for p in model.parameters())
    for bad in ({"mode": "both"}, {"accumulation_steps": 0}, {"max_norm": 0}, {"first_basis": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            attach_in_backward(optimizer, **bad)


@pytest.mark.parametrize("given", [{"first_basis": "micro"}, {"coords_dtype": "float32"}])
def test_an_argument_of_coordinates_is_refused_where_there_are_none(given: dict[str, str]) -> None:
    (name, value) = next(iter(given.items()))
    _, optimizer = make("GaLoreAdamW")
    with pytest.raises(ValueError, match=rf"{name}='{value}' has no effect .*mode='project'"):
        attach_in_backward(optimizer, "step", **given)
    attach_in_backward(optimizer, **given).remove()  # nothing was attached


def test_coordinates_in_the_place_of_a_gradient_cannot_be_saved() -> None:
    """Pickle named a function inside this package; the state of the run is what can be saved."""
    model, optimizer = make("GaLoreAdamW")
    attach_in_backward(optimizer)
    train(model, optimizer, data=batches(1))
    loss_of(model, batches(1)[0]).backward()
    for write in (lambda x: torch.save(x, io.BytesIO()), pickle.dumps):
        with pytest.raises(NotImplementedError, match=r"cannot be saved.*after zero_grad\(\)"):
            write([model.up.weight.grad])
    torch.save([model.state_dict(), optimizer.state_dict()], io.BytesIO())


@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize(
    "still", [(True,), (False, True), (True, False), (True, True)], ids=lambda x: f"{x}"
)
def test_a_weight_that_autograd_reaches_without_a_gradient(mode: Any, still: tuple[bool]) -> None:
    """Hooks run for it too, and the backward ended in an empty AssertionError."""
    ends = []
    for attached in (False, True):
        model = Now()
        own = {"lr": 1e-2, "rank": 4, "update_proj_gap": 2}
        optimizer = GaLoreAdamW(model.named_parameters(), **own)
        if attached:
            steps = len(still) if mode == "step" else 1
            own = {"accumulation_steps": steps, "first_basis": "boundary"}
            attach_in_backward(optimizer, mode, **own)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for piece in still:
                x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
                model(x, piece and step % 3 > 0).square().mean().backward()
            assert not (attached and mode == "step") or all(
                p.grad is None for p in model.parameters()
            )
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    for a, b in zip(*(x.parameters() for x in ends), strict=True):
        assert_close(a, b)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tracked(model: nn.Module, optimizer: LowRankOptimizer | None, *runs: Callable[[], Any]):
    """Bytes that ``runs`` have alive at their peak, and leave behind, by torch's MemTracker."""
    tracker, cpu = MemTracker(), torch.device("cpu")
    tracker.track_external(model, *([] if optimizer is None else [optimizer]))
    tracker.track_external(*(p.grad for p in model.parameters() if p.grad is not None))
    with tracker:
        start = tracker.get_tracker_snapshot("current")[cpu]["Total"]
        for run in runs:
            run()
            tracker.reset_mod_stats()
        left = tracker.get_tracker_snapshot("current")[cpu]["Total"] - start
    return tracker.get_tracker_snapshot("peak")[cpu]["Total"] - start, left


def held(params: list[Tensor]) -> int:
    """Bytes of all gradients, of coordinates where they are all that exists."""
    grads = [p.grad for p in params if p.grad is not None]
    parts = [list(g.coords.values()) if isinstance(g, ProjectedGrad) else [g] for g in grads]
    return sum(x.nbytes for own in parts for x in own)


TOKENS = torch.arange(16).reshape(1, 16) * 5 % 64


def backward_of(model: nn.Module) -> Callable[[], None]:
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def projecting(model: nn.Module) -> LowRankOptimizer:
    return GaLoreAdamW(model.named_parameters(), rank=4, update_proj_gap=1000, stagger=False)


@pytest.fixture(scope="module")
def floors() -> tuple[int, int, int]:
    """What is not gradients: of a backward that frees each at once, a first and a later step."""
    model = llama()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    run = backward_of(model)
    run()
    freed, left = tracked(model, None, run)
    assert left == 0
    model = llama()
    optimizer = projecting(model)
    backward_of(model)()
    first, state = tracked(model, optimizer, optimizer.step)
    later, nothing = tracked(model, optimizer, optimizer.step)
    assert nothing == 0
    return freed, first - state, later


@pytest.mark.parametrize("mode", ["project", "step"])
def test_one_group_that_counts_on_the_device_is_enough_to_be_refused(mode: Any) -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "capturable": True}]
    optimizer = GaLoreAdamW(groups, rank=2)
    with pytest.raises(ValueError, match="does not go with capturable=True"):
        attach_in_backward(optimizer, mode)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in params)


@pytest.mark.parametrize(
    ("mode", "first"),
    [
        (None, False),
        ("project", False),
        ("step", True),
        pytest.param("project", True, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param("step", False, marks=pytest.mark.slow),
    ],
)
def test_peak_gradient_memory_is_the_largest_gradient(mode: Any, first: bool, floors: Any) -> None:
    """Of two accumulated backwards of a LLaMA, at its first step, or later.

    The bound has no allowance: activations and the one gradient in flight are the peak of a run
    that frees each gradient at once; on top come what the mode keeps (coordinates and dense
    gradients; nothing), at a first step the bases or the state that it makes, and the temporaries
    of refreshes or of steps where they happen inside backward, as measured outside of it.
    """
    freed, refreshing, stepping = floors
    model = llama()
    params, run = list(model.parameters()), backward_of(model)
    optimizer = projecting(model)
    if not first:
        run()
        optimizer.step()
        optimizer.zero_grad()
    if mode is not None:
        attach_in_backward(optimizer, mode)
    live: list[int] = []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: live.append(held(params)))
    micro_batches = 1 if mode == "step" else 2
    peak, left = tracked(model, optimizer, *[run] * micro_batches)
    items = [i for group in optimizer.param_groups for i in optimizer._items(group)]
    low = [i for i in items if i.subspace is not None]
    kept = sum(4 * i.param.numel() for i in items if i.subspace is None)
    kept += sum(4 * 4 * i.view.n for i in low)
    bases = sum(4 * 4 * i.view.m for i in low)
    if mode is None:
        whole = sum(4 * p.numel() for p in params)
        assert max(live) == left == whole and peak >= whole
    elif mode == "project":
        assert max(live) == kept
        counters = 2 * 4 * len(low)
        assert kept <= left <= kept + first * (bases + counters)
        assert peak <= freed + left + first * refreshing
        assert kept + bases < 0.35 * sum(4 * p.numel() for p in params)
    else:
        assert max(live) == 0
        state = sum(x.nbytes for own in optimizer.state.values() for x in own.values())
        assert left == first * state
        assert peak <= freed + left + (refreshing if first else stepping)
