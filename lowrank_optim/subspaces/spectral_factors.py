"""Spectral factors of a weight, as Sparse Spectral Training keeps them, finds and draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.ops.devices import brought, on_accelerator, queued, sent
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import State, Subspace
from lowrank_optim.subspaces.factors import order_of, sample, triplets, triplets_of, unit
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching, alone
from lowrank_optim.subspaces.terms import Wants, without_rest
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import (
    WIDE_COUNTER_MAX,
    check_counter,
    check_finite,
    check_index,
    set_counter_,
)

FACTORS = ("basis_u", "basis_v", "basis_s")
"""State keys of what is trained."""

CHUNK = 256
"""Inactive singular vectors that are brought to the device and widened at once."""


@dataclass(frozen=True)
class SpectralFactors(Subspace):
    """Singular values and vectors of W: how they are kept, found anew and drawn from.

    The factors are kept as rows. ``basis_order`` holds the indices, in the order of the last
    factorisation, of the vectors in use and then of the others, both ascending; singular values
    and their moments stay in the order of the factorisation.
    """

    iterations_per_round: int | None = None
    warmup_steps: int = 20
    sampling: str = "mixed"
    enhanced: bool = True
    negative: str = "clamp"
    factors: str = "exact"
    factor_dtype: str = "float32"
    offload_inactive: bool = False
    vector_lr_scale: float = 1.0
    s_lr_scale: float = 1.0

    keys: ClassVar[tuple[str, ...]] = (
        "basis_u", "basis_v", "basis_s", "basis_u_rest", "basis_v_rest", "basis_order",
    )  # fmt: skip
    """State keys of the factors where all are on the device."""
    needs_grad: ClassVar[bool] = False
    of_weight: ClassVar[bool] = True
    counters: ClassVar[tuple[str, ...]] = ("host.iteration",)

    # ---------------------------------------------------------------- state

    @property
    def whole(self) -> str | None:
        """All vectors of one side, as large as a square W, would be on every rank."""
        if not self.exact:
            return None
        return "it keeps all factors of the whole weight. Pass factors='active'"

    @property
    def exact(self) -> bool:
        """Whether all singular values are trained, and all vectors kept."""
        return self.factors == "exact"

    @property
    def rest_keys(self) -> tuple[str, str]:
        """State keys of the vectors not in use."""
        where = "host." if self.offload_inactive else ""
        return f"{where}basis_u_rest", f"{where}basis_v_rest"

    def refuses(self, wants: Wants) -> str | None:
        """All residuals but those that drop: what else should become of it, nobody has said."""
        return without_rest(wants)

    def init(self, view: MatrixView, param: Tensor) -> State:
        """Zeros: until the first refresh the update is zero."""
        dtype, k = compute_dtype(param.dtype), view.full_rank
        sides = {"basis_u": view.m, "basis_v": view.n}
        state = {
            key: param.new_zeros(*view.batch, self.rank, size, dtype=dtype)
            for key, size in sides.items()
        }
        kept = k if self.exact else self.rank
        state["basis_s"] = param.new_zeros(*view.batch, kept, dtype=dtype)
        state["host.iteration"] = torch.zeros((), dtype=torch.float32)
        if self.exact:
            narrow = torch.bfloat16 if self.factor_dtype == "bfloat16" else dtype
            device = torch.device("cpu") if self._offloads(param) else param.device
            for key, size in zip(self.rest_keys, sides.values(), strict=True):
                shape = *view.batch, k - self.rank, size
                pinned = self._offloads(param) and queued(param.device)
                state[key] = torch.zeros(shape, dtype=narrow, device=device, pin_memory=pinned)
            order = torch.arange(k, dtype=torch.int32, device=param.device)
            state["basis_order"] = order.repeat(*view.batch, 1) if view.batch else order
        return state

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """Factors are finite, singular values not negative, and the order a permutation."""
        for key in ("basis_u", "basis_v", *self.rest_keys):
            check_finite(state, key)
        check_finite(state, "basis_s", least=0)
        check_index(state, "basis_order", view.full_rank, "distinct")
        check_counter(state, "host.iteration", most=WIDE_COUNTER_MAX)

    def _offloads(self, param: Tensor) -> bool:
        return self.offload_inactive and not param.is_meta

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """``u``, ``s`` and ``v``."""
        kept = view.full_rank if self.exact else self.rank
        return {
            "u": (*view.batch, self.rank, view.m),
            "s": (*view.batch, 1, kept),
            "v": (*view.batch, self.rank, view.n),
        }

    def lr_factor(self, since: float | Tensor) -> float | Tensor:
        """Linear over ``warmup_steps`` from the first step of an iteration: 1/20, 2/20, ..., 1."""
        if isinstance(since, Tensor):
            return ((since.double() + 1) / max(1, self.warmup_steps)).clamp(max=1.0)
        return min(1.0, (since + 1) / max(1, self.warmup_steps))

    def spectrum(self, state: State) -> Tensor:
        """Singular values of the vectors in use ``(..., r)``."""
        s = state["basis_s"]
        return s.gather(-1, self._active(state)) if self.exact else s

    def _active(self, state: State) -> Tensor:
        return state["basis_order"][..., : self.rank].long()

    def rest(
        self, states: Sequence[State]
    ) -> Iterator[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]:
        """The vectors not in use of alike matrices, some at a time, on the device.

        Yields:
            Their indices ``(b, ..., c)``, and u and v of each.
        """
        if not self.exact:
            return
        like = states[0]["basis_u"]
        order = stacked([state["basis_order"] for state in states])[..., self.rank :].long()
        rests = [torch.split(state[key], CHUNK, -2) for key in self.rest_keys for state in states]
        for index, *vectors in zip(torch.split(order, CHUNK, -1), *rests, strict=True):
            if index.numel():
                # from pinned memory: a later chunk is on its way while this one is used
                here = [x.to(like, non_blocking=True) for x in vectors]
                yield index, here[: len(states)], here[len(states) :]

    # ---------------------------------------------------------------- refresh

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Begin an iteration: factor W if a round begins, then choose the vectors to train."""
        return alone(self._begin_(state, ctx))

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """On an accelerator all matrices are factored at once: its host waits once."""
        if on_accelerator(state["basis_u"]) and type(self).refresh_ is SpectralFactors.refresh_:
            return (yield from self._begin_(state, ctx))
        return self.refresh_(state, grad, ctx)

    def _begin_(self, state: State, ctx: RefreshContext) -> Searching[dict[str, BasisChange]]:
        iteration, view = int(state["host.iteration"]), ctx.view
        noise = torch.empty(view.full_rank, dtype=torch.float64)
        noise.exponential_(generator=ctx.generator)
        if self.factors_anew(state, view):
            fine = yield from self._factor_(state, ctx, iteration, noise)
            moved = self._all_new(state, fine)
        else:
            moved = yield from self._redraw_(state, iteration, noise)
        set_counter_(state["host.iteration"], iteration + 1)
        return moved

    def weight(self, state: State, ctx: RefreshContext) -> Tensor:
        """W ``(..., m, n)``."""
        assert ctx.param is not None
        return ctx.param.detach()

    def factors_anew(self, state: State, view: MatrixView) -> bool:
        """Whether a round begins."""
        length = self.iterations_per_round or math.ceil(view.full_rank / self.rank)
        return not self.exact or int(state["host.iteration"]) % length == 0

    def _factor_(
        self, state: State, ctx: RefreshContext, iteration: int, noise: Tensor
    ) -> Searching[Tensor | None]:
        """Factor W, and draw from each matrix with the same random numbers.

        Returns:
            Whether W could be factored, of an accelerator; where it could not, nothing changed.
        """
        w = self.weight(state, ctx).to(state["basis_u"].dtype)
        old = self._last(state) if iteration > 0 and self.exact else ()
        fine: Tensor | None = None
        if on_accelerator(w):
            *whole, fine = yield from triplets_of(w, old)
            found = list(zip(*(x.reshape(-1, *x.shape[w.dim() - 2 :]) for x in whole), strict=True))
        else:
            matrices = w.reshape(-1, *w.shape[-2:])
            olds = zip(*(x.reshape(-1, *x.shape[-2:]) for x in old), strict=True)
            pairs = [*olds] or [()] * len(matrices)
            found = [triplets(*own) for own in zip(matrices, pairs, strict=True)]
        orders = []
        for _, s, _ in found:
            chosen = sample(self.sampling, s, self.rank, iteration, noise).to(s.device)
            orders.append(order_of(chosen, s.numel()))
        rests = yield from self._rests(w, found, orders, fine)
        for i, (u, s, v) in enumerate(found):  # all or, if one cannot be factored, none
            self._keep_(state, i, u, s, v, orders[i], rests[i], fine)
        return fine

    def _rests(
        self,
        w: Tensor,
        found: Sequence[tuple[Tensor, Tensor, Tensor]],
        orders: Sequence[Tensor],
        fine: Tensor | None,
    ) -> Searching[Sequence[tuple[Tensor, ...]]]:
        """Vectors that are not in use, u and v of each matrix, where they are kept."""
        if not self.exact:
            return [()] * len(found)
        rests: list[tuple[Tensor, ...]] = []
        for (u, _, v), order in zip(found, orders, strict=True):
            rests.append((u[order[self.rank :]], v[order[self.rank :]]))
        if fine is None or not self._offloads(w):
            return rests
        every = [stacked(own) for own in zip(*rests, strict=True)]
        *here, ok = yield Ask(brought, (*every, fine), listed=True)
        if not bool(ok):  # what is on the host cannot be selected
            raise LinAlgError("the matrix is not finite")
        return [*zip(*here, strict=True)]

    def _last(self, state: State) -> tuple[Tensor, Tensor]:
        """All u and v of the last factorisation, the largest singular values first."""
        by_size = torch.sort(state["basis_s"], descending=True, stable=True).indices.unsqueeze(-1)
        u, v = (self.in_order(state, side) for side in "uv")
        return u.gather(-2, by_size.expand(u.shape)), v.gather(-2, by_size.expand(v.shape))

    def _keep_(
        self,
        state: State,
        i: int,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        order: Tensor,
        rests: tuple[Tensor, ...],
        fine: Tensor | None,
    ) -> None:
        def keep_(key: str, dims: int, new: Tensor) -> None:
            x = state[key]
            x = x[i] if x.dim() > dims else x
            select = fine is not None and key not in away
            x.copy_(torch.where(fine, new.to(x.dtype), x) if select else new)  # type: ignore[arg-type]

        away, chosen = self.rest_keys if self.offload_inactive else (), order[: self.rank]
        keep_("basis_u", 2, u[chosen])
        keep_("basis_v", 2, v[chosen])
        if not self.exact:
            keep_("basis_s", 1, s[chosen])
            return
        for key, x in zip(self.rest_keys, rests, strict=True):
            keep_(key, 2, x)
        keep_("basis_s", 1, s)
        keep_("basis_order", 1, order)

    def _redraw_(
        self, state: State, iteration: int, noise: Tensor
    ) -> Searching[dict[str, BasisChange]]:
        """Other vectors of the same factors: those that stay keep their bits."""
        s, old = state["basis_s"], state["basis_order"].long()
        k = s.shape[-1]
        chosen = [
            order_of(sample(self.sampling, x, self.rank, iteration, noise), k)
            for x in s.reshape(-1, k)
        ]
        order = torch.stack(chosen).reshape(old.shape).to(old.device)
        at = old.argsort(-1).gather(-1, order)  # where each of the new order stands in the old one
        here, moves = [state["basis_u"], state["basis_v"]], at
        if on_accelerator(s) and self._offloads(s):  # vectors change places where the others are
            *here, moves = yield Ask(brought, (*here, at), listed=True)
        for own, side, key in zip(here, "uv", self.rest_keys, strict=True):
            active, rest = state[f"basis_{side}"], state[key]
            every = torch.cat([own, rest.to(own.dtype)], -2)
            every = every.gather(-2, moves.unsqueeze(-1).expand(every.shape))
            if rest.dtype != active.dtype:  # rounding has cost those that come in their length
                every[..., : self.rank, :] = unit(every[..., : self.rank, :])
            active.copy_(sent(every[..., : self.rank, :].contiguous(), active.device))
            rest.copy_(every[..., self.rank :, :])
        state["basis_order"].copy_(order)
        source = at[..., : self.rank]
        kept = BasisChange(source=torch.where(source < self.rank, source, -1))
        return {"u": kept, "s": BasisChange(), "v": kept}

    def _all_new(self, state: State, fine: Tensor | None = None) -> dict[str, BasisChange]:
        """Nothing is left of the old vectors, but for where ``fine`` is False."""

        def none(like: Tensor) -> Tensor:
            new = torch.full_like(like, -1, dtype=torch.long)
            stay = torch.arange(like.shape[-1], device=like.device)
            return new if fine is None else torch.where(fine, new, stay)

        vectors = none(state["basis_u"][..., 0])
        return {
            "u": BasisChange(source=vectors, ok=fine),
            "s": BasisChange(source_right=none(state["basis_s"]), ok=fine),
            "v": BasisChange(source=vectors, ok=fine),
        }

    def changed(self, before: State, after: State) -> dict[str, BasisChange] | None:
        """Where W has been factored anew."""
        return None if self.exact else self._all_new(after)

    def in_order(self, state: State, side: str) -> Tensor:
        """All u ``(..., k, m)`` or v ``(..., k, n)`` in the order of the factorisation."""
        active, rest = state[f"basis_{side}"], state[self.rest_keys["uv".index(side)]]
        every = torch.cat([active, rest.detach().to(active, non_blocking=True)], -2)
        at = state["basis_order"].long().argsort(-1)
        return every.gather(-2, at.unsqueeze(-1).expand(every.shape))
