"""What a step knows of a parameter, and what its group chose."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule
from lowrank_optim.sharding.parts import Part
from lowrank_optim.sharding.regions import noise_at, noise_of
from lowrank_optim.stores import Store
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from lowrank_optim.tensors.state import State as State


@dataclass(eq=False, slots=True)
class ParamPlan:
    """One parameter with all that a step needs to know about it."""

    alone: ClassVar[bool] = True
    """Whether its gradient is all that its step needs: a factor of a module needs its siblings'."""

    param: Tensor
    name: str
    index: int
    """Its place among all parameters of the optimizer, as in a state dict."""
    uid: int
    """What its draws are of: :func:`lowrank_optim.groups.names.uid_of` its name, or its place."""
    view: MatrixView | None
    subspace: Subspace | None
    kind: int = 0
    """Number of its (view, subspace) among those of its group: hashing them takes a microsecond."""
    part: Part | None = None
    """What of it is on this rank, where it lies on several."""
    local: Any = None
    """What an optimizer keeps of it on this rank: its state, seen from here."""
    needs: tuple[Hashable, int, Sequence[int]] | None = None
    """What its bucket made of memory in phases three and four, as of :mod:`.reserve`."""
    tried: int = -1
    """The step whose refresh was taken care of before it, with other ranks."""
    before: Any = None
    """Its first moment before a refresh with other ranks, where a residual asks for it."""
    made: tuple[torch.Size, torch.dtype, torch.device] = field(init=False)
    """Shape, dtype and device that the parameter had then: its state is made for them."""

    def __post_init__(self) -> None:
        self.made = self.param.shape, self.param.dtype, self.param.device

    @property
    def sharded(self) -> bool:
        """Whether it lies on several ranks, a part on each."""
        return self.part is not None and self.part.mesh is not None

    def noise(self, seed: int | Tensor) -> Noise:
        """Of the stochastic rounding of what is here of the weights, by its place in the whole."""
        part = self.part
        if part is None or part.mesh is None:
            return noise_of(self.param, seed)
        return noise_at(seed, part.shape, part.mesh, part.placements)

    @property
    def key(self) -> tuple[Any, ...]:
        """Items of a group with the same key can be stepped as one bucket."""
        grad, formats = self.param.grad, None
        if isinstance(grad, ProjectedGrad):  # whatever the gradient was
            formats = tuple(x.dtype for x in grad.coords.values())
        return self.kind, self.param.dtype, self.param.device, formats


@dataclass(frozen=True, slots=True)
class Strategies:
    """What one parameter group chose for every role but the subspace."""

    rule: Rule
    residual: Residual
    store: Store
    on_refresh: str
    gap: int
    stagger: bool
    seed: int
    rounding: bool
    maximize: bool
    lr_scale: float = 1.0
    """Factor of the learning rate of projected parameters, but not of their decay."""
    aged: bool = False
    """Whether every row of a coordinate counts its own steps, from when it came in."""
    capturable: bool = False
    """Whether steps are counted on the device, so that a CUDA graph can hold one."""
    offload: bool = False
    """Whether what :func:`resting_keys` names lies in host memory, where that is not the device's.
    False while a bucket is stepped: what it needs is on the device then."""

    def __post_init__(self) -> None:
        """Raise where rows cannot have steps of their own.

        Raises:
            ValueError: the rule's direction depends on the step of the whole matrix.
        """
        if self.aged and not self.rule.by_row:
            raise ValueError(
                f"rows cannot count steps of their own under {self.rule}: its direction depends "
                "on the step of the whole matrix; take another rule, or one step for all rows"
            )
