"""Two factors of a weight whose vectors are exchanged with pools of candidates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator, queued, sent
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces import ahead, switching
from lowrank_optim.subspaces.base import State, Subspace
from lowrank_optim.subspaces.lora import balance_, balanced, published_stds
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext, Touched
from lowrank_optim.subspaces.searches import Ask, Searching, alone
from lowrank_optim.subspaces.shared import Shared
from lowrank_optim.subspaces.switching import Schedule, ring, runs, slices, thawing
from lowrank_optim.subspaces.terms import Wants, without_rest
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_finite, check_index

_Turned = TypeVar("_Turned", Tensor, ops.Noise)

SIDES = ("A", "B")
"""Rows of A ``(r, in)`` and, transposed, columns of B ``(out, r)``."""

DRAWN = 256
"""Candidates that are drawn at once: a pool can be as large as the weight."""


@dataclass(frozen=True)
class Pooled(Subspace):
    r"""Two factors of W, and pools of candidates for their vectors.

    State, with k = min(m, n), ``host.`` in host memory:

    ==================== ============= =====================================================
    ``basis_A``          (r, in)       A, in at least float32
    ``basis_B``          (r, out)      B transposed
    ``host.pool_A/B``    (k, in/out)   candidates; ``pool_A/B`` with ``pool_device="param"``
    ``host.held``        (2, r)        the pool index that each slot of A and of B came from
    ``host.frozen``      (2, r)        steps for which a slot stays frozen, this one included
    ``host.head``        (2,)          the next slot to switch
    ==================== ============= =====================================================

    A batch of experts has factors and pools of its own for each, and one order for all.

    Args:
        rank: number r of vectors in each factor.
        scale: LoRA's α; s = α / r.
        interval: steps after which each slot has been switched once, at the initial frequency.
        total_steps: of the run, for the frequency to fall; None keeps it.
        descent_ratio: the part of the run after which it has fallen to 0.3 or, for Z, to half.
        descent: ``"exponential"`` or ``"Z"``.
        freeze_steps: steps N that the counterpart of a switched vector stays as it is.
        freeze_step_counter: pause the counterpart's step too; False lets it run, as released.
        order: ``"fifo"``, or ``"random"`` among the vectors not in use.
        pool_device: ``"cpu"`` or ``"param"``, beside the weight.
        decay_on: what weight decay acts on: ``"factors"`` or the whole ``"weight"``.
        restart_every: steps after which B A is refactorised and all moments start again; or None.
        flip: whether the canonical view is (in, out) rather than (out, in).
        shared: where the optimizer keeps candidates that were fetched ahead.
        columns: where the columns of the canonical view that are here begin and end, and how many
            there are in all; None if all are here.
    """

    interval: int = 40
    total_steps: int | None = None
    descent_ratio: float = 0.1
    descent: str = "exponential"
    freeze_steps: int = 5
    freeze_step_counter: bool = True
    order: str = "fifo"
    pool_device: str = "cpu"
    decay_on: str = "factors"
    restart_every: int | None = None
    flip: bool = False
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)
    columns: tuple[int, int, int] | None = None

    needs_grad: ClassVar[bool] = False
    of_weight: ClassVar[bool] = True

    @property
    def decays_weight(self) -> bool:
        """Not where decay acts on the factors."""
        return self.decay_on == "weight"

    def reproducible(self, count: int) -> bool:
        """Vectors are copied; a restart factors them."""
        return not self.balanced(count)

    def balanced(self, count: int) -> Sequence[str]:
        """At a restart the factors: all else of a refresh copies vectors."""
        due = self.restart_every and count and count % self.restart_every == 0
        return ("basis_A", "basis_B") if due else ()

    def balancing_(self, state: State) -> Searching[None]:
        """``B A`` stays; an accelerator does all matrices at once, as its host waits."""
        a, b = state["basis_A"], state["basis_B"]
        if not on_accelerator(a):
            balance_(a, b)
            return
        new_a, new_b, *_ = yield Ask(balanced, (a, b))
        a.copy_(new_a)
        b.copy_(new_b)

    def of_columns(self, start: int, stop: int, n: int) -> Self:
        """The candidates are as many as of all columns, and drawn with them."""
        return replace(self, columns=(start, stop, n))

    def candidates(self, view: MatrixView) -> int:
        """Entries k of a pool, of the whole matrix."""
        return min(view.m, view.n if self.columns is None else self.columns[2])

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Factors of the weight stored this way round, with this s in front of them."""
        return *super().meaning, self.scale, self.flip

    def pushed(self, state: State) -> Iterable[str]:
        """Both factors."""
        return [f"basis_{side}" for side in SIDES]

    def refreshed(self, state: State) -> Iterable[str]:
        """All but the pools: what a switch writes there nobody reads while the vector is in use."""
        return [key for key in super().refreshed(state) if "pool_" not in key]

    def touched(self, state: State, view: MatrixView, count: int) -> Touched | None:
        """The slots that may be switched, and their counterparts with those that thaw.

        All of it where the factors start or are balanced.
        """
        plain = type(self).refresh_ is Pooled.refresh_
        if not plain or int(state["refresh_step"]) < 0 or self.balanced(count):
            return None
        free = switching.free_slots(self.rank, self.candidates(view), (0, 0))
        most = min(self.schedule.most(count, self.rank), free)
        switched = [ring(head, most, self.rank) for head in state["host.head"].tolist()]
        thawed = self._thawed(state["host.frozen"].tolist())
        fresh = [own.union(other) for own, other in zip(thawed, switched[::-1], strict=True)]
        return Touched(
            ("host.held", "host.frozen", "host.head"),
            {f"basis_{side}": slices(own) for side, own in zip(SIDES, switched, strict=True)},
            {side: slices(own) for side, own in zip(SIDES, fresh, strict=True)},
        )

    @classmethod
    def from_group(cls, group: dict[str, Any], view: MatrixView) -> Self:
        """Fields are group keys; ``fan_in_fan_out`` says that weights are stored (in, out)."""
        return super().from_group({**group, "flip": view.flip != group["fan_in_fan_out"]}, view)

    def sharing(self, shared: Shared) -> Self:
        """This subspace, with what it fetches ahead where the optimizer keeps it."""
        return replace(self, shared=shared)

    @property
    def schedule(self) -> Schedule:
        """How many vectors each step switches."""
        return Schedule(self.interval, self.total_steps, self.descent_ratio, self.descent)

    @property
    def s(self) -> float:
        """The factor of B A."""
        return self.scale / self.rank

    def sizes(self, view: MatrixView) -> tuple[int, int]:
        """Lengths of A's rows and of B's columns: inputs and outputs."""
        return (view.m, view.n) if self.flip else (view.n, view.m)

    def natural(self, x: _Turned) -> _Turned:
        """A canonical matrix, or its noise, as (out, in)."""
        return x.mT if self.flip else x

    def pool(self, state: State, side: int) -> Tensor:
        """Candidates of A (0) or of B (1)."""
        prefix = "host." if self.pool_device == "cpu" else ""
        return state[f"{prefix}pool_{SIDES[side]}"]

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """``A (..., r, in)`` and ``B (..., r, out)``."""
        sizes = zip(SIDES, self.sizes(view), strict=True)
        return {side: (*view.batch, self.rank, size) for side, size in sizes}

    def refuses(self, wants: Wants) -> str | None:
        """All residuals but those that drop: what else should become of it, nobody has said."""
        return without_rest(wants)

    def init(self, view: MatrixView, param: Tensor) -> State:
        """Zeros, but for the order: the first step draws the numbers."""
        k, dtype = self.candidates(view), compute_dtype(param.dtype)
        host = self.pool_device == "cpu"
        state: State = {}
        for side, shape in self.coord_shapes(view).items():
            state[f"basis_{side}"] = param.new_zeros(shape, dtype=dtype)
            device = torch.device("cpu") if host and not param.is_meta else param.device
            pool = torch.zeros(
                (*shape[:-2], k, shape[-1]),
                dtype=dtype,
                device=device,
                pin_memory=host and queued(param.device),
            )
            state[f"{'host.' if host else ''}pool_{side}"] = pool
        state["host.held"] = switching.start_held(self.rank, k)
        state["host.frozen"] = torch.zeros(2, self.rank, dtype=torch.int64)
        state["host.head"] = torch.tensor([0, self.rank // 2])
        return state

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """Vectors are finite, none is in two slots, and the rings are where a switch left them."""
        for side in SIDES:
            for key in (f"basis_{side}", f"pool_{side}", f"host.pool_{side}"):
                check_finite(state, key)
        check_index(state, "host.held", view.full_rank, "distinct")
        check_index(state, "host.frozen", self.freeze_steps + 1)
        check_index(state, "host.head", self.rank)
        switching.check_rings(
            state["host.held"].tolist(),
            state["host.head"].tolist(),
            view.full_rank,
            self.order == "fifo",
        )

    def draw(self, view: MatrixView, generator: torch.Generator) -> list[Tensor]:
        """The candidates ``(k, in)`` and ``(k, out)`` at first: float32, the same on any device."""
        k = self.candidates(view)
        pools = [torch.empty(k, size, dtype=torch.float32) for size in self.sizes(view)]
        for side, entries, drawn in self.drawn(view, generator):
            pools[side][entries] = drawn
        return pools

    def drawn(
        self, view: MatrixView, generator: torch.Generator
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """The same, some at a time: the side, which entries of its pool, and what is here of them.

        All columns are drawn, and those of other ranks are left out.
        """
        start, stop, n = self.columns or (0, view.n, view.n)
        whole, k = view._replace(n=n), self.candidates(view)
        cols, rows = self.sizes(whole)
        stds = published_stds(rows, cols, self.rank, self.scale or 1.0)
        for side, (size, std) in enumerate(zip((cols, rows), stds, strict=True)):
            bound, split = math.sqrt(3) * std, side == int(self.flip)
            for at in range(0, k, DRAWN):
                entries = slice(at, min(at + DRAWN, k))
                x = torch.empty(entries.stop - at, size, dtype=torch.float32)
                x.uniform_(-bound, bound, generator=generator)
                yield side, entries, x[:, start:stop] if split else x

    # ---------------------------------------------------------------- switching

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Every step: thaw, restart if due, switch. Cheap where nothing moves."""
        return alone(self._move_(state, ctx))

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """The same; on an accelerator matrices that restart together are factored in one call."""
        if on_accelerator(state["basis_A"]) and type(self).refresh_ is Pooled.refresh_:
            return (yield from self._move_(state, ctx))
        return self.refresh_(state, grad, ctx)

    def _move_(self, state: State, ctx: RefreshContext) -> Searching[dict[str, BasisChange]]:
        if int(state["refresh_step"]) < 0:
            self._start_(state, ctx)
        before: list[list[int]] = state["host.frozen"].tolist()
        fresh = self._thawed(before)
        frozen = [[max(0, n - 1) for n in own] for own in before]
        if self.balanced(ctx.count):
            if not ctx.seen:
                yield from self.balancing_(state)
            fresh = [set(range(self.rank)) for _ in SIDES]
            frozen = [[0] * self.rank for _ in SIDES]
        for side, slots in enumerate(self._choose_(state, frozen, ctx)):
            for slot in slots:
                frozen[1 - side][slot] = self.freeze_steps
            fresh[1 - side].update(slots)
        if frozen != before:
            state["host.frozen"].copy_(torch.tensor(frozen))
        return {
            name: BasisChange(fresh=slices(slots)) for name, slots in zip(SIDES, fresh, strict=True)
        }

    def _thawed(self, frozen: Sequence[Sequence[int]]) -> list[set[int]]:
        """Slots of A and of B whose steps count from this one on."""
        return [thawing(own) if self.freeze_step_counter else set() for own in frozen]

    def _start_(self, state: State, ctx: RefreshContext) -> None:
        for side, entries, drawn in self.drawn(ctx.view, ctx.generator):
            pool = self.pool(state, side)
            own = drawn if self.pool_device == "cpu" else sent(drawn, pool.device)
            pool[..., entries, :].copy_(own)
        self._start_factors_(state)

    def _start_factors_(self, state: State) -> None:
        for side, held in enumerate(state["host.held"]):
            pool, factor = self.pool(state, side), state[f"basis_{SIDES[side]}"]
            if self.pool_device == "cpu":
                factor.copy_(sent(pool[..., held, :], factor.device))
            else:
                factor.copy_(pool[..., sent(held, pool.device), :])

    def _choose_(
        self, state: State, frozen: Sequence[Sequence[int]], ctx: RefreshContext
    ) -> list[list[int]]:
        """Switch vectors of A, then of B; returns the slots of each."""
        r, k = self.rank, self.candidates(ctx.view)
        counts = [sum(n > 0 for n in own) for own in frozen]
        count = self.schedule.count(ctx.count, r, ctx.generator)
        count = min(count, switching.free_slots(r, k, counts))
        if not count:
            self._fetch_ahead_(state, ctx)
            return [[], []]
        generator = ctx.generator if self.order == "random" else None
        chosen = []
        for side, head in enumerate(state["host.head"].tolist()):
            held: list[int] = state["host.held"][side].tolist()
            slots = ring(head, count, r)
            new = switching.incoming(held, head, count, k, generator)
            self._exchange_(state, side, slots, [held[i] for i in slots], new, ctx)
            state["host.held"][side, slots] = torch.tensor(new)
            chosen.append(slots)
        state["host.head"].add_(count).remainder_(r)
        self._fetch_ahead_(state, ctx)
        return chosen

    def _ahead(self, state: State, ctx: RefreshContext) -> ahead.Ahead | None:
        """What the device fetches while it computes: of a ring, whose order is known."""
        if self.order != "fifo" or not ahead.apart(self.pool(state, 0), state["basis_A"]):
            return None
        return self.shared.get(("ahead", ctx.uid), ahead.Ahead)  # type: ignore[no-any-return]

    def _fetch_ahead_(self, state: State, ctx: RefreshContext) -> None:
        """Let it fetch the most that the next step can ask for."""
        own, r, k = self._ahead(state, ctx), self.rank, self.candidates(ctx.view)
        if own is None:
            return
        count = min(self.schedule.most(ctx.count + 1, r), k - r)
        for side, head in enumerate(state["host.head"].tolist()):
            held: list[int] = state["host.held"][side].tolist()
            new = switching.incoming(held, head, count, k, None)
            own.stage(side, self.pool(state, side), new, state[f"basis_{SIDES[side]}"])

    def _exchange_(
        self,
        state: State,
        side: int,
        slots: Sequence[int],
        old: Sequence[int],
        new: Sequence[int],
        ctx: RefreshContext,
    ) -> None:
        """Put the vectors of ``slots`` back into the pool and take others.

        The copies are queued on the device's stream, between slices of pinned memory: the host
        neither waits for them nor looks at what they bring. It does where something lies between
        rows of the pool: see :func:`lowrank_optim.subspaces.ahead.apart`.
        """
        factor, pool = state[f"basis_{SIDES[side]}"], self.pool(state, side)
        queued = pool.is_contiguous()
        own = self._ahead(state, ctx)  # asked before the pool is written: none goes and comes
        fetched = None if own is None else own.take(side, pool, new)
        for slot, entry in runs(slots, old):
            pool[..., entry, :].copy_(factor[..., slot, :], non_blocking=queued)
        if fetched is not None:
            for slot, at in runs(slots, range(len(slots))):
                factor[..., slot, :].copy_(fetched[..., at, :])
            return
        for slot, entry in runs(slots, new):
            factor[..., slot, :].copy_(pool[..., entry, :], non_blocking=queued)
