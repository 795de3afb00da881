"""What every projector must keep, a function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.draws import seeded
from lowrank_optim.subspaces import BasisChange, RefreshContext, make_projector
from lowrank_optim.subspaces.base import Subspace, view_for
from lowrank_optim.subspaces.target import Target
from lowrank_optim.tensors.matrix import MatrixView
from tests import cases
from tests.compare import assert_close

SHAPES = [(12, 31), (33, 14), (16, 16), (3, 12, 20), (3, 9)]
RANK = 4
MIRRORED = {"rows": "columns", "columns": "rows"}
"""Projectors named by the stored axis: what the transpose of a matrix calls them."""


def setup(projector: str, proj_type: str, shape: tuple[int, ...]) -> tuple[MatrixView, Any]:
    rank = cases.rank_for(projector, RANK)
    group = {"projector": projector, "rank": rank, "proj_type": proj_type, "scale": 1.0}
    view = view_for(group, shape)
    assert view is not None
    return view, make_projector(group, view)


def refresh(
    subspace: Subspace, view: MatrixView, grads: list[Tensor], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, BasisChange]]:
    """State after one refresh for each gradient, and how the last one moved."""
    state = subspace.init(view, grads[0])
    moved: dict[str, BasisChange] = {}
    for count, grad in enumerate(grads):
        ctx = RefreshContext(view, seeded(seed, 5, count), 5, count)
        moved = subspace.refresh_(state, view.of(grad), ctx)
    return state, moved


def orthonormal(projector: str, proj_type: str) -> None:
    """``P^T P = I`` to the parameter's precision, first and warm.

    Unit vectors rounded to bfloat16 have products off by at most one eps; in wider formats the
    factorisation itself leaves a few.
    """
    for shape in SHAPES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            view, subspace = setup(projector, proj_type, shape)
            for count in (1, 3):
                state, _ = refresh(subspace, view, cases.gradients(shape, count, dtype))
                if projector == "randk":  # its coordinates are entries: none twice, none outside
                    m, n, key = view.m, view.n, int(state["key"])
                    for tile in subspace.tiles(m, n, key, torch.empty(0)):
                        assert tile.places.unique().numel() == tile.places.numel()
                        assert int(tile.places.max()) < m * n
                    continue
                assert subspace.bases(state, view)
                for basis in subspace.bases(state, view):
                    # a basis known in closed form is as exact as anyone asks for
                    assert basis.dtype in (dtype, torch.float64) or "basis" not in state
                    gram = basis.double().mT @ basis.double()
                    eye = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram)
                    allowed = 1 if basis.dtype == torch.bfloat16 else 20
                    allowed *= torch.finfo(basis.dtype).eps
                    assert float((gram - eye).abs().max()) <= allowed


def coordinates_invert_the_lift(projector: str, proj_type: str) -> None:
    """``coords(lift(N)) = N`` for any coordinates N, so that nothing is counted twice."""
    for shape in SHAPES:
        view, subspace = setup(projector, proj_type, shape)
        state, _ = refresh(subspace, view, cases.gradients(shape, 2))
        (coord, low_shape), *others = subspace.coord_shapes(view).items()
        assert not others
        low = torch.randn(low_shape, dtype=torch.float64)
        lifted = torch.zeros(*view.batch, view.m, view.n, dtype=torch.float64)
        subspace.push_(Target(lifted, lifted, None, lr=-1.0), state, {coord: low}, None)
        assert_close(subspace.coords(state, lifted)[coord], low)


def deterministic(projector: str, proj_type: str) -> None:
    """A function of gradient, seed, index and count: never of torch's global generator."""
    for shape in SHAPES:
        view, subspace = setup(projector, proj_type, shape)
        grads = cases.gradients(shape, 3)
        torch.manual_seed(1)
        first, _ = refresh(subspace, view, grads)
        before = torch.get_rng_state()
        torch.manual_seed(2)
        other = torch.get_rng_state()
        second, _ = refresh(subspace, view, grads)
        assert torch.equal(torch.get_rng_state(), other) and not torch.equal(before, other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def owned(projector: str, proj_type: str) -> None:
    """Contiguous and alone in its storage: a slice would keep a whole SVD factor alive."""
    for shape in SHAPES:
        view, subspace = setup(projector, proj_type, shape)
        state, _ = refresh(subspace, view, cases.gradients(shape, 2))
        assert all(x.numel() for x in state.values())
        pointers = {x.untyped_storage().data_ptr() for x in state.values()}
        assert len(pointers) == len(state)
        for x in state.values():
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def says_how_it_moved(projector: str, proj_type: str) -> None:
    """``rotation`` is ``P_new^T P_old``, on both sides where both are projected."""
    for shape in SHAPES:
        view, subspace = setup(projector, proj_type, shape)
        grads = cases.gradients(shape, 2)
        old, _ = refresh(subspace, view, grads[:1])
        new, moved = refresh(subspace, view, grads)
        if projector == "block":
            assert not moved  # a tensor that stays active is where it was
            continue
        turn = moved["low"]
        if turn.carry is not None:  # entries: what both sets hold is found again, the rest is 0
            low = subspace.coords(old, view.of(grads[0]))["low"]
            lifted = torch.zeros(*view.batch, view.m, view.n, dtype=torch.float64)
            subspace.push_(Target(lifted, lifted, None, lr=-1.0), old, {"low": low}, None)
            want = subspace.coords(new, lifted)["low"]
            assert torch.equal(turn.carry(low), want)
            continue
        assert turn.rotation is not None
        before, after = subspace.bases(old, view), subspace.bases(new, view)
        assert_close(turn.rotation(), after[0].mT @ before[0])
        assert (turn.right is not None) == (len(after) == 2)
        if turn.right is not None:
            assert_close(turn.right(), after[1].mT @ before[1])
        for source, turned in ((turn.source, turn.rotation), (turn.source_right, turn.right)):
            if source is not None:
                assert turned is not None
                want = turned()
                moved_rows = torch.arange(want.shape[-1]) == source.unsqueeze(-1)
                assert torch.equal(moved_rows.to(want.dtype), want)


def transposes(projector: str, proj_type: str) -> None:
    """The basis of ``G^T`` on the other side is the basis of G."""
    if projector in cases.SINGLE:
        return  # they see a matrix as it is stored
    mirrored = {"left": "right", "right": "left"}.get(proj_type, proj_type)
    twin = MIRRORED.get(projector, projector)
    for shape in [(12, 31), (33, 14)]:
        view, subspace = setup(projector, proj_type, shape)
        flipped, mirror = setup(twin, mirrored, shape[::-1])
        grads = cases.gradients(shape, 2)
        state, _ = refresh(subspace, view, grads)
        other, _ = refresh(mirror, flipped, [g.mT for g in grads])
        other_bases = mirror.bases(other, flipped)
        if proj_type == "full":
            reseeded, _ = refresh(subspace, view, grads, seed=1)
            if any(not torch.equal(reseeded[key], state[key]) for key in state):
                continue  # two bases drawn in turn, whatever the side
            other_bases.reverse()
        for a, b in zip(subspace.bases(state, view), other_bases, strict=True):
            assert_close(a, b)


def survives_bad_gradients(projector: str, proj_type: str) -> None:
    """Zero, NaN and Inf at a due refresh: postponed and counted, and the next one is taken."""
    for shape in SHAPES:
        good, later = cases.gradients(shape, 2)
        for bad in (torch.zeros_like(good), good * float("nan"), good * float("inf")):
            param = torch.nn.Parameter(cases.parameter(shape).detach())
            options: dict[str, Any] = {"projector": projector, "proj_type": proj_type}
            options |= {"update_proj_gap": 2, "rank": cases.rank_for(projector, RANK)}
            rank = cases.rank_for(projector, min(RANK, *shape[-2:]))
            group = {"params": [param], "rank": rank}
            optimizer = cases.build("GaLoreAdamW", [group], **options)
            cases.run(optimizer, [param], [[good], [good]])
            (item,) = optimizer._items(optimizer.param_groups[0])
            assert item.subspace is not None and item.view is not None
            state = optimizer.state[param]
            if not item.subspace.needs_grad:  # nothing to wait for: only the step is skipped
                before = param.detach().clone()
                cases.run(optimizer, [param], [[bad]])
                assert torch.equal(param.detach(), before) or not bad.any()
                assert optimizer.postponed_refreshes() == {}
                cases.run(optimizer, [param], [[later]])
                assert bool(param.isfinite().all()) and not torch.equal(param.detach(), before)
                continue
            kept = [x.clone() for x in item.subspace.bases(state, item.view)]
            cases.run(optimizer, [param], [[bad]])
            now = item.subspace.bases(state, item.view)
            assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
            assert optimizer.postponed_refreshes() == {"parameter 0": 1}
            cases.run(optimizer, [param], [[later]])
            assert int(optimizer.state[param]["refresh_step"]) == 3
            assert bool(param.isfinite().all())


CONTRACT: list[Callable[[str, str], None]] = [
    orthonormal,
    coordinates_invert_the_lift,
    deterministic,
    owned,
    says_how_it_moved,
    transposes,
    survives_bad_gradients,
]
