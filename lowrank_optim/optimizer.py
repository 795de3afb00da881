"""The optimizer: parameter groups become a plan, the plan is stepped, state stays plain tensors."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.blocks import advance, catch_up, placed, step_block
from lowrank_optim.checkpoint import load_state_dict
from lowrank_optim.compiled import Traced
from lowrank_optim.dense import step_dense
from lowrank_optim.groups import EMBEDDING_OR_HEAD, Group, canonical, check, check_rank
from lowrank_optim.matrix import MatrixView
from lowrank_optim.plan import Item, State, Strategies, branchless, init_state
from lowrank_optim.projected import ProjectedGrad
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule
from lowrank_optim.step import step_matrices
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import PROJECTORS, Shared, Subspace, make_projector, view_for
from lowrank_optim.subspaces.block import Block

logger = logging.getLogger(__name__)

CHUNK_BYTES = {False: 1 << 22, True: 1 << 26}
"""Low-rank gradients alive at once: within a CPU's cache, or enough to fill an accelerator."""


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes, and every parameter group may override."""

    rank: int | float
    """Directions kept, or a fraction of the projected dimension (default: 128)."""
    update_proj_gap: int
    """Steps between refreshes of a basis (default: 200)."""
    scale: float
    """Factor of the low-rank update (default: 0.25)."""
    proj_type: str
    """Side to project: std, reverse_std, left, right, full (default: "std", the smaller)."""
    projector: str
    """How a basis is found: a registered name (default: "rsvd")."""
    on_refresh: str
    """What moments do at a refresh: keep, reset, project (default: "keep")."""
    state_dtype: str
    """How moments are stored: float32, bfloat16, 8bit (default: "float32")."""
    stochastic_rounding: bool
    """Round updates of bfloat16 weights without bias (default: False)."""
    stagger: bool
    """Spread refreshes over the gap; False refreshes all at 0, T, 2T (default: True)."""
    maximize: bool
    """Ascend (default: False)."""
    seed: int
    """Of random bases and stochastic rounding (default: 0)."""


DEFAULTS: Options = {
    "rank": 128,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "projector": "rsvd",
    "on_refresh": "keep",
    "state_dtype": "float32",
    "stochastic_rounding": False,
    "stagger": True,
    "maximize": False,
    "seed": 0,
}


def with_defaults(options: Options) -> Group:
    """``options`` completed.

    Raises:
        TypeError: an option is not known.
    """
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
    return {**DEFAULTS, **options}


class LowRankOptimizer(Optimizer):
    """Base of every method: a subclass says which rule and residual its groups mean.

    Args:
        params: parameters, named parameters, or groups of either, as in ``torch.optim``.
        defaults: one value for every group key; ``rank`` applies only where no group names one.
    """

    rule_class: ClassVar[type[Rule]]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        if isinstance(params, Tensor):
            super().__init__(params, defaults)  # torch's own error
        groups = list(params)
        defaults = canonical(defaults)
        check(defaults)
        check_rank(defaults["rank"], "free_rule" in defaults)
        if any(isinstance(g, dict) and "rank" in canonical(g) for g in groups):
            defaults = {**defaults, "rank": None}
        defaults["method"] = type(self).__name__
        self._plans: dict[int, tuple[Any, list[Item]]] = {}
        self._shared = Shared()
        super().__init__(groups, defaults)
        self._traced = Traced(self)

    def residual(self, group: Group) -> Residual:
        """What happens outside the subspace, for parameters of ``group``."""
        raise NotImplementedError

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """The coordinates that ``group`` asks for, of one of its matrices."""
        return make_projector(group, view)

    def gap(self, group: Group) -> int:
        """Steps between refreshes in ``group``."""
        return int(group["update_proj_gap"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with defaults for keys that groups of an older or another optimizer lack."""
        super().__setstate__(state)
        self._plans = {}
        self._shared = Shared()
        self._traced = Traced(self, self.__dict__.get("_traced"))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's own addition, not a group key of ours
                    group.setdefault(key, value)
            group.setdefault("targets", "auto")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; released keys are renamed, and values checked.

        Raises:
            ValueError: a value is out of range, or a parameter is complex.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # torch's own error
        group = canonical(param_group)
        check({**self.defaults, **group})
        group.setdefault("targets", "all" if group.get("rank") is not None else "auto")
        super().add_param_group(group)
        for i, param in enumerate(group["params"]):
            if param.is_complex():
                self.param_groups.pop()
                name = _name(group, i)
                raise ValueError(
                    f"{type(self).__name__} does not support complex parameters: {name}"
                )
        self._plans = {}
        if group["projector"] == "block":
            try:
                self._items(group)
            except ValueError:  # as many blocks as their order cannot take
                self.param_groups.pop()
                raise
        self._warn_clamped(group)

    def _warn_clamped(self, group: Group) -> None:
        """One warning a group for ranks that its matrices cannot have; the release is silent."""
        rank = group["rank"]
        if rank is None or group["targets"] != "all":
            return
        projector = PROJECTORS[group["projector"]]
        views = [view_for(group, p.shape) for p in group["params"]]
        small = [
            (i, view)
            for i, view in enumerate(views)
            if view is not None and projector.directions(rank, view) > projector.limit(view)
        ]
        if small:
            i, view = small[0]
            more = f" and {len(small) - 1} more" if len(small) > 1 else ""
            warnings.warn(
                f"rank {rank} is clamped to {projector.limit(view)} for {_name(group, i)} of shape "
                f"{view.shape}{more}",
                stacklevel=6,  # the line that constructs the optimizer
            )

    # ---------------------------------------------------------------- plan

    def _items(self, group: Group) -> list[Item]:
        """The group's parameters, viewed and with subspaces; rebuilt when a key changed."""
        projector = {k: v for k, v in group.items() if k not in _NOT_STRUCTURAL}
        key = (tuple(map(id, group["params"])), repr(projector))
        cached = self._plans.get(id(group))
        if cached is None or cached[0] != key:
            cached = self._plans[id(group)] = key, placed(list(self._plan(group)))
        return cached[1]

    def _plan(self, group: Group) -> Iterator[Item]:
        start = 0
        for other in self.param_groups:
            if other is group:
                break
            start += len(other["params"])
        dense = []
        kinds: dict[Any, int] = {}
        for i, param in enumerate(group["params"]):
            view = view_for(group, param.shape) if self._wants(group, i) else None
            if view is None and param.dim() >= 2:
                dense.append(_name(group, i))
            if view is not None and hasattr(param, "placements"):
                raise NotImplementedError(
                    f"{_name(group, i)} is a DTensor: low-rank groups of sharded parameters are "
                    "not supported yet"
                )
            subspace = None
            if view is not None:
                subspace = self.subspace(group, view).sharing(self._shared)
            kind = kinds.setdefault((view, subspace), len(kinds))
            yield Item(param, _name(group, i), start + i, view, subspace, kind)
        if dense and group["rank"] is not None:
            logger.info("dense in a group of rank %s: %s", group["rank"], ", ".join(dense))

    def _wants(self, group: Group, i: int) -> bool:
        """Whether a group asks for parameter ``i`` to be projected, if it is a matrix."""
        rank, param = group["rank"], group["params"][i]
        if rank is None or param.dim() < 2:
            return False
        if group["targets"] == "all":
            return True
        view, projector = view_for(group, param.shape), PROJECTORS[group["projector"]]
        if view is None or (rank != 1.0 and projector.covers(rank, view)):
            return False  # a density of 1 is asked for
        names = group.get("param_names")
        return names is None or EMBEDDING_OR_HEAD.search(names[i]) is None

    def _strategies(self, group: Group) -> Strategies:
        return Strategies(
            rule=self.rule_class.from_group(group),
            residual=self.residual(group),
            store=STORES[group["state_dtype"]],
            on_refresh=group["on_refresh"],
            gap=self.gap(group),
            stagger=group["stagger"],
            seed=group["seed"],
            rounding=group["stochastic_rounding"],
            maximize=group["maximize"],
            lr_scale=group.get("proj_params_lr_scale", 1.0),
        )

    # ---------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. In a compiled graph it is one op, unless there is a closure or a hook.

        Args:
            closure: re-evaluates the model and returns the loss, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        if torch.compiler.is_dynamo_compiling():
            if closure is None and self._traced.step():
                return None
            torch._dynamo.skip_frame("step() with a closure, hooks or tensor subclasses")
        return self._step_eagerly(closure)

    # one boundary for compilers: what a step does is decided by numbers on the host
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @Optimizer.profile_hook_step  # within it, as hooks are host work too
    @torch.no_grad()
    def _step_eagerly(self, closure: Callable[[], Any] | None = None) -> Any:
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_state()
        for group in self.param_groups:
            chosen, items = self._strategies(group), self._items(group)
            ready = [i for i in items if i.param.grad is not None]
            if any(isinstance(i.subspace, Block) for i in ready):
                for item in ready:
                    self._state_of(item, chosen)
                advance(items, self.state, chosen)
            self._step_items(ready, group, chosen)
        return loss

    def _make_state(self) -> None:
        """Before the first step, the state of all that can be trained, with a gradient or not."""
        if self.state:
            return
        for group in self.param_groups:
            chosen = self._strategies(group)
            for item in self._items(group):
                if item.param.requires_grad:
                    self._state_of(item, chosen)

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Step one parameter alone: what a step does to it, callable from inside backward.

        Raises:
            ValueError: the parameter is in no group.
        """
        for group in self.param_groups:
            for item in self._items(group):
                if item.param is param:
                    if param.grad is not None:
                        self._step_alone(item, group)
                    return
        raise ValueError("the parameter is in none of the optimizer's groups")

    def _step_alone(self, item: Item, group: Group, begins: bool | None = None) -> None:
        """One item with a gradient; ``begins`` as of :func:`~lowrank_optim.blocks.catch_up`."""
        chosen = self._strategies(group)
        if isinstance(item.subspace, Block):
            self._state_of(item, chosen)
            catch_up(item, self._items(group), self.state, chosen, begins)
        self._step_items([item], group, chosen)

    def _state_of(self, item: Item, chosen: Strategies) -> State:
        state: State = self.state[item.param]
        if not state:
            state.update(init_state(item, chosen, item.param))
            if isinstance(item.param.grad, ProjectedGrad):
                state.update(item.param.grad.fresh)  # now: else two bases of every matrix exist
        return state

    def _step_items(self, items: list[Item], group: Group, chosen: Strategies) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        buckets: dict[Any, list[Item]] = {}
        if any([item.param.grad.is_sparse for item in items if item.param.grad is not None]):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        for item in items:
            if isinstance(item.param.grad, ProjectedGrad) and item.param.grad.spill is not None:
                raise RuntimeError(
                    f"the gradient of {item.name} was kept in its subspace and zeroed in place, "
                    "and no attach_in_backward took the next one: call zero_grad() with "
                    "set_to_none=True, and backward() again"
                )
        for item in items:
            if item.subspace is None:
                step_dense(item, self._state_of(item, chosen), chosen, lr, weight_decay)
            elif isinstance(item.subspace, Block):
                step_block(item, self._state_of(item, chosen), chosen, lr, weight_decay)
            else:
                buckets.setdefault(item.key, []).append(item)
        for bucket in buckets.values():
            size = _chunk_size(bucket[0])
            for i in range(0, len(bucket), size):
                chunk = bucket[i : i + size]
                states = [self._state_of(item, chosen) for item in chunk]
                step_matrices(chunk, states, chosen, lr, weight_decay)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; within a compiled graph too, where gradients are let go of."""
        if torch.compiler.is_dynamo_compiling() and set_to_none:
            self._traced.free_gradients()
        else:
            super().zero_grad(set_to_none)

    # ---------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: tensors keep their dtypes and are copied; all hooks run.

        Raises:
            ValueError: a shape, rank or method differs; the optimizer is left as it was.
        """
        load_state_dict(self, super().load_state_dict, state_dict)

    def postponed_refreshes(self) -> dict[str, int]:
        """How often each matrix had a refresh postponed by a zero, NaN or Inf gradient."""
        counts = {}
        for group in self.param_groups:
            for item in self._items(group):
                count = int(self.state.get(item.param, {}).get("postponed", 0))
                if count:
                    counts[item.name] = count
        return counts


LowRankOptimizer.step.hooked = True  # type: ignore[attr-defined]  # torch need not do it again
# nor need schedulers wrap it to see it called, in a file that compilers skip
LowRankOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

_NOT_STRUCTURAL = {
    "params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum",
    "max_momentum", "min_momentum", "base_momentum", "weight_decay",
}  # fmt: skip
"""Group keys that views and subspaces do not depend on; schedulers edit some every step."""


def _name(group: Group, i: int) -> str:
    names = group.get("param_names")
    return names[i] if names else f"parameter {i}"


def _chunk_size(item: Item) -> int:
    assert item.subspace is not None and item.view is not None
    shapes = item.subspace.coord_shapes(item.view).values()
    size = 4 * sum(math.prod(shape) for shape in shapes)
    return max(1, CHUNK_BYTES[branchless(item.param)] // max(1, size))
