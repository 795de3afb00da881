"""Parameter groups become plans: what a step knows of each parameter, made anew after an edit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.engine.blocks import placed
from lowrank_optim.engine.offload import settle_
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.preflight import (
    check_edits,
    check_flattened,
    check_moved,
    check_partitioned,
    check_replaced,
    moved,
)
from lowrank_optim.engine.recording import follow_
from lowrank_optim.engine.sharded.refusals import check_supported
from lowrank_optim.engine.state import unit_of
from lowrank_optim.groups import Group
from lowrank_optim.groups.keys import check_known
from lowrank_optim.groups.layers import layers_of, takes_turns
from lowrank_optim.groups.linear_maps import is_linear_map
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.notices import param_name
from lowrank_optim.groups.values import check_rule
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule
from lowrank_optim.sharding.parts import is_sharded, part_of
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import PROJECTORS, Subspace, make_projector, view_for
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.shared import Shared
from lowrank_optim.tensors.matrix import MatrixView

logger = logging.getLogger(__name__)

EDITABLE = frozenset({
    "params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum",
    "max_momentum", "min_momentum", "base_momentum", "weight_decay",
})  # fmt: skip
"""Group keys that views and subspaces do not depend on; schedulers edit some every step."""

RATES = ("weight_decay", "betas", "momentum")
"""Those of them that a step reads, beside ``lr``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The items of a group, and what they were made from."""

    key: tuple[Any, ...]
    structure: Mapping[str, str]
    items: list[ParamPlan]


def structure(group: Group) -> dict[str, str]:
    """The keys that views, subspaces and state may depend on, in a form that an edit changes."""
    found = {key: repr(value) for key, value in group.items() if key not in EDITABLE}
    if "momentum" in group:  # its size may change, but not whether there is a slot for it
        found["momentum"] = "0" if group["momentum"] == 0 else "not 0"
    return found


def _key(group: Group, now: Mapping[str, str]) -> tuple[Any, ...]:
    """Equal of a group that has the same parameters and ``structure``."""
    return tuple(map(id, group["params"])), tuple(now.items())


class PlannedOptimizer(Optimizer):
    """An optimizer whose groups become plans; a method says by which roles.

    Args:
        params: groups, as torch takes them.
        defaults: one value for every group key.
    """

    rule_class: ClassVar[type[Rule]]
    """The direction that its groups mean."""

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        self._plans: dict[int, Plan] = {}
        self._places: dict[Tensor, int] = {}
        """Of parameters without names, where another optimizer has more of them in its order."""
        self._matrices: dict[int, int] = {}
        """How many each group was given."""
        self._shared = Shared()
        self._rates: dict[int, tuple[Any, ...]] = {}
        """What each group had of :data:`RATES` when that was last looked at."""
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore: plans are made of the groups that are there then."""
        given = [self._matrices.get(id(g), 0) for g in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        self._plans = {}
        self._places = self.__dict__.get("_places", {})
        self._matrices = {id(g): n for g, n in zip(self.param_groups, given, strict=False)}
        self._shared = Shared()
        self._rates = {}

    def _check(self, group: Group) -> None:
        """Raise ValueError for values that no step could use: of a whole group."""
        raise NotImplementedError

    def _allowed(self, group: Group) -> set[str]:
        """Keys that a group may have: those that something reads."""
        raise NotImplementedError

    def residual(self, group: Group) -> Residual:
        """What happens outside the subspace, for parameters of ``group``."""
        raise NotImplementedError

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """The coordinates that ``group`` asks for, of one of its matrices."""
        return make_projector(group, view)

    def gap(self, group: Group) -> int:
        """Steps between refreshes in ``group``."""
        return int(group["update_proj_gap"])

    def projected_factor(self, group: Group) -> float:
        """What multiplies the learning rate of the projected part of ``group``."""
        return float(group["scale"] * group.get("proj_params_lr_scale", 1.0))

    def _group_of_checkpoint(self, group: Group) -> Group:
        """A group of a state dict, as this class reads it."""
        return group

    def _trains(self, param: Tensor) -> bool:
        """Whether a parameter is one that training changes, now or in its turn."""
        return param.requires_grad

    def _items(self, group: Group) -> list[ParamPlan]:
        """The group's parameters, viewed and with subspaces; made anew when a key changed.

        Raises:
            ValueError: the group was edited in a way that the state of its parameters, or anything,
                cannot follow.
            RuntimeError: a parameter changed its shape, dtype or device under its state, or was
                replaced.
        """
        now = structure(group)
        key = _key(group, now)
        plan = self._plans.get(id(group))
        if plan is None or plan.key != key or any(map(moved, plan.items)):
            before = {} if plan is None else plan.structure
            was = [] if plan is None else plan.items
            self._check(group)
            check_flattened(group)
            chosen, method = self._strategies(group), type(self).__name__
            check_partitioned(group, self._matrices.get(id(group), 0), chosen, method)
            if plan is not None:
                added = {k: v for k, v in group.items() if k in now and k not in before}
                check_known(added, self._allowed(group), method, "an edited group")
                check_moved([item for item in was if item.param in self.state])
            items = self._planned(group)
            check_replaced(items, was, self.state)
            check_edits(items, was, self.state, chosen, before, now)
            for item in items:
                state = self.state.get(item.param, {})
                if before.get("capturable") != now["capturable"]:
                    follow_(state, item.param, chosen)
                edited = before.get("state_device") != now["state_device"]
                if edited and (before or chosen.offload):  # or others have put it there, unpinned
                    settle_(state, item, chosen)
            plan = self._plans[id(group)] = Plan(key, now, items)
        return plan.items

    def _is_planned(self, group: Group, items: list[ParamPlan], item: ParamPlan) -> bool:
        """Whether :meth:`_items` would give ``items`` again, as far as one of them can tell."""
        plan = self._plans.get(id(group))
        if plan is None or plan.items is not items or moved(item):
            return False
        return plan.key == _key(group, structure(group))

    def _check_rates(self, group: Group) -> None:
        """Raise if what may be edited at any step is such that no step could use it.

        A tensor on an accelerator, which would have to be waited for, is taken as it is.

        Raises:
            ValueError: a rate is out of range.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                check_rule(group)  # says so
            lr = 0.0 if lr.is_meta or on_accelerator(lr) else float(lr)
        now = lr, *map(group.get, RATES)
        if self._rates.get(id(group)) != now:
            check_rule({**group, "lr": lr})
            self._rates[id(group)] = now

    def _planned(self, group: Group, instead: Group | None = None) -> list[ParamPlan]:
        """Items of a group as it is, whatever state there is; in the place of another, if given."""
        items = list(self._plan(group))
        if group.get("layers") is None:
            return placed(items)
        groups = [group if own is instead else own for own in self.param_groups]
        return placed(items, *layers_of(group, groups))

    def _before(self, group: Group) -> list[Group]:
        """The groups that come before one; all of them, if it is not yet there."""
        return [*takewhile(lambda other: other is not group, self.param_groups)]

    def _plan(self, group: Group) -> Iterator[ParamPlan]:
        start = sum(len(other["params"]) for other in self._before(group))
        names = group.get("param_names")
        dense = []
        chosen = self._strategies(group)
        kinds: dict[Any, int] = {}
        for i, param in enumerate(group["params"]):
            name = param_name(group, i)
            view = view_for(group, param.shape) if self._wants(group, i) else None
            if view is None and param.dim() >= 2:
                dense.append(name)
            subspace = None
            if view is not None:
                subspace = self.subspace(group, view).sharing(self._shared)
                _check_fit(name, subspace, self.residual(group))
            kind = kinds.setdefault((view, subspace), len(kinds))
            shared = None if isinstance(subspace, Block) else view
            unit = 1
            if shared is not None and subspace is not None and is_sharded(param):
                unit = unit_of(shared, subspace, chosen)
            part = part_of(param, shared, name, unit)
            uid = self._places.get(param, start + i) if names is None else uid_of(names[i])
            item = ParamPlan(param, name, start + i, uid, view, subspace, kind, part)
            check_supported(item, chosen, type(self).__name__)
            yield item
        if dense and group["rank"] is not None:
            logger.info("dense in a group of rank %s: %s", group["rank"], ", ".join(dense))

    def _wants(self, group: Group, i: int) -> bool:
        """Whether a group asks for parameter ``i`` to be projected, if it is a matrix."""
        rank, param = group["rank"], group["params"][i]
        if rank is None or param.dim() < 2:
            return False
        if group.get("layers") is not None and not takes_turns(group, i):
            return False
        if group["targets"] == "all":
            return True
        view, projector = view_for(group, param.shape), PROJECTORS[group["projector"]]
        if view is None or (rank != 1.0 and projector.covers(rank, view)):
            return False  # a density of 1 is asked for
        return self._is_map(group, i)

    def _is_map(self, group: Group, i: int) -> bool:
        """Whether parameter ``i`` is a linear map, as far as its name and shape tell."""
        names = group.get("param_names")
        shape = group["params"][i].shape
        flatten = group.get("flatten", False)  # of an older pickle
        return is_linear_map(None if names is None else names[i], shape, flatten)

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
            capturable=bool(group.get("capturable")),
            offload=group.get("state_device") == "cpu",
            lr_scale=group.get("proj_params_lr_scale", 1.0),
        )


def _check_fit(name: str, subspace: Subspace, residual: Residual) -> None:
    """Raise where no step is defined.

    Raises:
        ValueError: the subspace does not go with the residual.
    """
    reason = subspace.refuses(residual.wants)
    if reason is not None:
        raise ValueError(
            f"{type(residual).__name__} does not go with {type(subspace).__name__}, the subspace "
            f"of {name}: {reason}; take another of the two, or Drop"
        )
