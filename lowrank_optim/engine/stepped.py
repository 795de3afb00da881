"""How planned groups are stepped: all in turn, or one parameter, or shards, inside backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from lowrank_optim.engine import answers, tracing
from lowrank_optim.engine.blocks import advance, catch_up
from lowrank_optim.engine.offload import Staging
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.preflight import check_gradients, check_owned
from lowrank_optim.engine.recording import check_on_device
from lowrank_optim.engine.retry import Retry
from lowrank_optim.engine.sharded import ShardedStep, local_state
from lowrank_optim.engine.sharded.failures import is_alone, this_rank
from lowrank_optim.engine.sharded.replicas import Replicas, refresh_alike
from lowrank_optim.engine.state import init_state
from lowrank_optim.engine.step import step_items
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import Group
from lowrank_optim.groups.values import rate_of
from lowrank_optim.ops.devices import recording
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import ProjectedGrad


class Checked(NamedTuple):
    """A group that can be stepped."""

    chosen: Strategies
    items: list[ParamPlan]
    """All of them."""
    ready: list[ParamPlan]
    """Those with a gradient, which take this step."""


class SteppedOptimizer(PlannedOptimizer):
    """A planned optimizer that steps: from state that it has, or makes, to the phases.

    Args:
        params: groups, as torch takes them.
        defaults: one value for every group key.
    """

    _traced: Any
    """What a compiler reads of it."""

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """As nothing has been stepped."""
        self._replicas = Replicas()
        self._staging = Staging()
        self._retry = Retry()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore: nothing is under way."""
        super().__setstate__(state)
        self._begin()

    def _step_eagerly(self, closure: Any = None) -> Any:
        """A step that no compiler looks into."""
        raise NotImplementedError

    def _make_state(self) -> None:
        """Before the first step, the state of all that can be trained, with a gradient or not.

        Of all or of none: a step that is taken again finds no state, and makes it.
        """
        if self.state:
            return
        try:
            for group in self.param_groups:
                chosen = self._strategies(group)
                for item in self._items(group):
                    if self._trains(item.param):
                        self._state_of(item, chosen)
        except BaseException:
            self.state.clear()
            raise

    def _checked(self, group: Group) -> Checked:
        """A group, of which whatever has a gradient can be stepped.

        Raises:
            RuntimeError: a gradient, or a parameter, is not what a step can use, or the parameter
                belongs to no model any more.
            ValueError: the group was edited in a way that its state cannot follow.
        """
        items = self._items(group)
        self._check_rates(group)
        chosen = self._strategies(group)
        ready = [item for item in items if item.param.grad is not None]
        ready = [item for item in ready if item.index not in self._retry.taken]
        if len(ready) < len(items):  # at any step: its state may have been loaded
            check_owned([item.param for item in items if item.param.grad is None])
        check_gradients(ready, type(self).__name__)
        if chosen.capturable:
            check_on_device(ready)
        return Checked(chosen, items, ready)

    def _step_groups(self, work: Sequence[Checked]) -> None:
        """One step of all groups; where one raises, of those whose weights are written by then.

        Args:
            work: each group, in order.
        """
        self._retry.check_together(type(self).__name__)
        self._make_state()
        self._retry.warn_partly()
        # of all groups: a basis found with other ranks is of no use without its step
        undo = Undo(self._staging.wait)
        try:
            with undo:
                if not recording():  # as nothing is refreshed
                    self._with_other_ranks(work, undo)
                for group, (chosen, items, ready) in zip(self.param_groups, work, strict=True):
                    here = [item for item in ready if not item.sharded]
                    self._advance(items, here, chosen, undo)
                    self._step_items(here, group, chosen, undo)
                self._staging.wait()  # whoever reads the state next finds it there
        except BaseException as error:
            for _, items, _ in work:
                for item in items:
                    item.tried = -1  # the refreshes of this step are undone
            ready = [item for *_, own in work for item in own]
            self._retry.remember(error, undo, ready, type(self).__name__)
            raise
        self._retry.forget()

    def _with_other_ranks(self, work: Sequence[Checked], undo: Undo) -> None:
        """What ranks do together: all of a step of DTensors, and the refreshes of replicas."""
        alike = {}
        if not self._places:  # of ZeroRedundancyOptimizer ranks have a part of them each
            alike = self._replicas.groups(
                lambda: [
                    (item, group)
                    for group, own in zip(self.param_groups, work, strict=True)
                    for item in own.items
                ]
            )
            self._replicas.check_stay((i for _, items, _ in work for i in items), self.state)
        if not alike and not any([i.sharded for _, items, _ in work for i in items]):
            return
        sharded, replicas = ShardedStep(self._staging), []
        for group, (chosen, items, ready) in zip(self.param_groups, work, strict=True):
            own = [i for i in items if i.sharded]
            own = [i for i in own if i.param.requires_grad or i.param.grad is not None]
            if own:
                states = [self._state_of(item, chosen) for item in own]
                sharded.add(own, states, chosen, rate_of(group), group["weight_decay"], undo)
            if alike:
                replicas += [(item, self._state_of(item, chosen), chosen) for item in ready]
        try:
            sharded.run(undo)
            if alike:
                refresh_alike(replicas, alike, undo)
        except BaseException as error:
            self._retry.alone = this_rank() if is_alone(error) else ""
            raise

    def _advance(
        self, items: list[ParamPlan], ready: list[ParamPlan], chosen: Strategies, undo: Undo
    ) -> None:
        """Blocks of a group take turns before it steps, whoever has taken it before it raised."""
        own = [i for i in items if i.param.grad is not None and not i.sharded]
        if not any(isinstance(item.subspace, Block) for item in own):
            return
        for item in ready:
            self._state_of(item, chosen)
        for item in items:
            if isinstance(item.subspace, Block) and item.param in self.state:
                undo.begin(self.state[item.param])
        advance(items, self.state, chosen, self._retry.taken)

    def _step_alone(
        self,
        item: ParamPlan,
        group: Group,
        begins: bool | None = None,
        alike: Mapping[int, Any] | None = None,
    ) -> None:
        """One parameter with a gradient; what rests of its state may be on its way back then.

        Args:
            item: the parameter.
            group: its group.
            begins: as of ``engine.blocks.catch_up``.
            alike: ranks that step it at the same place among all that they exchange.
        """
        self._check_rates(group)
        chosen = self._strategies(group)
        check_gradients([item], type(self).__name__)
        with tracing.hosted(), Undo(self._staging.wait) as undo:
            if isinstance(item.subspace, Block):
                self._state_of(item, chosen)
                catch_up(item, self._items(group), self.state, chosen, undo, begins)
            if alike:
                refresh_alike([(item, self._state_of(item, chosen), chosen)], alike, undo)
            self._step_items([item], group, chosen, undo)

    def _step_shards(self, work: Sequence[tuple[Group, list[ParamPlan]]], begun: set[int]) -> None:
        """Some parameters that lie on several ranks, all of which have a gradient.

        Args:
            work: groups, and which of theirs.
            begun: ids of groups whose blocks have begun this step; those that do now are added.
        """
        with tracing.hosted(), Undo(self._staging.wait) as undo:
            sharded = ShardedStep(self._staging)
            for group, own in work:
                self._check_rates(group)
                chosen = self._strategies(group)
                check_gradients(own, type(self).__name__)
                states = [self._state_of(item, chosen) for item in own]
                rest: list[tuple[ParamPlan, State]] | None = None
                if any(isinstance(item.subspace, Block) for item in own):
                    others = [i for i in self._items(group) if i.sharded and i not in own]
                    rest = [(i, self._state_of(i, chosen)) for i in others]
                begins = id(group) not in begun
                if rest is not None:
                    begun.add(id(group))
                sharded.add(
                    own, states, chosen, rate_of(group), group["weight_decay"], undo, rest, begins
                )
            sharded.run(undo)

    def _state_of(self, item: ParamPlan, chosen: Strategies) -> State:
        state: State = self.state[item.param]
        if item.sharded:
            return local_state(item, self.state[item.param], chosen)
        if not state:
            state.update(init_state(item, chosen, item.param))
            if tracing.fake_mode() is not None:
                make = partial(init_state, item, chosen)
                state.update(tracing.real_entries(make, item.param))
            if isinstance(item.param.grad, ProjectedGrad):
                state.update(item.param.grad.fresh)  # now: else two bases of every matrix exist
        return state

    def _step_items(
        self, items: list[ParamPlan], group: Group, chosen: Strategies, undo: Undo
    ) -> None:
        state_of = partial(self._state_of, chosen=chosen)
        hyper = rate_of(group), group["weight_decay"]
        step_items(items, state_of, chosen, *hyper, undo, self._staging)

    def _settle(self) -> None:
        """Let what is under way arrive, and ask accelerators whether refreshes came about."""
        self._staging.wait()
        for state in self.state.values():
            answers.settle_(state)
