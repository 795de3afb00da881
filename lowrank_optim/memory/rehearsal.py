"""What a step and a refresh need in passing, found by taking them without memory.

The optimizer steps as on an accelerator: on tensors of the meta device, with each storage followed
from its birth to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.backward import attach_in_backward
from lowrank_optim.backward.handle import InBackward
from lowrank_optim.backward.shards import like_shard
from lowrank_optim.backward.step_mode import StepMode
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.schedule import phase
from lowrank_optim.groups import Group
from lowrank_optim.memory.activations import Unit
from lowrank_optim.memory.alike import kind_of, told_apart
from lowrank_optim.memory.blocks import Sized, in_blocks
from lowrank_optim.memory.due import Due, set_counters
from lowrank_optim.memory.turns import end_turn
from lowrank_optim.ops.passing import passing
from lowrank_optim.ops.tiles import sizes_alone
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.alive import Alive
from lowrank_optim.tensors.projected_grad import ProjectedGrad, projection


class Rehearsal:
    """An optimizer that steps without memory.

    Args:
        params: the parameters of the model, each once.
        make: makes the optimizer over what stands for each of them.
        mode: of :func:`lowrank_optim.attach_in_backward`, if there is one.
        attached: its other arguments.
        sized: what is taken for a tensor.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        make: Callable[[Mapping[int, nn.Parameter]], Optimizer],
        mode: Literal["project", "step"] | None = None,
        attached: Sequence[tuple[str, Any]] = (),
        sized: Sized = in_blocks,
    ) -> None:
        self._mode, self._sized = mode, sized
        with self._within():
            self.params = [_stand_in(p) for p in params]
            self.optimizer = make({id(p): own for p, own in zip(params, self.params, strict=True)})
            _as_on_an_accelerator(self.optimizer)
            self._handle: InBackward | None = None
            if mode is not None and isinstance(self.optimizer, LowRankOptimizer):
                self._handle = attach_in_backward(self.optimizer, mode, **dict(attached))
        self._number: dict[Tensor, int] = {p: i for i, p in enumerate(self.params)}
        self._trained: list[Tensor] = [p for p in self.params if p.requires_grad]
        self._known: dict[Hashable, Any] = {}

    @classmethod
    def of(
        cls, params: Sequence[Tensor], make: Callable[[Mapping[int, nn.Parameter]], Optimizer],
        mode: Literal["project", "step"] | None, attached: Sequence[tuple[str, Any]],
        sized: Sized = in_blocks,
    ) -> Rehearsal | None:  # fmt: skip
        """A rehearsal; None of an optimizer that is not of this package and needs memory."""
        found = cls(params, make, mode, attached, sized)
        if isinstance(found.optimizer, LowRankOptimizer):
            return found
        try:
            found.step("first") if mode is None else found.arrivals("first")
        except Exception:  # whatever another's step may raise of tensors without values
            return None
        return found

    @property
    def refreshes(self) -> bool:
        """Whether there are bases to be found, or blocks that take turns."""
        if not isinstance(self.optimizer, LowRankOptimizer):
            return False
        return any(i.subspace is not None for _, items in self._groups() for i in items)

    @contextmanager
    def _within(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(tracing.on_meta())
            stack.enter_context(sizes_alone())
            yield

    # ---------------------------------------------------------------- whole steps

    def step(self, due: Due) -> int:
        """Most bytes alive within ``optimizer.step()`` beyond weights, state and gradients.

        Of matrices that are stepped alike only some have a gradient, so that a large model costs
        what its different matrices do: see :func:`lowrank_optim.memory.alike.told_apart`.
        """
        if ("step", due) not in self._known:
            self._begin(due)
            with self._within():
                self._with_gradients(self._prepared(due), due)
                self._known["step", due] = self._measured(
                    self.optimizer.step, comes=due == "first" or not self._sets
                )
        return int(self._known["step", due])

    def _with_gradients(self, params: Sequence[Tensor], due: Due) -> None:
        """Let them have gradients as backward leaves them; of matrices alike it is asked once."""
        alike: dict[Hashable, Tensor] = {}
        kinds = dict(self._kinds()) if self._mode == "project" else {}
        for p in params:
            kind = (kinds.get(p), isinstance(due, frozenset) and self._number[p] in due)
            known = alike.get(kind)
            if isinstance(known, ProjectedGrad):
                p.grad = own = known.copied()
                own.fresh = {k: x.clone() for k, x in known.fresh.items()}
                continue
            p.grad = torch.empty_like(p)
            if self._mode == "project":
                self._hook(p)
                alike[kind] = p.grad

    def _begin(self, due: Due) -> None:
        """Before any other step there is the first."""
        if due != "first" and not self.optimizer.state:
            self.step("first")

    def _prepared(self, due: Due) -> list[Tensor]:
        """Counters such that just the bases ``due`` are; and who needs a gradient."""
        self.optimizer.zero_grad()
        if due == "first":
            self.optimizer.state.clear()
        if not isinstance(self.optimizer, LowRankOptimizer):
            return self._trained
        found: list[Tensor] = []
        for group, items in self._groups():
            flags = {item.param: self._is_due(item, due) for item in items}
            chosen = self.optimizer._strategies(group)
            own = [item for item in items if item.sharded]  # one message is of all of them
            plain = [item for item in items if not item.sharded]
            told = told_apart(plain, chosen, flags, apart=self._mode == "project")
            own += [item for chunk in told for item in chunk]
            self._make_state(own + list({kind_of(item): item for item in items}.values()), chosen)
            if due != "first":
                set_counters(self.optimizer, group, items, flags)
            found += [item.param for item in own]
        end_turn(self.optimizer)
        return found

    def _make_state(self, items: Sequence[ParamPlan], chosen: Any) -> None:
        """State of those that need some: as of one alike that was stepped, or as it begins."""
        assert isinstance(self.optimizer, LowRankOptimizer)
        known: dict[Hashable, Mapping[str, Any]] = {}
        for item in items:
            kind = id(item) if isinstance(item.subspace, Block) else kind_of(item)
            if item.param in self.optimizer.state:
                known[kind] = self.optimizer.state[item.param]
        for item in items:
            if item.param in self.optimizer.state:
                continue
            alike = known.get(kind_of(item))
            if alike is None:
                self.optimizer._state_of(item, chosen)
            else:
                own = ((k, x.clone() if isinstance(x, Tensor) else x) for k, x in alike.items())
                self.optimizer.state[item.param] = dict(own)

    def _groups(self) -> Iterator[tuple[Group, list[ParamPlan]]]:
        assert isinstance(self.optimizer, LowRankOptimizer)
        for group in self.optimizer.param_groups:
            items = [i for i in self.optimizer._items(group) if i.param.requires_grad]
            yield group, items

    def _is_due(self, item: ParamPlan, due: Due) -> bool:
        if isinstance(due, frozenset):
            return self._number[item.param] in due
        return due != "none"

    def turns(self) -> list[frozenset[int]]:
        """Parameters whose bases are due at once, of every step within a gap that has some."""
        by_phase: dict[int, set[int]] = {}
        for group, items in self._groups():
            assert isinstance(self.optimizer, LowRankOptimizer)
            chosen = self.optimizer._strategies(group)
            for item in items:
                if item.subspace is not None:
                    turn = 0 if isinstance(item.subspace, Block) else phase(item, chosen)
                    by_phase.setdefault(turn, set()).add(self._number[item.param])
        return [frozenset(own) for own in by_phase.values()]

    # ---------------------------------------------------------------- inside backward

    def arrivals(self, due: Due, passes: int = 1, units: Sequence[Unit] = ()) -> dict[Unit, int]:
        """The same of what happens as the gradient of each parameter arrives, in the last pass.

        Beyond that gradient too. Parameters that are handled alike share one figure.

        Args:
            due: bases that are found.
            passes: micro-batches.
            units: as backward comes by them (default: each parameter alone, the last first). Their
                order matters where blocks switch: the first of them does so for all.
        """
        units = tuple(units) if self._takes_turns or self._sharded else ()
        if (due, passes, units) in self._known:
            return dict(self._known[due, passes, units])
        known: dict[Hashable, int] = {}
        found: dict[Unit, int] = {}
        self._begin(due)
        with self._within():
            self._prepared(due)
            switches = due == "all" and self._mode == "step" and self._takes_turns
            if switches or (due == "first" and self._mode == "step" and self._sharded):
                found = self._in_turn(units, comes=due == "first" or not self._sets)
                if switches:
                    found = {unit: max(0, size) for unit, size in found.items()}
                self._known[due, passes, units] = found
                return dict(found)
            for unit, kind in self._ordered(units):
                if kind not in known:
                    for _ in range(passes):
                        known[kind] = self._arrival(unit)
                found[unit] = known[kind]
            self._finish()
        self._known[due, passes, units] = found
        return dict(found)

    @property
    def _sharded(self) -> bool:
        return any(map(is_sharded, self.params))

    def _ordered(self, units: Sequence[Unit]) -> list[tuple[Unit, Hashable]]:
        """Units as backward comes by them, with what they have in common."""
        kinds = {self._number[p]: kind for p, kind in self._kinds()}
        own = [unit for unit in units if all(n in kinds for n in unit)]
        told = {n for unit in own for n in unit}
        rest = [] if self._sharded else [(n,) for n in reversed(kinds) if n not in told]
        return [(unit, tuple(kinds[n] for n in unit)) for unit in (*own, *rest)]

    def _in_turn(self, units: Sequence[Unit], comes: bool) -> dict[Unit, int]:
        """The same of a step in which state comes, or moments of one turn come and others go.

        Args:
            units: as of :meth:`arrivals`.
            comes: whether each counts beyond what is there once all of them have been stepped, or
                beyond what is there before: see :meth:`_measured`.
        """
        most: dict[Unit, int] = {}
        alive = Alive("meta", self._sized, passing)
        alive.hold([*self._held()])
        before = alive.now
        for unit, _ in self._ordered(units):
            params = [self.params[n] for n in unit]
            for p in params:
                p.grad = torch.empty_like(p)
            alive.hold([local(p.grad) for p in params if p.grad is not None])
            with alive:
                self._take(params)
            most[unit] = alive.most - sum(self._sized(local(p).nbytes) for p in params)
        self._finish()
        held = alive.now if comes else before
        return {unit: size - held for unit, size in most.items()}

    @property
    def _takes_turns(self) -> bool:
        return any(self._blocks())

    @property
    def _sets(self) -> bool:
        """Whether sets of tensors take turns, of which one may hold more than another."""
        return any(block.layers is None for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        if isinstance(self.optimizer, LowRankOptimizer):
            items = (item for _, items in self._groups() for item in items)
            yield from (i.subspace for i in items if isinstance(i.subspace, Block))

    def _kinds(self) -> list[tuple[Tensor, Hashable]]:
        if not isinstance(self.optimizer, LowRankOptimizer):
            return [(p, (p.shape, p.stride(), p.dtype)) for p in self._trained]
        return [
            (item.param, (n, kind_of(item), self._active(item)))
            for n, (_, items) in enumerate(self._groups())
            for item in items
        ]

    def _active(self, item: ParamPlan) -> Hashable:
        """Whether a block holds moments now, told by what it has."""
        if not isinstance(item.subspace, Block):
            return ()
        return tuple(sorted(self.optimizer.state.get(item.param, ())))

    def _arrival(self, unit: Unit) -> int:
        params = [self.params[n] for n in unit]
        param = params[0]
        if param.grad is None:
            for p in params:
                p.grad = torch.empty_like(p)
            return self._measured(lambda: self._take(params))
        more = torch.empty_like(param)

        def again() -> None:
            assert param.grad is not None
            with torch.no_grad():
                param.grad += more
            self._hook(param)

        return self._measured(again, more)

    def _take(self, params: Sequence[Tensor]) -> None:
        """What happens inside backward once their gradients are there."""
        if isinstance(self._handle, StepMode) and is_sharded(params[0]):
            with torch.no_grad():
                self._handle._step_shards(params)
            return
        for p in params:
            self._hook(p)

    def _hook(self, param: Tensor) -> None:
        if self._handle is not None:
            self._handle._hook(param)
        elif self._mode == "step":
            self.optimizer.step()
            param.grad = None

    def _finish(self) -> None:
        """What a step after backward does, so that another backward may come."""
        if self._handle is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    # ---------------------------------------------------------------- counting

    def _measured(self, work: Callable[[], Any], *more: Tensor, comes: bool = True) -> int:
        """Most bytes beyond what was there before, or is there after: state is made once.

        A gradient that goes counts as there after, as it is counted apart.

        Args:
            work: what is done.
            *more: tensors that are there besides.
            comes: whether state may come. Where one set of blocks takes the place of another, what
                it has more is beyond what was there before.
        """
        alive = Alive("meta", self._sized, passing)
        alive.hold([*self._held(), *more])
        before, grads = alive.now, [p for p in self.params if p.grad is not None]
        with alive:
            work()
        gone = sum(self._sized(local(p).nbytes) for p in grads if p.grad is None)
        return alive.most - (max(before, alive.now + gone) if comes else before)

    def _held(self) -> Iterator[Tensor]:
        yield from map(local, self.params)
        for p in self.params:
            kept = projection(p.grad)
            if kept is not None:
                yield from (*kept.coords.values(), *kept.fresh.values())
            elif p.grad is not None:
                yield local(p.grad)
        for state in self.optimizer.state.values():
            yield from (local(x) for x in state.values() if isinstance(x, Tensor) and x.is_meta)
        if isinstance(self.optimizer, LowRankOptimizer):
            yield from self.optimizer._shared.tensors()
            yield from self.optimizer._staging.tensors()


def _stand_in(param: Tensor) -> nn.Parameter:
    if is_sharded(param):
        like = like_shard(param, torch.empty_like(local(param), device="meta"))
    else:
        like = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
    return nn.Parameter(like, requires_grad=param.requires_grad)


def _as_on_an_accelerator(optimizer: Optimizer) -> None:
    """Torch's own optimizers take all parameters at once there, where nobody chose."""
    for group in optimizer.param_groups:
        if group.get("foreach", ...) is None and not group.get("fused"):
            group["foreach"] = True
