"""A gradient becomes its coordinates: in which basis and format, and how those of others add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine import answers
from lowrank_optim.engine.bucket import CHUNK_BYTES
from lowrank_optim.engine.draws import mixed
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.groups import Group
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import Coords, ProjectedGrad


def items_of(optimizer: LowRankOptimizer) -> Iterator[tuple[Group, ParamPlan]]:
    """Every parameter, and its group."""
    for group in optimizer.param_groups:
        for plan in optimizer._items(group):
            yield group, plan


class Plans:
    """The group and plan of a parameter, looked up again when groups were edited or loaded."""

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[Tensor, tuple[Group, list[ParamPlan], ParamPlan]] = {}

    def find(self, param: Tensor) -> tuple[Group, ParamPlan] | None:
        """None of a parameter that the optimizer has not."""
        groups = self._optimizer.param_groups
        known = self._known.get(param)
        if known is not None:
            group, plans, plan = known
            here = any(g is group for g in groups)
            if here and self._optimizer._is_planned(group, plans, plan):
                return group, plan
        self._known = {
            plan.param: (group, plans, plan)
            for group in groups
            for plans in [self._optimizer._items(group)]
            for plan in plans
        }
        known = self._known.get(param)
        return None if known is None else (known[0], known[2])


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


def check_projecting(
    optimizer: LowRankOptimizer,
    who: str = "mode='project'",
    does: str = "frees",
    instead: str = "use mode='step'",
) -> None:
    """Raise if coordinates are not all that a step needs, or a gradient would always stay whole.

    Args:
        optimizer: the optimizer.
        who: that keeps coordinates alone, for the message.
        does: with the rest.
        instead: what to do.

    Raises:
        ValueError: naming the parameter.
    """
    name = type(optimizer).__name__
    for group, plan in items_of(optimizer):
        if plan.subspace is None or not plan.alone:
            continue
        if isinstance(plan.subspace, Block):
            raise ValueError(
                f"{name} takes {plan.name} whole or not at all, and {who} keeps coordinates of "
                f"gradients alone: {instead}"
            )
        residual = optimizer.residual(group)
        if not isinstance(residual, Drop) or plan.subspace.applies_grad(None):
            raise ValueError(
                f"{name} uses what its subspace does not see of the "
                f"gradient of {plan.name}, which {who} {does}: {instead}"
            )
        if optimizer._strategies(group).gap == 1:
            raise ValueError(
                f"{name} moves the subspace of {plan.name} at every step, and {who} "
                f"keeps a gradient whole where it is to move: {instead}, or refresh less "
                "often where the method allows it (update_proj_gap)"
            )


def kept_dtype(dtype: torch.dtype, coords_dtype: str) -> torch.dtype:
    """The format that coordinates found in ``dtype`` are kept in.

    ``"auto"`` keeps those of bfloat16 products as they come: one gradient alone loses nothing.
    """
    if coords_dtype == "bfloat16" or (coords_dtype == "auto" and dtype == torch.bfloat16):
        return torch.bfloat16
    return compute_dtype(dtype)


def coords_of(plan: ParamPlan, state: State, grad: Tensor, based: bool = True) -> Coords:
    """Coordinates as the subspace finds them, not finite where the gradient is not.

    Args:
        plan: of the parameter.
        state: likewise.
        grad: its gradient.
        based: whether there was a basis before this step: coordinates of none are zeros.
    """
    assert plan.view is not None and plan.subspace is not None
    return matrix_coords(plan.subspace, state, plan.view.of(grad), based)


def matrix_coords(subspace: Subspace, state: State, grad: Tensor, based: bool = True) -> Coords:
    """The same of a gradient in the canonical view, or of some of its columns."""
    coords = subspace.coords(state, grad)
    if not (subspace.sees_all and based):
        nothing = torch.linalg.vector_norm(ops.matrix_norm(grad)) * 0  # or NaN
        coords = {name: x.add_(nothing) for name, x in coords.items()}
    return coords


def first_state() -> State:
    """As much of the state of a parameter as a first basis needs; the rest comes with a step."""
    return _counters({"step": 0.0, "refresh_step": -1.0, "postponed": 0.0})


def _counters(given: Mapping[str, float]) -> State:
    return {key: torch.tensor(x, dtype=torch.float32) for key, x in given.items()}


Take = Callable[[ProjectedGrad, Tensor], Coords]


def projected(
    plan: ParamPlan,
    state: State,
    grad: Tensor,
    strategies: Strategies,
    coords_dtype: str,
    salt: Sequence[int] = (),
    based: bool = True,
) -> ProjectedGrad:
    """The gradient in the basis in use, to which more gradients can be added.

    ``salt`` tells roundings of this rank from those of others; ``based`` is as of
    :func:`coords_of`.
    """

    def take(_: ProjectedGrad, more: Tensor) -> Coords:
        return coords_of(plan, state, more, based)

    return _begin(plan, grad, take, state, strategies, coords_dtype, salt)


def first_projected(
    plan: ParamPlan,
    state: State,
    grad: Tensor,
    strategies: Strategies,
    coords_dtype: str,
    salt: Sequence[int] = (),
) -> ProjectedGrad:
    """The gradient in a first basis found from itself, which only a step makes part of the state.

    So a step that ``GradScaler`` skips leaves nothing behind. A gradient that is zero says nothing:
    the next one is asked again. One that is not finite is not finite in any coordinates.
    """
    assert plan.subspace is not None and plan.view is not None
    view, basis = plan.view, plan.subspace.init(plan.view, plan.param)
    step = int(state["step"])
    counters = {k: float(state[k]) for k in ("refresh_step", "postponed")}

    def find_(fresh: State, more: Tensor) -> None:
        found = {**_counters(counters), **basis}
        refresh_(plan, found, view.of(more), step, strategies, later=True)
        fresh.update(found)

    def take(projected_grad: ProjectedGrad, more: Tensor) -> Coords:
        fresh = projected_grad.fresh
        if on_accelerator(more):  # which selects zeros where a gradient says nothing
            answers.settle_(fresh)  # of a gradient before this one, whose backward is over
            if float(fresh.get("refresh_step", -1.0)) < 0:
                find_(fresh, more)
            return coords_of(plan, fresh, more)
        norm = float(torch.linalg.vector_norm(ops.matrix_norm(view.of(more))))
        if not fresh and norm != 0 and math.isfinite(norm):
            find_(fresh, more)
        coords = coords_of(plan, fresh or basis, more)
        return coords if math.isfinite(norm) else {k: x.fill_(norm) for k, x in coords.items()}

    return _begin(plan, grad, take, state, strategies, coords_dtype, salt)


def _begin(
    plan: ParamPlan,
    grad: Tensor,
    take: Take,
    state: State,
    strategies: Strategies,
    coords_dtype: str,
    salt: Sequence[int],
) -> ProjectedGrad:
    """A first gradient; what comes later is added in float32 and rounded by a seed of its own.

    The seed is of optimizer, parameter, step and number of the gradient, so that a run that is
    resumed rounds as one that was not interrupted.
    """
    seed = mixed(strategies.seed, plan.uid, int(state["step"]), 4, *salt)

    def add_(projected_grad: ProjectedGrad, more: Tensor, alpha: float) -> None:
        for n, (name, x) in enumerate(take(projected_grad, more).items()):
            _add_(projected_grad.coords[name], x, alpha, mixed(seed, projected_grad.count, n))

    out = ProjectedGrad(plan.param, {}, add_)
    for n, (name, x) in enumerate(take(out, grad).items()):
        dtype = kept_dtype(x.dtype, coords_dtype)
        if x.dtype != dtype == torch.bfloat16:
            x = ops.stochastic_round(x.float(), ops.Noise.over(mixed(seed, 0, n), x.shape))
        out.coords[name] = x.to(dtype).contiguous()
    return out


def _add_(coords: Tensor, more: Tensor, alpha: float, seed: int) -> None:
    """``R <- R + alpha R'``; into bfloat16 rounded without bias, or small terms would be lost."""
    if coords.dtype != torch.bfloat16:
        coords.add_(more, alpha=alpha)
        return
    size = CHUNK_BYTES[on_accelerator(coords)] // 4
    pieces = (torch.split(x, size) for x in (coords.view(-1), more.reshape(-1)))
    noise = ops.Noise.over(seed, (coords.numel(),))
    for n, (piece, x) in enumerate(zip(*pieces, strict=True)):
        total = piece.float().add_(x, alpha=alpha)
        ops.put_(piece, total, noise.narrow(0, n * size))
