"""What every method must keep, a function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import cases
from tests.compare import assert_close

SHAPES = [(), (5,), (6, 11), (3, 6, 10), (6, 4, 3, 3)]


def fresh(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A parameter of every number of dimensions."""
    return [nn.Parameter(cases.parameter(s, dtype).detach()) for s in SHAPES]


def rows(count: int, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    columns = [cases.gradients(s, count, dtype, seed=i) for i, s in enumerate(SHAPES)]
    return [list(row) for row in zip(*columns, strict=True)]


def values(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def descends(name: str) -> None:
    """The loss of a small network on fixed data falls to less than half, projected by rsvd."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    x, y = torch.randn(64, 12), torch.randn(12, 4)
    y = torch.tanh(x @ y)
    optimizer = cases.build(name, model.parameters(), projector="rsvd", lr=0.04, scale=1.0)
    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def an_empty_first_step_makes_all_state(name: str) -> None:
    """``lr = 0`` and zero gradients: how checkpoint loaders initialise. No weight moves.

    Adafactor's relative step ignored an ``lr`` of zero, and decayed the weights.
    """
    params = fresh()
    before = values(params)
    options: list[dict[str, Any]] = [{"lr": 0.0}, {"lr": torch.tensor(0.0)}]
    if name == "GaLoreAdafactor":
        options.append({"lr": None, "relative_step": True, "scale_parameter": True})
    for own in options:
        optimizer = cases.build(name, params, weight_decay=0.1, **own)
        if own["lr"] is None:
            optimizer.param_groups[0]["lr"] = 0.0  # by the loader, which restores it
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert same(values(params), before)
        assert all(optimizer.state[p]["step"] == 1 for p in params)


def state_is_total_after_one_step(name: str) -> None:
    """Every trainable parameter has its state after the first step, with or without gradient."""
    params = fresh()
    optimizer = cases.build(name, params)
    assert not optimizer.state
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    assert set(optimizer.state) == set(params)
    assert [int(optimizer.state[p]["step"]) for p in params] == [0, 0, 1, 0, 0]


def no_gradients_no_step(name: str) -> None:
    """Without gradients nothing moves and no counter advances; ``p.grad`` is left as it was."""
    params = fresh()
    before = values(params)
    optimizer = cases.build(name, params, weight_decay=0.1)
    optimizer.step()
    optimizer.step()
    assert same(values(params), before)
    assert all(int(s["step"]) == 0 for s in optimizer.state.values())
    grads = rows(1)[0]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    held = [p.grad for p in params]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, held, strict=True))
    assert same([p.grad for p in params], grads)  # type: ignore[misc]


def every_parameter_moves(name: str) -> None:
    """0-d to 4-d, in float64, float32 and bfloat16."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params = fresh(dtype)
        before = values(params)
        cases.run(cases.build(name, params, lr=0.1), params, rows(2, dtype))
        assert all(not torch.equal(a, b) for a, b in zip(values(params), before, strict=True))


def experts_are_separate_matrices(name: str) -> None:
    """A batch of experts takes the steps of a list of matrices, with their own parameter scale.

    Both sides of a gradient's own singular vectors leave a diagonal, and beside it the rounding of
    products, of which Lion takes signs: cosines for that one. LDAdam has no other first basis, and
    its Adam makes a step of d / eps of a rounding d: 3e-9 at its eps of 1e-8, if gradients are
    rounded otherwise, and 2e-13 at 1e-4. Of this shape "left" is "std", and "right" the other.
    """
    extras: list[dict[str, Any]] = [{}]
    if name == "GaLoreAdafactor":
        extras.append({"scale_parameter": True})
    start, grads = cases.parameter((3, 6, 10)).detach(), cases.gradients((3, 6, 10), 5)
    start = start * torch.tensor([1.0, 3.0, 0.2]).double()[:, None, None]
    for extra in extras:
        for proj_type in ("std", "right", "full"):
            own = {"proj_type": proj_type, **extra}
            if proj_type == "full":
                own |= {"eps": 1e-4} if name.startswith("LDAdam") else {"projector": "dct"}
            batch, _ = cases.train(name, start, grads, **own)
            for i in range(3):
                one, _ = cases.train(name, start[i], [g[i] for g in grads], **own)
                assert_close(batch[i], one)


def convolutions_are_flattened_matrices(name: str) -> None:
    """``(out, in, kh, kw)`` is ``(out, in * kh * kw)``."""
    start, grads = cases.parameter((6, 4, 3, 3)), cases.gradients((6, 4, 3, 3), 7)
    conv, _ = cases.train(name, start, grads)
    flat, _ = cases.train(name, start.flatten(1), [g.flatten(1) for g in grads])
    assert_close(conv.flatten(1), flat)


def tied_weights_step_once(name: str) -> None:
    """A weight used twice is one parameter with the sum of both gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)).double()
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    optimizer = cases.build(name, model.parameters())
    grads = []
    for x in torch.randn(4, 5, 9, dtype=torch.float64):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        grads.append(model[0].weight.grad.clone())
        optimizer.step()
    want, _ = cases.train(name, start, grads)
    assert torch.equal(model[0].weight, want)


def frozen_then_unfrozen(name: str) -> None:
    """Untouched and without state while frozen; then as if its training began that day."""
    still, other = (nn.Parameter(cases.parameter((6, 11)).detach()) for _ in range(2))
    start, grads = still.detach().clone(), cases.gradients((6, 11), 8)
    still.requires_grad_(False)
    optimizer = cases.build(name, [still, other], weight_decay=0.1)
    for grad in grads[:4]:
        other.grad = grad.clone()
        optimizer.step()
    assert torch.equal(still, start) and still not in optimizer.state
    still.requires_grad_(True)
    cases.run(optimizer, [still, other], [[g, g] for g in grads[4:]])
    want, _ = cases.train(name, start, grads[4:], weight_decay=0.1)
    assert_close(still, want)


def dtypes_do_not_mix(name: str) -> None:
    """float64, float32 and bfloat16 in one optimizer step as in three."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    params = [nn.Parameter(cases.parameter((6, 11), d).detach()) for d in dtypes]
    starts = values(params)
    grads = [cases.gradients((6, 11), 5, d) for d in dtypes]
    cases.run(cases.build(name, params), params, [list(r) for r in zip(*grads, strict=True)])
    for i, own in enumerate(grads):  # at its own place, which random methods are seeded by
        alone = [nn.Parameter(start.clone()) for start in starts]
        cases.run(cases.build(name, alone), [alone[i]], [[g] for g in own])
        assert torch.equal(params[i], alone[i])


def strides_do_not_matter(name: str) -> None:
    """Transposed storage, channels_last and every second column: as contiguous ones."""
    wide = torch.zeros(6, 22, dtype=torch.float64)
    layouts: dict[tuple[int, ...], list[Callable[[Tensor], Tensor]]] = {
        (6, 11): [lambda x: x.mT.contiguous().mT, lambda x: wide[:, ::2].copy_(x)],
        (6, 4, 3, 3): [lambda x: x.to(memory_format=torch.channels_last)],
        (3, 6, 10): [lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)],
    }
    for shape, strided in layouts.items():
        start, grads = cases.parameter(shape).detach(), cases.gradients(shape, 5)
        for rank in (cases.RANK, None):
            want, _ = cases.train(name, start, grads, rank=rank)
            for layout in strided:
                param = nn.Parameter(layout(start.clone()))
                stride = param.stride()
                assert not param.is_contiguous()
                optimizer = cases.build(name, [{"params": [param], "rank": rank}])
                for grad in grads:
                    param.grad = grad.as_strided(shape, grad.stride())
                    optimizer.step()
                assert param.stride() == stride
                assert_close(param, want)
                other = nn.Parameter(start.clone())  # strided gradient of a contiguous weight
                optimizer = cases.build(name, [{"params": [other], "rank": rank}])
                for grad in grads:
                    other.grad = layout(grad.clone())
                    optimizer.step()
                assert_close(other, want)


def maximising_is_minimising_the_negative(name: str) -> None:
    """``maximize`` on G is the plain step on -G, to the bit, for every kind of parameter."""
    up, down = fresh(), fresh()
    grads = rows(7)
    cases.run(cases.build(name, up, maximize=True, weight_decay=0.1), up, grads)
    negated = [[-g for g in row] for row in grads]
    cases.run(cases.build(name, down, weight_decay=0.1), down, negated)
    for a, b in zip(up, down, strict=True):
        assert_close(a, b)


def one_by_one_is_the_bucket(name: str) -> None:
    """``step_param`` on each parameter, in any order, is ``step``; staggered and random as well."""
    options: dict[str, Any] = {"projector": "rsvd", "stagger": True, "update_proj_gap": 4}
    together = [nn.Parameter(cases.parameter((24, 40), seed=i).detach()) for i in range(3)]
    together += fresh()
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    bucketed = cases.build(name, together, **options)
    single = cases.build(name, alone, **options)
    for step in range(6):
        for a, b in zip(together, alone, strict=True):
            a.grad = cases.gradients(a.shape, 1, seed=step)[0]
            b.grad = a.grad.clone()
        bucketed.step()
        for p in reversed(alone):
            single.step_param(p)
    assert same(together, alone)


def closures_see_gradients(name: str) -> None:
    """``step(closure)`` enables gradients for it, returns its loss, and steps on its gradients."""
    start, target = cases.parameter((6, 11)).detach(), cases.parameter((6, 11), seed=9).detach()
    param = nn.Parameter(start.clone())
    optimizer = cases.build(name, [param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param - target).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert_close(loss, (start - target).square().sum())
    want, _ = cases.train(name, start, [2 * (start - target)])
    assert torch.equal(param, want)


def decay_reaches_bfloat16_weights(name: str) -> None:
    """Stochastic rounding keeps a decay of 1e-3 a step, on a CPU and on an accelerator's path.

    The accelerator's path multiplied first, rounded to nearest, and so never decayed at all.
    """
    steps = 10  # the mean of thousands of entries strays by 2e-4; without decay it is off by 0.01
    for forced in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if forced:
                cases.branching(patch, lambda tensor: True)
            for shape in [(64, 64), (3, 40, 40)]:
                param = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
                options = {"stochastic_rounding": True, "lr": 1e-2, "weight_decay": 0.1}
                optimizer = cases.build(name, [param], **options)
                cases.run(optimizer, [param], [[torch.zeros_like(param)]] * steps)
                assert float(param.detach().double().mean()) == pytest.approx(
                    0.999**steps, abs=2e-3
                )


def branchless_is_branching(name: str) -> None:
    """The path of an accelerator, which never asks a value of the device, run on the CPU.

    A NaN among the gradients of the matrices must select, without a branch, what the other path
    skips: weights, moments and decay.
    """
    for bad in (1, 3):  # at a refresh is 3
        results = []
        for forced in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if forced:
                    cases.branching(patch, lambda tensor: True)
                params = [p for p in fresh() if p.dim() >= 2]
                optimizer = cases.build(name, params, weight_decay=0.1)
                grads = [[g for g in row if g.dim() >= 2] for row in rows(5)]
                grads[bad] = [g * float("nan") for g in grads[bad]]
                cases.run(optimizer, params, grads)
                states = [optimizer.state[p] for p in params]
                results.append((params, states))
        (params, states), (other, others) = results
        for a, b in zip(params, other, strict=True):
            assert_close(a, b)
            assert bool(a.isfinite().all())
        for s, t in zip(states, others, strict=True):
            assert s.keys() == t.keys()
            for key in s:
                assert_close(s[key], t[key], torch.float64)


CONTRACT: list[Callable[[str], None]] = [
    descends,
    an_empty_first_step_makes_all_state,
    state_is_total_after_one_step,
    no_gradients_no_step,
    every_parameter_moves,
    experts_are_separate_matrices,
    convolutions_are_flattened_matrices,
    tied_weights_step_once,
    frozen_then_unfrozen,
    dtypes_do_not_mix,
    strides_do_not_matter,
    maximising_is_minimising_the_negative,
    one_by_one_is_the_bucket,
    closures_see_gradients,
    branchless_is_branching,
    decay_reaches_bfloat16_weights,
]
