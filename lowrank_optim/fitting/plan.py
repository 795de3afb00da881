"""A plan: what to construct and attach, with the rank of every matrix, and what it will hold."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.backward.attach import attach_in_backward
from lowrank_optim.backward.handle import InBackward
from lowrank_optim.engine.summary import binary
from lowrank_optim.fitting.costs import Mode, gib, with_ranks
from lowrank_optim.fitting.text import as_object, estimate_of, method_of, tupled
from lowrank_optim.groups import Group, lowrank_groups
from lowrank_optim.groups.names import bare
from lowrank_optim.groups.values import check_module, whole
from lowrank_optim.memory import GIB, Estimate, estimate
from lowrank_optim.memory.checks import check_device, check_mode
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.tensors.matrix import matrix_view

PLAIN = frozenset(("lr", "betas", "eps", "weight_decay", "scale", "maximize"))
"""Arguments of an optimizer that no byte depends on."""


@dataclass(frozen=True)
class Plan:
    """What :func:`fit` found; its ``str`` is a table."""

    optimizer_class: type[LowRankOptimizer]
    arguments: Mapping[str, Any]
    """Of its constructor, beside groups and learning rate."""
    in_backward: Mode
    """Mode of :func:`lowrank_optim.attach_in_backward`, or None: gradients stay as they are."""
    accumulation_steps: int
    ranks: Mapping[str, int]
    """By name of the parameter."""
    estimate: Estimate
    """What training by this plan will hold."""
    budget: float
    """Bytes."""
    coords_dtype: str = "auto"
    """Of :func:`lowrank_optim.attach_in_backward`."""
    gave_up: tuple[str, ...] = ()
    """What it gave up for memory, in sentences."""
    dense: Mapping[str, int] = field(default_factory=dict)
    """Trainable parameters of two dimensions and more that get no rank, and bytes of each."""
    frozen: Mapping[str, int] = field(default_factory=dict)
    """Parameters that are not trained, and bytes of each."""
    device: str | None = None
    """The type of the one to train on; None is that of the model."""
    world_size: int | None = None
    """GPUs among which FSDP2 shards the model, with the budget each; None of one process."""
    energy: float | None = None
    """Share of the energy of the gradients of ``calibrate`` that the ranks capture."""

    def groups(self, model: nn.Module, **keys: Any) -> list[Group]:
        """Parameter groups of ``model`` for the constructor: one for each rank, and dense ones.

        Args:
            model: the one that the plan was made for, or one whose parameters have its names.
            **keys: further arguments of :func:`lowrank_optim.lowrank_groups`, as ``no_decay``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: it has no such parameter, one that is neither in ``ranks`` nor in
                ``dense``, or one that a rank is too large for.
        """
        self._check(model)
        taken = {"rank", "target_modules", "overrides"} & keys.keys()
        if taken:
            raise ValueError(
                f"groups of a plan take no {sorted(taken)[0]}: edit ranks of the plan instead"
            )
        names = [name for name, _ in model.named_parameters() if bare(name) in self.ranks]
        return with_ranks(lowrank_groups(model, rank=1, target_modules=names, **keys), self.ranks)

    def optimizer(self, model: nn.Module, **arguments: Any) -> LowRankOptimizer:
        """The optimizer of ``model``.

        Args:
            model: as in :meth:`groups`.
            **arguments: of the constructor, such as ``lr`` and ``weight_decay``.

        Raises:
            RuntimeError: the model is sharded, and other ranks have another plan.
            ValueError: as :meth:`groups`, or an argument changes what the plan has counted.
        """
        own = {**self.arguments, **arguments}
        clash = sorted(k for k in arguments if k in self.arguments and k not in PLAIN)
        if clash or (arguments.keys() - PLAIN and self._changed(model, own)):
            named = clash or sorted(arguments.keys() - PLAIN)
            raise ValueError(
                f"{', '.join(named)} would change the memory that this plan counts: give it to "
                "fit(), which plans with it"
            )
        groups = self.groups(model)
        self._check_alike(model)
        return self.optimizer_class(groups, **own)

    def attach(self, optimizer: LowRankOptimizer, **arguments: Any) -> InBackward | None:
        """:func:`lowrank_optim.attach_in_backward` as planned; None where nothing is to attach.

        Args:
            optimizer: that of :meth:`optimizer`.
            **arguments: such as ``max_norm``.

        Raises:
            ValueError: arguments are given and the plan attaches nothing, or they are the plan's.
        """
        if self.in_backward is None:
            if arguments:
                raise ValueError(
                    f"this plan attaches nothing, so {', '.join(arguments)} would have no effect: "
                    "gradients are whole, and torch.nn.utils.clip_grad_norm_ clips them"
                )
            return None
        own: dict[str, Any] = {
            "mode": self.in_backward,
            "accumulation_steps": self.accumulation_steps,
            "coords_dtype": self.coords_dtype,
        }
        clash = sorted(own.keys() & arguments.keys())
        if clash:
            raise ValueError(
                f"{', '.join(clash)} is the plan's: edit the plan, or call fit() again"
            )
        return attach_in_backward(optimizer, **own, **arguments)

    def estimated(self, model: nn.Module) -> Estimate:
        """The estimate anew, without activations: of a plan that was edited."""
        return self._estimated(model, self.arguments)

    def to_json(self) -> str:
        """As text that can be read, edited and kept; :meth:`from_json` reads it."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own["optimizer_class"] = self.optimizer_class.__name__
        own["estimate"] = dataclasses.asdict(self.estimate)
        return json.dumps(own, indent=1)

    @classmethod
    def from_json(cls, text: str, model: nn.Module | None = None) -> Plan:
        """A plan from :meth:`to_json`, also an edited one.

        Args:
            text: the JSON.
            model: what it must be a plan of (default: :meth:`groups` looks then).

        Raises:
            ValueError: the text is no plan, or not of ``model``.
        """
        given = as_object(text)
        known = {f.name for f in dataclasses.fields(cls)}
        needed = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for what, keys in (("lacks", needed - given.keys()), ("has", given.keys() - known)):
            if keys:
                raise ValueError(
                    f"a plan {what} {', '.join(sorted(keys))}: its keys are "
                    f"{', '.join(sorted(known))}"
                )
        plan = cls(
            **{
                **given,
                "optimizer_class": method_of(given["optimizer_class"]),
                "arguments": {k: tupled(v) for k, v in given["arguments"].items()},
                "estimate": estimate_of(given["estimate"]),
                "gave_up": tuple(given.get("gave_up", ())),
            }
        )
        plan._check_values()
        if model is not None:
            plan._check(model)
        return plan

    def __str__(self) -> str:
        """A table of ranks, then what is dense, frozen and given up."""
        own = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        mode = (
            "gradients stay whole"
            if self.in_backward is None
            else f"attach_in_backward(mode={self.in_backward!r})"
        )
        steps = f"{self.accumulation_steps} micro-batch" + "es" * (self.accumulation_steps > 1)
        lines = [
            f"{self.optimizer_class.__name__}({own}); {mode}; {steps} a step",
            f"peak {gib(self.estimate.peak)} GiB of {self.budget / GIB:.6g} GiB"
            + " without activations" * (self.estimate.activations is None)
            + (f", each of {self.world_size} GPUs" if self.world_size else ""),
        ]
        if self.estimate.staging:
            lines[1] += f", and {gib(self.estimate.pinned)} GiB of the host"
        if self.energy is not None:
            lines.append(f"{self.energy:.1%} of the energy of gradients captured")
        by_rank: dict[int, list[str]] = {}
        for name, rank in self.ranks.items():
            by_rank.setdefault(rank, []).append(name)
        lines.append(f"{'rank':>6} {'matrices':>8}  first")
        for rank, names in sorted(by_rank.items(), reverse=True):
            lines.append(f"{rank:>6} {len(names):>8}  {names[0]}")
        for word, sizes in (("dense", self.dense), ("frozen", self.frozen)):
            for name, size in sizes.items():
                lines.append(f"{word:>6} {binary(size):>12}  {name}")
        if self.gave_up:
            lines += ["Given up for memory:", *(f"- {text}" for text in self.gave_up)]
        return "\n".join(lines)

    # ---------------------------------------------------------------- checks

    def _changed(self, model: nn.Module, arguments: Mapping[str, Any]) -> bool:
        return self._estimated(model, arguments) != self._estimated(model, self.arguments)

    def _estimated(self, model: nn.Module, arguments: Mapping[str, Any]) -> Estimate:
        here = any(map(is_sharded, model.parameters()))  # what this rank has, is all there is
        return estimate(
            model,
            self.optimizer_class,
            groups=self.groups,
            in_backward=None if here else self.in_backward,
            accumulation_steps=self.accumulation_steps,
            coords_dtype=self.coords_dtype,  # type: ignore[arg-type]
            device=self.device,
            world_size=None if here else self.world_size,
            **arguments,
        )

    def _check_alike(self, model: nn.Module) -> None:
        """Raise, on every rank, unless all that share a parameter have the same plan.

        Raises:
            RuntimeError: they have not.
        """
        shards: list[Any] = [p for p in model.parameters() if is_sharded(p)]
        by_mesh = {p.device_mesh: p for p in shards}
        told = self.optimizer_class.__name__, self.in_backward, sorted(self.ranks.items())
        own = sorted(self.arguments.items()), self.accumulation_steps, self.coords_dtype
        digest = hashlib.sha256(repr((told, own)).encode()).digest()
        for mesh, param in by_mesh.items():
            for group in mesh.get_all_groups():
                mine = torch.tensor([*map(int, digest[:8])], device=local(param).device)
                others = (collectives.from_first(mine, group) != mine).any().double()
                collectives.sum_([others], group)
                if others > 0:
                    raise RuntimeError(
                        "ranks have different plans: each would step other shapes. Let one call "
                        "fit(), and all others read its Plan.to_json(), or give fit() the same "
                        "micro-batches to calibrate on every rank"
                    )

    def _check_values(self) -> None:
        """Raise for values that no plan has.

        Raises:
            ValueError: one of them.
        """
        for name, rank in self.ranks.items():
            if not whole(1).holds(rank):
                raise ValueError(f"the rank of {name} must be a positive int, got {rank!r}")
        check_mode(self.in_backward)
        if not whole(1).holds(self.accumulation_steps):
            raise ValueError(
                f"accumulation_steps must be a positive int, got {self.accumulation_steps!r}"
            )
        check_device(self.device)
        if not whole(1, none=True).holds(self.world_size):
            raise ValueError(
                f"world_size of a plan must be None or a number of GPUs, got {self.world_size!r}"
            )

    def _check(self, model: nn.Module) -> None:
        """Raise unless this is a plan of ``model``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: the names or shapes are those of another.
        """
        check_module(model)
        params = {bare(name): p for name, p in model.named_parameters()}
        trained = {name for name, p in params.items() if p.requires_grad}
        for name in self.ranks:
            if name not in trained:
                raise ValueError(
                    f"the plan has a rank for {name}, {_missing(name, params, trained)}"
                )
        for name in trained - self.ranks.keys() - self.dense.keys():
            if params[name].dim() >= 2:
                raise ValueError(
                    f"the plan says nothing of {name}, a parameter of {tuple(params[name].shape)} "
                    "that is trained: give it a rank in ranks, name it in dense, or call fit() for "
                    "this model"
                )
        for name, rank in self.ranks.items():
            _check_room(name, params[name], rank)


def _check_room(name: str, param: Tensor, rank: int) -> None:
    view = max(
        (matrix_view(param.shape, flatten=flatten) for flatten in (False, True)),
        key=lambda v: 0 if v is None else v.full_rank,
    )
    side = 0 if view is None else view.full_rank
    given = f"{name} of shape {tuple(param.shape)}"
    if not side:
        raise ValueError(f"the plan has a rank for {given}, which is no matrix")
    if rank > side:
        raise ValueError(f"the plan has rank {rank} for {given}: it must be at most {side}")


def _missing(name: str, params: Iterable[str], trained: Iterable[str]) -> str:
    if name in params:
        return "which is frozen: train it, or take it out of ranks"
    near = difflib.get_close_matches(name, list(trained), 1)
    return "which the model has not" + (f"; did you mean {near[0]}?" if near else "")
