"""A gradient becomes its coordinates: in which basis and format, and how those of others add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.plan import ParamPlan, State, Strategies, mixed, on_accelerator
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.step import CHUNK_BYTES
from lowrank_optim.groups import Group
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import identity
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import Coords, ProjectedGrad


def items_of(optimizer: LowRankOptimizer) -> Iterator[tuple[Group, ParamPlan]]:
    """Every parameter, and its group."""
    for group in optimizer.param_groups:
        for item in optimizer._items(group):
            yield group, item


FIRST_BASES = ("micro", "boundary")
COORDS_DTYPES = ("auto", "float32", "bfloat16")


def check_choices(first_basis: str, coords_dtype: str) -> None:
    """Raise unless both are among what :func:`~lowrank_optim.attach_in_backward` knows.

    Raises:
        ValueError: one is not.
    """
    if first_basis not in FIRST_BASES:
        raise ValueError(f"first_basis must be 'micro' or 'boundary', got {first_basis!r}")
    if coords_dtype not in COORDS_DTYPES:
        names = "'auto', 'float32' or 'bfloat16'"
        raise ValueError(f"coords_dtype must be {names}, got {coords_dtype!r}")


def check_projecting(optimizer: LowRankOptimizer) -> None:
    """Raise if coordinates are not all that a step needs, or a gradient would always stay whole.

    Raises:
        ValueError: naming the parameter.
    """
    name = type(optimizer).__name__
    for group, item in items_of(optimizer):
        if item.subspace is None or not item.alone:
            continue
        if isinstance(item.subspace, Block):
            raise ValueError(
                f"{name} takes {item.name} whole or not at all, and mode='project' frees "
                "gradients for coordinates: use mode='step'"
            )
        residual = optimizer.residual(group)
        if not isinstance(residual, Drop) or item.subspace.applies_grad(None):
            raise ValueError(
                f"{name} uses what its subspace does not see of the "
                f"gradient of {item.name}, which mode='project' frees: use mode='step'"
            )
        if optimizer._strategies(group).gap == 1:
            raise ValueError(
                f"{name} moves the subspace of {item.name} at every step, and mode='project' "
                "keeps a gradient whole where it is to move: use mode='step', or refresh less "
                "often where the method allows it (update_proj_gap)"
            )


def kept_dtype(dtype: torch.dtype, coords_dtype: str) -> torch.dtype:
    """The format that coordinates found in ``dtype`` are kept in.

    ``"auto"`` keeps those of bfloat16 products as they come: one gradient alone loses nothing.
    """
    if coords_dtype == "bfloat16" or (coords_dtype == "auto" and dtype == torch.bfloat16):
        return torch.bfloat16
    return compute_dtype(dtype)


def coords_of(item: ParamPlan, state: State, grad: Tensor) -> Coords:
    """Coordinates as the subspace finds them, not finite where the gradient is not."""
    assert item.view is not None and item.subspace is not None
    grad = item.view.of(grad)
    coords = item.subspace.coords(state, grad, reduce=identity)
    if not item.subspace.sees_all:
        nothing = torch.linalg.vector_norm(ops.matrix_norm(grad)) * 0  # or NaN
        coords = {name: x.add_(nothing) for name, x in coords.items()}
    return coords


def unborn() -> State:
    """As much of the state of a parameter as a first basis needs; the rest comes with a step."""
    counters = {"step": 0.0, "refresh_step": -1.0, "postponed": 0.0}
    return {k: torch.tensor(x) for k, x in counters.items()}


Take = Callable[[ProjectedGrad, Tensor], Coords]


def projected(
    item: ParamPlan, state: State, grad: Tensor, chosen: Strategies, coords_dtype: str
) -> ProjectedGrad:
    """The gradient in the basis in use, to which more gradients can be added."""
    return _begun(
        item, grad, lambda _, more: coords_of(item, state, more), state, chosen, coords_dtype
    )


def first_projected(
    item: ParamPlan, state: State, grad: Tensor, chosen: Strategies, coords_dtype: str
) -> ProjectedGrad:
    """The gradient in a first basis found from itself, which only a step makes part of the state.

    So a step that ``GradScaler`` skips leaves nothing behind. A gradient that is zero says nothing:
    the next one is asked again. One that is not finite is not finite in any coordinates.
    """
    assert item.subspace is not None and item.view is not None
    view, basis = item.view, item.subspace.init(item.view, item.param)
    step = int(state["step"])
    counters = {k: float(state[k]) for k in ("refresh_step", "postponed")}

    def take(held: ProjectedGrad, more: Tensor) -> Coords:
        norm = float(torch.linalg.vector_norm(ops.matrix_norm(view.of(more))))
        if not held.fresh and norm != 0 and math.isfinite(norm):
            found = {**{k: torch.tensor(x) for k, x in counters.items()}, **basis}
            refresh_(item, found, view.of(more), step, chosen)
            held.fresh.update(found)
        coords = coords_of(item, held.fresh or basis, more)
        return coords if math.isfinite(norm) else {k: x.fill_(norm) for k, x in coords.items()}

    return _begun(item, grad, take, state, chosen, coords_dtype)


def _begun(
    item: ParamPlan, grad: Tensor, take: Take, state: State, chosen: Strategies, coords_dtype: str
) -> ProjectedGrad:
    """A first gradient; what comes later is added in float32 and rounded by a seed of its own.

    The seed is of optimizer, parameter, step and number of the gradient, so that a run that is
    resumed rounds as one that was not interrupted.
    """
    own = mixed(chosen.seed, item.uid, int(state["step"]), 4)

    def add_(held: ProjectedGrad, more: Tensor, alpha: float) -> None:
        for n, (name, x) in enumerate(take(held, more).items()):
            _add_(held.coords[name], x, alpha, mixed(own, held.count, n))

    out = ProjectedGrad(item.param, {}, add_)
    for n, (name, x) in enumerate(take(out, grad).items()):
        dtype = kept_dtype(x.dtype, coords_dtype)
        if x.dtype != dtype == torch.bfloat16:
            x = ops.stochastic_round(x.float(), mixed(own, 0, n))
        out.coords[name] = x.to(dtype).contiguous()
    return out


def _add_(held: Tensor, more: Tensor, alpha: float, seed: int) -> None:
    """``R <- R + alpha R'``; into bfloat16 rounded without bias, or small terms would be lost."""
    if held.dtype != torch.bfloat16:
        held.add_(more, alpha=alpha)
        return
    size = CHUNK_BYTES[on_accelerator(held)] // 4
    pieces = (torch.split(x, size) for x in (held.view(-1), more.reshape(-1)))
    for n, (piece, x) in enumerate(zip(*pieces, strict=True)):
        total = piece.float().add_(x, alpha=alpha)
        piece.copy_(ops.stochastic_round(total, mixed(seed, n)))
