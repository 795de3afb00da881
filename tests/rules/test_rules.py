"""Rules against torch's own optimizers, or the paper's line where torch has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, GaLoreLion, GaLoreSGD, ops
from lowrank_optim.rules import SGD, Adafactor, AdamW, Lion, Rule
from tests import cases
from tests.compare import assert_close

SHAPES = [(), (7,), (5, 6), (4, 3, 2, 2)]


def compare(ours: Any, theirs: Any, args: dict[str, Any], reference: dict[str, Any]) -> None:
    """Dense parameters of every shape, ten steps, float64: the same weights after each."""
    for shape in SHAPES:
        mine = torch.nn.Parameter(cases.parameter(shape).detach())
        other = torch.nn.Parameter(mine.detach().clone())
        optimizer = ours([{"params": [mine], "rank": None}], **args)
        torch_optimizer = theirs([other], **reference)
        for grad in cases.gradients(shape, 10):
            cases.run(optimizer, [mine], [[grad]])
            cases.run(torch_optimizer, [other], [[grad]])
            assert_close(mine, other)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "momentum, dampening, nesterov",
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.4, False), (0.9, 0.0, True)],
)
def test_sgd_is_torch_sgd(
    momentum: float, dampening: float, nesterov: bool, maximize: bool
) -> None:
    """Without decay, which torch couples; the momentum starts as the first gradient."""
    args = {"lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    args |= {"maximize": maximize}
    compare(GaLoreSGD, torch.optim.SGD, args, args)


def test_adafactor_is_torch_adafactor() -> None:
    """torch's ``lr`` is the cap of the relative step; 1e-2 in the paper.

    Without decay: torch decays by that cap, the release by the relative step, and so do we.

    Not for three dimensions: torch clips and scales over all of a batch, ours keeps its matrices
    apart. A dense convolution was once clipped kernel by kernel.
    """
    for shape in SHAPES:
        mine = torch.nn.Parameter(cases.parameter(shape).detach())
        other = torch.nn.Parameter(mine.detach().clone())
        ours = GaLoreAdafactor([{"params": [mine], "rank": None}])
        theirs = torch.optim.Adafactor([other], lr=1e-2, eps=(1e-30, 1e-3))
        for grad in cases.gradients(shape, 10):
            cases.run(ours, [mine], [[grad]])
            cases.run(theirs, [other], [[grad]])
            assert_close(mine, other)


def test_adafactor_takes_its_constants_from_the_group() -> None:
    """arXiv:1804.04235, algorithm 4, at constants that are not the published ones."""
    param = torch.nn.Parameter(cases.parameter((5, 6)).detach() * 0.1)
    optimizer = GaLoreAdafactor(
        [{"params": [param], "rank": None}],
        lr=0.1, eps=(0.2, 0.5), clip_threshold=0.6, decay_rate=-0.6,
        relative_step=False, scale_parameter=True,
    )  # fmt: skip
    w, row, col = param.detach().clone(), torch.zeros(5).double(), torch.zeros(6).double()
    for t, grad in enumerate(cases.gradients((5, 6), 4), 1):
        cases.run(optimizer, [param], [[grad]])
        square, beta2 = grad**2 + 0.2, 1 - t**-0.6
        row = beta2 * row + (1 - beta2) * square.mean(1)
        col = beta2 * col + (1 - beta2) * square.mean(0)
        u = grad / (torch.outer(row, col) / row.mean()).sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()) / 0.6)
        w = w - 0.1 * max(0.5, float(w.square().mean().sqrt())) * u
        assert_close(param, w)


def test_lion_is_its_paper() -> None:
    """arXiv:2302.06675, algorithm 2: decay decoupled, sign of the interpolation, then momentum."""
    for shape in SHAPES:
        param = torch.nn.Parameter(cases.parameter(shape).detach())
        optimizer = GaLoreLion(
            [{"params": [param], "rank": None}], lr=0.1, betas=(0.8, 0.95), weight_decay=0.3
        )
        w, m = param.detach().clone(), torch.zeros(shape, dtype=torch.float64)
        for grad in cases.gradients(shape, 10):
            cases.run(optimizer, [param], [[grad]])
            w = w - 0.1 * (torch.sign(0.8 * m + 0.2 * grad) + 0.3 * w)
            m = 0.95 * m + 0.05 * grad
            assert_close(param, w)


def fresh(rule: Rule, g: Tensor) -> list[Tensor]:
    return [torch.zeros(s.shape(g.shape), dtype=g.dtype) for s in rule.slots(g.shape)]


RULES: list[Rule] = [
    AdamW(betas=(0.8, 0.95)),
    Lion(),
    SGD(momentum=0.9),
    SGD(momentum=0.9, nesterov=True),
    SGD(),
    Adafactor(),
    Adafactor(beta1=0.9),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_directions_of_a_list_are_those_of_each_and_gradients_stay(rule: Rule) -> None:
    """list = loop, also when the gradients are at different steps."""
    shapes = [(3, 5), (4, 4), (6,)]
    slots = [fresh(rule, torch.zeros(s, dtype=torch.float64)) for s in shapes]
    alone = [[x.clone() for x in own] for own in slots]
    for step in range(1, 5):
        grads = [cases.gradients(s, 1, seed=step)[0] for s in shapes]
        kept = [g.clone() for g in grads]
        times = [float(step + i) for i in range(len(shapes))]
        directions, corrections = rule.directions_(grads, slots, times)
        for i, g in enumerate(kept):
            assert torch.equal(grads[i], g)
            (one,), (correction,) = rule.directions_([g], [alone[i]], [times[i]])
            assert torch.equal(directions[i], one) and corrections[i] == correction
            assert all(torch.equal(a, b) for a, b in zip(slots[i], alone[i], strict=True))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_constant_gradient_gives_its_own_moments_after_correction(rule: Rule) -> None:
    """``biases`` is what a moving mean of ones has reached."""
    g = torch.full((3, 4), 2.0, dtype=torch.float64)
    slots = fresh(rule, g)
    for step in range(1, 6):
        rule.directions_([g], [slots], [float(step)])
    if isinstance(rule, AdamW):
        m, v = (x / b for x, b in zip(slots, rule.biases(5.0), strict=True))
        assert_close(m, g)
        assert_close(v, g.square())
    for slot, x in zip(rule.slots(g.shape), slots, strict=True):
        if slot.averaged is not None:
            assert_close(x, torch.full_like(x, 4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases.method_names())
def test_dense_tiles_are_the_whole(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large dense tensor is stepped a few rows at a time; the bits do not depend on how many."""
    start, grads = cases.parameter((13, 7), dtype), cases.gradients((13, 7), 3, dtype)
    whole, _ = cases.train(name, start, grads, rank=None)
    monkeypatch.setattr(ops.tiles, "TILE_ELEMENTS", 15)
    tiled, _ = cases.train(name, start, grads, rank=None)
    assert torch.equal(whole, tiled)


def test_adamw_takes_any_lr_that_torch_takes() -> None:
    """float, int and 0-d tensor are one learning rate, for low-rank parameters too."""
    start, grads = cases.parameter((6, 11)), cases.gradients((6, 11), 4)
    want, _ = cases.train("GaLoreAdamW", start, grads, lr=1.0)
    for lr in (1, torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor([1.0])):
        got, _ = cases.train("GaLoreAdamW", start, grads, lr=lr)
        assert_close(got, want)
    assert GaLoreAdamW([torch.nn.Parameter(torch.ones(2, 2))]).defaults["lr"] == 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_different_ages_are_corrected_one_by_one(dtype: torch.dtype) -> None:
    """Each row with its own age is AdamW on that row alone, at that step; age 0 stands still."""
    rule = AdamW((0.9, 0.999), 1e-3)
    grad, ages = torch.randn(3, 7, dtype=dtype), torch.tensor([1.0, 5.0, 0.0])

    def direction(g: Tensor, step: float, own: Tensor | None = None) -> Tensor:
        slots = [[torch.full_like(g, 0.3), torch.full_like(g, 0.2)]]
        given = () if own is None else [own]
        ((out,), (factor,)) = rule.directions_([g], slots, [step], ages=given)
        return out * factor

    together = direction(grad, 99.0, ages)
    assert_close(together[0], direction(grad[0], 1.0))
    assert_close(together[1], direction(grad[1], 5.0))
    assert not together[2].any()


# ------------------------------------------------------------------ Adafactor's learning rate


def adafactor_ends(**options: Any) -> torch.Tensor:
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdafactor([param], rank=2, **options)
    param.grad = torch.ones(8, 6)
    optimizer.step()
    return 1 - param.detach()


def test_a_learning_rate_alone_is_obeyed() -> None:
    """1e-9 and 1.0 ended alike: ``relative_step`` was on, and nothing said so."""
    small, large = (adafactor_ends(lr=lr, scale_parameter=False).norm() for lr in (1e-3, 1e-1))
    torch.testing.assert_close(large / small, torch.tensor(100.0), rtol=1e-3, atol=0)
    assert adafactor_ends().equal(adafactor_ends(relative_step=True))


def test_a_learning_rate_that_nothing_reads_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(8, 6))
    for call in (
        lambda: GaLoreAdafactor([param], lr=0.1, relative_step=True),
        lambda: GaLoreAdafactor([{"params": [param], "lr": 0.1, "relative_step": True}]),
    ):
        with pytest.raises(ValueError, match=r"lr=0\.1 has no effect with relative_step=True"):
            call()
    with pytest.raises(ValueError, match="relative_step=False needs a learning rate"):
        GaLoreAdafactor([param], relative_step=False)
    with pytest.raises(ValueError, match="warmup_init=True has no effect"):
        GaLoreAdafactor([param], lr=0.1, warmup_init=True)
    optimizer = GaLoreAdafactor([param])
    param.grad = torch.ones(8, 6)
    optimizer.param_groups[0]["lr"] = 0.1  # by whoever thinks that it is read
    with pytest.raises(ValueError, match=r"lr=0\.1 has no effect"):
        optimizer.step()
    assert not optimizer.state


def test_groups_may_differ_in_whose_step_sizes_they_take() -> None:
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = GaLoreAdafactor([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}])
    assert [(g["lr"], g["relative_step"]) for g in optimizer.param_groups] == [
        (0.1, False),
        (None, True),
    ]


def test_an_older_checkpoint_of_relative_steps_loads() -> None:
    """It has an ``lr`` that nothing read."""
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdafactor([param], rank=2)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 1e-3
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is None
