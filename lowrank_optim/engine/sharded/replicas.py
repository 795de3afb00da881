"""Plain parameters that several ranks train alike: they share the bases that one of them finds."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim.engine.momentum import momentum_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import keep_refreshed, refreshing_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import recall
from lowrank_optim.engine.sharded.refresh import refresh_replicas
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import Group
from lowrank_optim.sharding.parts import is_sharded, replica
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.searches import together
from lowrank_optim.tensors.projected_grad import ProjectedGrad

Grouped = Sequence[tuple[ParamPlan, Group]]
"""Parameters, each with its group."""

OWN = frozenset({"params", "param_names", "state_device"})
"""Group keys that may be a rank's own, or are compared as parameters are."""


def wrappers(params: Iterable[Tensor]) -> dict[int, DistributedDataParallel]:
    """The ``DistributedDataParallel`` that averages the gradient, by id of a parameter.

    It leaves no trace on a parameter, so all objects are asked; milliseconds, where ranks exist.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    wanted = {id(p) for p in params if not is_sharded(p)}  # it takes no DTensors
    if not wanted:
        return {}
    kinds = {id(cls) for cls in _with_subclasses(DistributedDataParallel)}
    found: dict[int, DistributedDataParallel] = {}
    for x in gc.get_objects():
        # not isinstance, which a proxy may answer by importing what it stands for; nor issubclass,
        # which asks an abstract class about each of some hundred thousand objects
        if id(type(x)) in kinds and hasattr(x, "process_group"):
            ignored = getattr(x, "parameters_to_ignore", ())
            own = {id(p) for n, p in x.module.named_parameters() if n not in ignored}
            found.update(dict.fromkeys(own & wanted, x))
    return found


def lets_leave(wrapper: DistributedDataParallel | None) -> bool:
    """Whether it is in a ``join()`` that ranks without a batch leave before the others."""
    config = getattr(wrapper, "_join_config", None)
    return config is not None and config.enable and not config.throw_on_early_termination


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _with_subclasses(sub)


class Replicas:
    """Which parameters of an optimizer other ranks step alike, each with the same gradient."""

    def __init__(self) -> None:
        self._steps = 0
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._wrappers: list[weakref.ref[DistributedDataParallel]] = []

    def group_of(self, param: Tensor) -> dist.ProcessGroup | None:
        """The ranks that were found to have a parameter; None if nobody else has."""
        return self._groups.get(id(param))

    def share(self, params: Iterable[Tensor], group: dist.ProcessGroup) -> None:
        """Parameters that are known to be averaged over a group: none need be looked for."""
        if group.size() > 1:
            self._groups.update(dict.fromkeys(map(id, params), group))

    def release(self) -> None:
        """Nobody averages what :meth:`share` told of any more."""
        self._groups, self._wrappers = {}, []

    @property
    def known(self) -> Mapping[int, dist.ProcessGroup]:
        """The groups that are known, by id of the parameter; nobody is asked."""
        return self._groups

    def groups(self, grouped: Callable[[], Grouped]) -> dict[int, dist.ProcessGroup]:
        """By id of the parameter; called once a step.

        Parameters are looked for at the first step, the second, the fourth and so on until there
        are some: a model may be wrapped after a step, as one that makes state for a checkpoint.

        Raises:
            ValueError: ranks have other values of a group key.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self._steps, self._groups, self._wrappers = 0, {}, []
            return {}
        self._steps += 1
        alone = dist.get_world_size() == 1
        if not self._groups and not alone and self._steps & (self._steps - 1) == 0:
            own = grouped()
            found = wrappers(item.param for item, _ in own)
            shared = {key: wrapper.process_group for key, wrapper in found.items()}
            by_group: dict[int, list[tuple[ParamPlan, Group]]] = {}
            for item, settings in own:
                if id(item.param) in shared:
                    by_group.setdefault(id(shared[id(item.param)]), []).append((item, settings))
            for alike in by_group.values():
                group = shared[id(alike[0][0].param)]
                if group.size() > 1 and self._is_alike(alike, group):
                    self._groups.update({id(item.param): group for item, _ in alike})
                    known = {id(x): x for x in (found[id(item.param)] for item, _ in alike)}
                    self._wrappers += map(weakref.ref, known.values())
        return self._groups

    def _is_alike(self, grouped: Grouped, group: dist.ProcessGroup) -> bool:
        """Whether all ranks of a group have these parameters, in this order.

        Raises:
            ValueError: they have, with other values of a group key.
        """
        mine = [(item.uid, tuple(item.param.shape)) for item, _ in grouped]
        digest = hashlib.sha256(repr(mine).encode()).hexdigest()
        theirs: list[Any] = [None] * group.size()
        dist.all_gather_object(theirs, (digest, _settings(grouped)), group=group)
        if len({other for other, _ in theirs}) > 1:
            return False
        try:
            _check_settings([item for item, _ in grouped], [own for _, own in theirs])
        except ValueError:
            self._steps = 0  # the step that is tried again looks again
            raise
        return True

    def check_stay(self, items: Iterable[ParamPlan], state: Mapping[Tensor, State]) -> None:
        """Raise where a rank may leave the others with whom it finds bases.

        Raises:
            RuntimeError: with a matrix whose basis they find together.
        """
        if not any(lets_leave(wrapper()) for wrapper in self._wrappers):
            return
        for item in items:
            if id(item.param) not in self._groups or item.subspace is None:
                continue
            if not item.subspace.reproducible(int(state.get(item.param, {}).get("step", 0))):
                raise RuntimeError(
                    f"ranks find the basis of {item.name} together, and would wait for one that "
                    "has no batch left, as join() of DistributedDataParallel lets it leave them: "
                    "give all ranks as many batches and leave join() out, or pass it "
                    "throw_on_early_termination=True, with which all end together"
                )


def check_same_parameters(grouped: Grouped, group: dist.ProcessGroup) -> None:
    """Raise, on every rank, unless all have the same parameters in the same order, set alike.

    Raises:
        ValueError: with the first that differs.
    """
    items = [item for item, _ in grouped]
    mine = [(i.name, i.uid, tuple(i.param.shape), i.param.dtype) for i in items]
    theirs: list[Any] = [None] * group.size()
    dist.all_gather_object(theirs, (mine, _settings(grouped)), group=group)
    for rank, (own, _) in enumerate(theirs):
        for first, other in zip_longest(theirs[0][0], own):
            if first != other:
                words = ["nothing" if x is None else f"{x[0]} {x[2]}" for x in (first, other)]
                raise ValueError(
                    "ranks that train together need the same parameters in the same order, and "
                    f"rank {rank} of the group has {words[1]} where rank 0 has {words[0]}: make "
                    "the same groups on every rank"
                )
    _check_settings(items, [settings for _, settings in theirs])


def _settings(grouped: Grouped) -> list[Mapping[str, str]]:
    """What steps of each parameter go by; one mapping for all of a group, which is sent once."""
    told = {
        id(group): {
            key: repr(value.tolist() if isinstance(value, Tensor) else value)
            for key, value in group.items()
            if key not in OWN
        }
        for _, group in grouped
    }
    return [told[id(group)] for _, group in grouped]


def _check_settings(
    items: Sequence[ParamPlan], theirs: Sequence[Sequence[Mapping[str, str]]]
) -> None:
    """Raise unless all ranks have set each parameter alike.

    Raises:
        ValueError: with the first key that differs.
    """
    for rank, own in enumerate(theirs):
        for item, first, other in zip(items, theirs[0], own, strict=True):
            for key in {**first, **other}:
                if first.get(key) != other.get(key):
                    raise ValueError(
                        f"ranks that train together need the same settings, and rank {rank} of "
                        f"the group has {key}={other.get(key, 'nothing')} for {item.name} where "
                        f"rank 0 has {first.get(key, 'nothing')}: make the same groups on every "
                        "rank"
                    )


def refresh_layers(
    layers: Sequence[tuple[ParamPlan, State]], chosen: Strategies, replicas: Replicas
) -> None:
    """Refresh layers of factors: alone, or by one of the ranks that have them."""
    by_group: dict[int, list[Due]] = {}
    here = []
    for item, state in layers:
        group = replicas.group_of(item.param)
        if group is None:
            here.append(
                refreshing_(item, state, item.param, int(state["step"]), chosen, later=True)
            )
            continue
        item.part = item.part or replica(item.view, group, item.param.shape)
        by_group.setdefault(id(group), []).append(Due(item, item, state, None, chosen))
    together(here)
    for due in by_group.values():
        refresh_replicas(due)


def refresh_alike(
    work: Sequence[tuple[ParamPlan, State, Strategies]],
    groups: Mapping[int, dist.ProcessGroup],
    undo: Undo,
) -> None:
    """Refresh what is due of replicas before they step: a step then finds nothing due."""
    recall(item.param for item, *_ in work if id(item.param) in groups)
    by_group: dict[int, list[Due]] = {}
    for item, state, chosen in work:
        item.tried, item.before = -1, None  # a step that failed was undone
        if id(item.param) not in groups:
            continue
        subspace, step = item.subspace, int(state.get("step", 0))
        if subspace is None or isinstance(subspace, Block) or not item.alone:
            continue
        if isinstance(item.param.grad, ProjectedGrad) or not basis_due(item, state, chosen):
            continue
        if subspace.reproducible(step):
            continue
        group = groups[id(item.param)]
        item.part = item.part or replica(item.view, group, item.param.shape)
        undo.begin(state)
        keep_refreshed([(item, state)], chosen, undo)
        if chosen.residual.lost:
            item.before = momentum_of(item, state, chosen, copied=True)
        by_group.setdefault(id(group), []).append(Due(item, item, state, None, chosen))
    for due in by_group.values():
        refresh_replicas(due)
        for d in due:
            d.item.tried = d.step
