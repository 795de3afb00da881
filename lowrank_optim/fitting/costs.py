"""What a way to train a model costs in memory, for any ranks of its matrices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from lowrank_optim.groups import Group, lowrank_groups
from lowrank_optim.groups.names import bare
from lowrank_optim.memory import GIB, Estimate, estimate
from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.losses import Loss
from lowrank_optim.memory.world import Shard
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.tensors.matrix import MatrixView, matrix_view

Mode = Literal["project", "step"] | None
Place = Literal["cpu"] | None
"""Where moments lie between steps: in host memory, or on the device."""


class Budget(NamedTuple):
    """What there is, in bytes."""

    device: float
    host: float = math.inf

    def holds(self, found: Estimate) -> bool:
        """Whether an estimate is within both."""
        return found.fits(self.device) and found.pinned <= self.host


@dataclass(frozen=True)
class Way:
    """An optimizer, what happens inside backward, and how and where moments are kept."""

    optimizer: type[LowRankOptimizer]
    options: Mapping[str, Any]
    in_backward: Mode
    state_dtype: str
    state_device: Place = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the constructor."""
        own = {"state_dtype": self.state_dtype, "state_device": self.state_device}
        return {**self.options, **{k: x for k, x in own.items() if x is not None}}

    def __str__(self) -> str:
        """As it would be called."""
        own = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.optimizer.__name__}({own}), in_backward={self.in_backward!r}"


class Matrix(NamedTuple):
    """A parameter that can have a rank."""

    name: str
    view: MatrixView
    kind: tuple[Any, ...]
    """Those alike cost the same."""

    @property
    def side(self) -> int:
        """The largest rank."""
        return self.view.full_rank


def matrices_of(model: nn.Module, least: int, target_modules: Any) -> list[Matrix]:
    """The matrices that ``target_modules`` selects, with room for more than the least rank."""
    found = []
    for group in lowrank_groups(model, target_modules=target_modules):
        if group.get("rank") is None:
            continue
        for name, param in zip(group["param_names"], group["params"], strict=True):
            view = matrix_view(param.shape, flatten=group.get("flatten", False))
            if view is not None and view.full_rank > least:
                found.append(Matrix(name, view, (tuple(param.shape), param.dtype)))
    return found


def dense_groups(model: nn.Module, names: Sequence[str]) -> list[Group]:
    """Groups of ``model`` in which the named matrices stand for those that get a rank."""
    return lowrank_groups(model, rank=1, target_modules=list(names))


def with_ranks(groups: Sequence[Group], ranks: Mapping[str, int]) -> list[Group]:
    """:func:`dense_groups` with a group for each rank, in the order in which ranks come."""
    found: list[Group] = []
    for group in groups:
        if group.get("rank") is None:
            found.append(group)
            continue
        by_rank: dict[int, Group] = {}
        for param, name in zip(group["params"], group["param_names"], strict=True):
            rank = ranks[bare(name)]
            own = by_rank.setdefault(rank, {**group, "params": [], "param_names": [], "rank": rank})
            own["params"].append(param)
            own["param_names"].append(name)
        found += by_rank.values()
    return found


class Costs:
    """Peaks of one model for any way and ranks.

    Forward, backward and steps are run once for each way that they may decide, at the least ranks.
    What they add to the peak there is taken for what they add at any ranks. Of forward and backward
    that is a bound: coordinates that live at the worst moment of backward live at the end of it
    too. Of steps it is less than what larger ranks need in passing. :meth:`exact` knows.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[Matrix],
        least: int,
        *,
        accumulation_steps: int,
        coords_dtype: Literal["auto", "float32", "bfloat16"],
        tokens: int | tuple[int, int] | None,
        checkpointing: bool,
        loss: Loss,
        loss_chunk: int | None,
        autocast: Autocast | None,
        transients: bool,
        device: str,
        world_size: int | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.model, self.matrices, self.tokens = model, matrices, tokens
        self._least = [least] * len(matrices)
        self._groups = dense_groups(model, [m.name for m in matrices])
        self._common: dict[str, Any] = {
            "accumulation_steps": accumulation_steps,
            "coords_dtype": coords_dtype,
            "device": device,
            "world_size": world_size,
            "shard": shard,
        }
        self._run: dict[str, Any] = {"tokens": tokens, "checkpointing": checkpointing, "loss": loss}
        self._run |= {"loss_chunk": loss_chunk, "autocast": autocast, "transients": transients}
        self._known: dict[Any, Estimate] = {}
        self._exactly: dict[Any, Estimate] = {}

    def peak(self, way: Way, ranks: Sequence[int], added: int | None = None) -> int:
        """Bytes at the worst moment.

        Args:
            way: to train.
            ranks: of all matrices.
            added: by activations and steps (default: what they add at the least ranks).
        """
        return self._plain(way, ranks).peak + (self._of_running(way) if added is None else added)

    def host(self, way: Way, ranks: Sequence[int]) -> int:
        """Bytes of host memory."""
        return self._plain(way, ranks).pinned

    def fits(self, way: Way, ranks: Sequence[int], budget: Budget) -> bool:
        """Whether the peak is within the budget; the model runs only where it may be."""
        return budget.holds(self._plain(way, ranks)) and budget.holds(self.exact(way, ranks))

    def exact(self, way: Way, ranks: Sequence[int]) -> Estimate:
        """The estimate of these very ranks, with activations and what steps need in passing."""
        key = (repr(way), tuple(ranks))
        if key not in self._exactly:
            self._exactly[key] = self._measured(way, ranks, counted=True)
        return self._exactly[key]

    def least(self, ways: Sequence[Way]) -> tuple[int, Way]:
        """The lowest peak that any way has, at the least ranks, and which way that is."""
        order = sorted(ways, key=lambda way: self._plain(way, self._least).peak)
        best = self.peak(order[0], self._least), order[0]
        for way in order[1:]:
            if self._plain(way, self._least).peak >= best[0]:
                break
            best = min(best, (self.peak(way, self._least), way), key=lambda pair: pair[0])
        return best

    def added(self, way: Way, ranks: Sequence[int], found: Estimate) -> int:
        """What activations and steps add to the peak of ranks whose exact estimate was found."""
        return found.peak - self._plain(way, ranks).peak

    def _plain(self, way: Way, ranks: Sequence[int]) -> Estimate:
        """Without activations and steps."""
        key = (repr(way), tuple(ranks))
        if key not in self._known:
            self._known[key] = self._measured(way, ranks, counted=False)
        return self._known[key]

    def _of_running(self, way: Way) -> int:
        return self.added(way, self._least, self.exact(way, self._least))

    def _measured(self, way: Way, ranks: Sequence[int], counted: bool) -> Estimate:
        by_name = {bare(m.name): r for m, r in zip(self.matrices, ranks, strict=True)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer itself will say it
            return estimate(
                self.model,
                way.optimizer,
                groups=lambda module: with_ranks(self._groups_of(module), by_name),
                in_backward=way.in_backward,
                **(self._run if counted else {"transients": False}),
                **self._common,
                **way.arguments,
            )

    def _groups_of(self, module: nn.Module) -> Sequence[Group]:
        """Of the model, or of its shards."""
        if module is self.model:
            return self._groups
        return dense_groups(module, [m.name for m in self.matrices])

    def refuses(self, way: Way, ranks: Sequence[int]) -> str | None:
        """Why the method has no such mode; None if it has.

        Raises:
            TypeError: an option is not known, or a value out of range.
            ValueError: likewise.
        """
        self._plain(replace(way, in_backward=None), ranks)  # what is wrong in any mode is an error
        try:
            self._plain(way, ranks)
        except ValueError as error:
            return str(error)
        return None

    def slopes(self, way: Way) -> list[float]:
        """Bytes of one more direction of each matrix, found kind by kind between two ranks.

        They are linear in the rank but for the rounding of blocks, so two ranks say all.
        """
        base, found = self._plain(way, self._least).peak, dict[tuple[Any, ...], float]()
        for kind in dict.fromkeys(m.kind for m in self.matrices):
            ranks = [
                max(least + 1, m.side // 2) if m.kind == kind else least
                for m, least in zip(self.matrices, self._least, strict=True)
            ]
            grown = self._plain(way, ranks).peak - base
            found[kind] = max(1.0, grown / (sum(ranks) - sum(self._least)))
        return [found[m.kind] for m in self.matrices]


def gib(size: float) -> str:
    """Bytes in GiB, rounded up in the sixth digit: a budget of so much has room for them."""
    size = max(size, 1)
    digits = 6 - math.ceil(math.log10(size / GIB))
    text = f"{math.ceil(size / GIB * 10**digits) / 10**digits:.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
