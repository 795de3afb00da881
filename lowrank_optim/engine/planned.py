"""What the engine, and what reads and writes state, may ask of an optimizer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.engine.offload import Staging
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.groups.values import Group
from lowrank_optim.rules.base import Rule
from lowrank_optim.subspaces.base import Shared


class PlannedOptimizer(Optimizer):
    """An optimizer whose groups become plans: :class:`lowrank_optim.LowRankOptimizer` is one."""

    rule_class: ClassVar[type[Rule]]
    """The direction that its groups mean."""
    _shared: Shared
    """What all of its matrices have in common."""
    _staging: Staging
    """What buckets pass through whose state rests in host memory."""
    _traced: Any
    """What a compiler reads of it."""

    def _items(self, group: Group) -> list[ParamPlan]:
        """The plans of a group, made anew when it was edited."""
        raise NotImplementedError

    def _planned(self, group: Group) -> list[ParamPlan]:
        """The plans of a group as it is, whatever state there is."""
        raise NotImplementedError

    def _strategies(self, group: Group) -> Strategies:
        """What a group chose for every role but the subspace."""
        raise NotImplementedError

    def _state_of(self, item: ParamPlan, chosen: Strategies) -> State:
        """The state of a parameter, made if there is none."""
        raise NotImplementedError

    def _trains(self, param: Tensor) -> bool:
        """Whether training changes a parameter, now or in its turn."""
        raise NotImplementedError

    def _check(self, group: Group) -> None:
        """Raise ValueError for values that no step could use."""
        raise NotImplementedError

    def projected_factor(self, group: Group) -> float:
        """What multiplies the learning rate of the projected part of ``group``."""
        raise NotImplementedError

    def _step_eagerly(self, closure: Any = None) -> Any:
        """A step that no compiler looks into."""
        raise NotImplementedError
