"""Facts about projection: 1 to 8 and 14 of the list in the GaLore fact sheet, by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import PROJECTORS
from lowrank_optim.rules import AdamW
from lowrank_optim.subspaces.base import view_for
from tests import cases
from tests.compare import assert_close, relative
from tests.pairwise import in_turns

PLAIN: dict[str, Any] = {"scale": 1.0, "weight_decay": 0.0}

PROJECTING = [name for name in cases.distinct_names() if name in cases.projecting_names()]


@pytest.mark.filterwarnings("ignore:rank 99 is clamped")
@pytest.mark.parametrize("projector", cases.projector_names())
@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
def test_fact_01_full_rank_sgd_is_sgd(proj_type: str, projector: str) -> None:
    """With all directions kept and a linear rule, ``dW = -lr G``.

    A basis of min(m, n) directions of the larger side spans the gradient it was found from. One
    that is not found from it leaves a part out there, and that part is orthogonal to the step:
    ``|dW|^2 + |dW + lr G|^2 = |lr G|^2``.
    """
    for shape in [(6, 11), (13, 7), (8, 8)]:
        view = view_for({"projector": projector, "proj_type": proj_type}, shape)
        assert view is not None
        spans_all = view.m <= view.n and (proj_type != "full" or view.m == view.n)
        spans_all |= projector not in cases.basis_names() or PROJECTORS[projector].fitted
        for dtype, bound in [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]:
            start, (grad,) = torch.zeros(shape, dtype=dtype), cases.gradients(shape, 1, dtype)
            options = {**PLAIN, "proj_type": proj_type, "projector": projector, "momentum": 0.0}
            got, _ = cases.train("GaLoreSGD", start, [grad], rank=99, lr=0.5, **options)
            left = relative(got, -0.5 * grad)
            if spans_all:
                assert left < bound
            else:
                moved = float(got.double().norm() / (0.5 * grad.double()).norm())
                assert moved**2 + left**2 == pytest.approx(1.0, abs=4 * bound)


@pytest.mark.filterwarnings("ignore:rank")
def test_fact_02_full_rank_adam_is_not_adam_but_momentum_is_momentum() -> None:
    """Adam's square root is not rotation-equivariant: equality would mean a bypassed projection.

    Momentum is linear, so at full rank it is torch's, as long as no refresh carries it over.
    """
    start, grads = cases.parameter((12, 20)), cases.gradients((12, 20), 5)
    options = {**PLAIN, "rank": 12, "update_proj_gap": 100}

    def torch_run(cls: type[torch.optim.Optimizer], **kwargs: Any) -> Tensor:
        param = torch.nn.Parameter(start.detach().clone())
        cases.run(cls([param], **kwargs), [param], [[g] for g in grads])
        return param - start

    ours = cases.train("GaLoreAdamW", start, grads, lr=1e-2, **options)[0] - start
    adam = torch_run(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    assert relative(ours, adam) > 0.3

    ours = cases.train("GaLoreSGD", start, grads, lr=1e-2, momentum=0.9, **options)[0] - start
    assert_close(ours, torch_run(torch.optim.SGD, lr=1e-2, momentum=0.9))


@pytest.mark.parametrize("shape", [(6, 11), (13, 7)])
@pytest.mark.parametrize("projector", cases.projector_names())
def test_fact_03_first_adam_step_has_known_norm_and_rank(
    projector: str, shape: tuple[int, int]
) -> None:
    """Every entry of the first direction is +-1 at eps = 0, so ``|dW| = lr scale sqrt(r l)``.

    r l is the number of coordinates: three directions times the other side. Single entries are as
    many, but of full rank; a block has all, and no scale.
    """
    lr, rank = 1e-2, 3
    start, grads = cases.parameter(shape), cases.gradients(shape, 1)
    options = {"lr": lr, "scale": 0.25, "rank": rank, "eps": 0.0, "weight_decay": 0.0}
    got, optimizer = cases.train("GaLoreAdamW", start, grads, projector=projector, **options)
    (item,) = optimizer._items(optimizer.param_groups[0])
    assert item.subspace is not None and item.view is not None
    step = got - start.detach()
    size = lr if projector == "block" else lr * 0.25
    count = {"block": start.numel(), "randk": rank * max(shape)}.get(projector, rank * item.view.n)
    assert float(step.norm()) == pytest.approx(size * count**0.5, rel=1e-9)
    if projector in cases.SINGLE:
        assert int((step != 0).sum()) == count
        return
    assert int(torch.linalg.matrix_rank(step, rtol=1e-9)) == rank
    (state,) = optimizer.state.values()
    (basis,), step = item.subspace.bases(state, item.view), item.view.of(step)
    assert float((step - basis @ (basis.mT @ step)).norm() / step.norm()) < 1e-12


@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
def test_fact_04_weights_move_within_the_spans_of_the_bases(proj_type: str) -> None:
    """Within a period dW stays in one span of r directions; q periods make a rank of q r."""
    start, rank, gap = cases.parameter((13, 17)), 2, 3
    grads = cases.gradients((13, 17), 9)
    options = {"rank": rank, "update_proj_gap": gap, "weight_decay": 0.0, "proj_type": proj_type}
    for steps in (1, 2, 3, 4, 6, 7, 9):
        got, _ = cases.train("GaLoreAdamW", start, grads[:steps], **options)
        bases = -(-steps // gap)
        assert int(torch.linalg.matrix_rank(got - start, rtol=1e-9)) == bases * rank


@pytest.mark.parametrize("shape", [(6, 11), (13, 7)])
def test_fact_06_moments_are_carried_over_a_refresh_bit_for_bit(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``on_refresh="keep"``: the step after a refresh starts from the very moments before it."""
    param = torch.nn.Parameter(cases.parameter(shape).detach())
    optimizer = cases.build("GaLoreAdamW", [param], rank=3, update_proj_gap=3)
    *before, grad = cases.gradients(shape, 4)
    cases.run(optimizer, [param], [[g] for g in before])
    state = optimizer.state[param]
    kept = [state[k].clone() for k in ("basis", "low.exp_avg", "low.exp_avg_sq")]
    met: list[Tensor] = []
    adapt = AdamW.directions_

    def watch(rule: AdamW, grads: Any, slots: Any, *rest: Any) -> Any:
        met.extend(x.clone() for x in slots[0])
        return adapt(rule, grads, slots, *rest)

    monkeypatch.setattr(AdamW, "directions_", watch)
    cases.run(optimizer, [param], [[grad]])
    assert not torch.equal(state["basis"], kept[0])
    assert [torch.equal(a, b) for a, b in zip(met, kept[1:], strict=True)] == [True, True]


def test_fact_07a_the_sign_of_a_basis_does_not_matter_within_a_period() -> None:
    """``(-P)`` and ``(-M)`` describe the same state: bit-identical weights."""
    results = []
    for sign in (1, -1):
        param = torch.nn.Parameter(cases.parameter((6, 11)).detach())
        optimizer = cases.build("GaLoreAdamW", [param], rank=3, update_proj_gap=100)
        first, *rest = cases.gradients((6, 11), 6)
        cases.run(optimizer, [param], [[first]])
        optimizer.state[param]["basis"].mul_(sign)
        optimizer.state[param]["low.exp_avg"].mul_(sign)
        cases.run(optimizer, [param], [[g] for g in rest])
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "proj_type"), in_turns(PROJECTING, cases.PROJ_TYPES))
def test_fact_07b_signs_of_the_svd_driver_do_not_matter(
    name: str, proj_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular vectors have arbitrary signs. The release lets them through to carried moments.

    There, negating the second basis changed an 8-step run by 71 %; here bases are sign-aligned,
    so a driver that flips signs from its first call on changes not one bit.
    """
    start, grads = cases.parameter((6, 11)), cases.gradients((6, 11), 8)
    options = {"proj_type": proj_type, "projector": "svd"}
    want, _ = cases.train(name, start, grads, **options)
    exact, calls = torch.linalg.svd, []

    def flipping(*args: Any, **kwargs: Any) -> Any:
        u, s, vh = exact(*args, **kwargs)
        signs = torch.where(torch.rand(s.shape) < 0.5, -1.0, 1.0).to(u.dtype)
        calls.append(int((signs < 0).sum()))
        return torch.return_types.linalg_svd((u * signs.unsqueeze(-2), s, vh * signs.unsqueeze(-1)))

    monkeypatch.setattr(torch.linalg, "svd", flipping)
    got, _ = cases.train(name, start, grads, **options)
    assert sum(calls[1:]) > 0
    assert torch.equal(got, want)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("name", PROJECTING)
def test_fact_08_training_on_the_transpose_is_the_transpose(name: str, proj_type: str) -> None:
    """For non-square matrices the side follows the shape, so a tall run mirrors a wide one."""
    start, grads = cases.parameter((7, 12)), cases.gradients((7, 12), 7)
    wide, _ = cases.train(name, start, grads, proj_type=proj_type)
    tall, _ = cases.train(name, start.mT, [g.mT for g in grads], proj_type=proj_type)
    assert_close(tall.mT, wide)


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize(
    ("name", "rank"),
    [  # a side is that of any rank below it, and of any above it
        pytest.param(
            name, rank, marks=pytest.mark.slow if name.endswith("8bit") or (i + j) % 3 == 0 else ()
        )
        for i, name in enumerate(cases.method_names())
        for j, rank in enumerate((3, 6, 99))
    ],
)
def test_fact_14_the_side_is_decided_once_also_when_the_rank_reaches_it(
    name: str, rank: int
) -> None:
    """``reverse_std`` on a wide matrix with r >= m works; the release crashes.

    It infers the side from the low-rank shape, which is then square. ``reverse_std`` is ``right``
    for a wide matrix and ``left`` for a tall one, ``std`` the other way; a square one goes right.
    """
    same = {
        (6, 11): [("std", "left"), ("reverse_std", "right")],
        (11, 6): [("std", "right"), ("reverse_std", "left")],
        (8, 8): [("std", "right"), ("reverse_std", "left")],
    }
    for shape, pairs in same.items():
        start, grads = cases.parameter(shape), cases.gradients(shape, 4)
        results = {
            kind: cases.train(name, start, grads, proj_type=kind, rank=rank)[0]
            for pair in pairs
            for kind in pair
        }
        for first, second in pairs:
            assert torch.equal(results[first], results[second])
        moved = {k: relative(v, start) for k, v in results.items()}
        assert min(moved.values()) > 1e-4
