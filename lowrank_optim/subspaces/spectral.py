"""Spectral factors of the weights themselves: the subspace of Sparse Spectral Training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator, queued
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import State, Subspace
from lowrank_optim.subspaces.factors import (
    order_of,
    sample,
    stepped,
    triplets,
    triplets_of,
    unit,
)
from lowrank_optim.subspaces.refresh import BasisChange, Reduce, RefreshContext, identity
from lowrank_optim.subspaces.searches import Searching, alone
from lowrank_optim.subspaces.target import Target, guarded
from lowrank_optim.subspaces.terms import Term, Wants
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


class Change(NamedTuple):
    """What one step does to the factors, which it has not touched yet."""

    u: Tensor
    """The active u of the next step ``(..., r, m)``."""
    v: Tensor
    """The active v ``(..., r, n)``."""
    s: Tensor
    """All singular values ``(..., k)``."""
    sign: Tensor | None
    """Of each, where ``negative="flip"`` turns some u around, in use or not."""

    turned: Tensor
    """Change of the active u ``(..., r, m)``."""
    before: Tensor
    """``decay s v`` of the active, ``(..., r, n)``."""
    after: Tensor
    """``s' v'`` of the active, ``(..., r, n)``."""
    gained: Tensor
    """``s' - decay s`` of all ``(..., k)``, with the sign that u keeps."""


@dataclass(frozen=True)
class Spectral(Subspace):
    r"""Singular values of W, and r of its singular vectors at a time.

    .. math::
        W = U \mathrm{diag}(s) V^T, \qquad
        g_{u_i} = G v_i, \quad g_{v_i} = G^T u_i, \quad g_{s_i} = u_i^T G v_i

    Coordinates ``u (..., r, m)`` and ``v (..., r, n)`` of the vectors in use, and ``s (..., 1, k)``
    of all singular values, ``(..., 1, r)`` with ``factors="active"``. A refresh begins an
    iteration: it draws r other vectors, and after ``iterations_per_round`` of them factors W anew.

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
        if wants == "nothing":
            return None
        return "its coordinates are of factors of the weight, and leave nothing outside them"

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

    def rest(self, state: State) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The vectors not in use, some at a time: their indices, u and v, on the device."""
        if not self.exact:
            return
        like, (u_key, v_key) = state["basis_u"], self.rest_keys
        order = state["basis_order"][..., self.rank :].long()
        parts = (
            torch.split(x, CHUNK, -2) for x in (order.unsqueeze(-1), state[u_key], state[v_key])
        )
        for index, u, v in zip(*parts, strict=True):
            if index.numel():
                # from pinned memory: a later chunk is on its way while this one is used
                yield index.squeeze(-1), *(x.to(like, non_blocking=True) for x in (u, v))

    # ---------------------------------------------------------------- refresh

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Begin an iteration: factor W if a round begins, then choose the vectors to train."""
        return alone(self._begin_(state, ctx))

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """On an accelerator all matrices are factored at once: its host waits once."""
        if on_accelerator(state["basis_u"]) and type(self).refresh_ is Spectral.refresh_:
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
            moved = self._redraw_(state, iteration, noise)
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
            if self._offloads(w) and not bool(fine):  # what is on the host cannot be selected
                raise LinAlgError("the matrix is not finite")
        else:
            matrices = w.reshape(-1, *w.shape[-2:])
            olds = zip(*(x.reshape(-1, *x.shape[-2:]) for x in old), strict=True)
            pairs = [*olds] or [()] * len(matrices)
            found = [triplets(*own) for own in zip(matrices, pairs, strict=True)]
        for i, (u, s, v) in enumerate(found):  # all or, if one cannot be factored, none
            chosen = sample(self.sampling, s, self.rank, iteration, noise).to(u.device)
            self._keep_(state, i, u, s, v, chosen, fine)
        return fine

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
        chosen: Tensor,
        fine: Tensor | None,
    ) -> None:
        def keep_(key: str, dims: int, new: Tensor) -> None:
            x = state[key]
            x = x[i] if x.dim() > dims else x
            select = fine is not None and key not in away
            x.copy_(torch.where(fine, new.to(x.dtype), x) if select else new)  # type: ignore[arg-type]

        away = self.rest_keys if self.offload_inactive else ()
        keep_("basis_u", 2, u[chosen])
        keep_("basis_v", 2, v[chosen])
        if not self.exact:
            keep_("basis_s", 1, s[chosen])
            return
        order = order_of(chosen, s.numel())
        for key, x in zip(self.rest_keys, (u, v), strict=True):
            keep_(key, 2, x[order[self.rank :]])
        keep_("basis_s", 1, s)
        keep_("basis_order", 1, order)

    def _redraw_(self, state: State, iteration: int, noise: Tensor) -> dict[str, BasisChange]:
        """Other vectors of the same factors: those that stay keep their bits."""
        s, old = state["basis_s"], state["basis_order"].long()
        k = s.shape[-1]
        chosen = [
            order_of(sample(self.sampling, x, self.rank, iteration, noise), k)
            for x in s.reshape(-1, k)
        ]
        order = torch.stack(chosen).reshape(old.shape).to(old.device)
        at = old.argsort(-1).gather(-1, order)  # where each of the new order stands in the old one
        for side, key in zip("uv", self.rest_keys, strict=True):
            active, rest = state[f"basis_{side}"], state[key]
            every = torch.cat([active.to(rest.device), rest.to(active.dtype)], -2)
            index = at.to(rest.device).unsqueeze(-1).expand(every.shape)
            every = every.gather(-2, index)
            if rest.dtype != active.dtype:  # rounding has cost those that come in their length
                every[..., : self.rank, :] = unit(every[..., : self.rank, :])
            active.copy_(every[..., : self.rank, :])
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
        every = torch.cat([active, rest.to(active)], -2)
        at = state["basis_order"].long().argsort(-1)
        return every.gather(-2, at.unsqueeze(-1).expand(every.shape))

    # ---------------------------------------------------------------- step

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """Gradients of the factors, by the chain rule; ``enhanced`` leaves out the factor s."""
        u, v = state["basis_u"], state["basis_v"]
        gu, gv = ops.project(v.mT, grad.mT), ops.project(u.mT, grad)
        return {name: reduce(x) for name, x in self._chained(state, grad, gu, gv).items()}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; all but the products with gradients are computed of several as one."""
        if type(self).coords is not Spectral.coords:
            return super().coords_of(states, grads)
        found: list[dict[str, Tensor]] = []
        for at in self._several(states, grads[0]):
            if len(at) == 1:
                found.append(self.coords(states[at[0]], grads[at[0]], reduce=identity))
                continue
            whole = _whole([states[n] for n in at])
            u, v = (whole[key].to(grads[0].dtype).unbind(0) for key in ("basis_u", "basis_v"))
            own = [grads[n] for n in at]
            dtype = ops.product_dtype(own[0].dtype)
            gu, gv = (torch.empty_like(whole[key], dtype=dtype) for key in FACTORS[:2])
            for g, a, b, of_u, of_v in zip(own, u, v, gu.unbind(0), gv.unbind(0), strict=True):
                ops.project(b.mT, g.mT, of_u)
                ops.project(a.mT, g, of_v)
            parts = self._chained(whole, own[0], gu, gv)
            each = zip(*(x.unbind(0) for x in parts.values()), strict=True)
            found += [dict(zip(parts, xs, strict=True)) for xs in each]
        return found

    def _several(self, states: Sequence[State], like: Tensor) -> list[range]:
        """Which matrices like ``like`` are computed as one."""
        size = sum(states[0][key].numel() for key in FACTORS[:2])
        if self.exact:  # whose other vectors come some at a time
            return [range(n, n + 1) for n in range(len(states))]
        return fillings(len(states), 2 * size, like)  # of what moves W each factor is half

    def _chained(self, state: State, grad: Tensor, gu: Tensor, gv: Tensor) -> dict[str, Tensor]:
        """Gradients of factors, from the products of the gradient with v and with u."""
        u = state["basis_u"]
        gs = (gu.to(u.dtype) * u).sum(-1)
        if self.exact:
            parts, index = [gs], [self._active(state)]
            for where, ui, vi in self.rest(state):
                parts.append((ops.project(vi.mT, grad.mT).to(ui.dtype) * ui).sum(-1))
                index.append(where)
            gs = torch.empty_like(state["basis_s"]).scatter_(
                -1, torch.cat(index, -1), torch.cat(parts, -1)
            )
        if not self.enhanced:
            s = self.spectrum(state).unsqueeze(-1).to(gu.dtype)
            gu, gv = gu * s, gv * s
        return {"u": gu, "s": gs.unsqueeze(-2), "v": gv}

    def across(self, into: Target, state: State, update: dict[str, Tensor]) -> Tensor:
        """Of each v, once it has moved: the square of its length, and whether it has moved."""
        v = state["basis_v"]
        step = update["v"].to(v.dtype) * (into.lr * self.vector_lr_scale)
        return torch.stack([(v - step).double().square().sum(-1), (step != 0).any(-1).double()])

    def advanced(
        self,
        state: State,
        update: dict[str, Tensor],
        lr: float,
        decay: float | Tensor,
        across: Tensor | None = None,
    ) -> Change:
        """A step of the factors: unit vectors, singular values not below zero, decay on s alone.

        ``decay`` is a number, or of a shape that goes with the singular values.
        """
        u, v, s = (state[key] for key in FACTORS)
        decayed = s * decay
        new_s = decayed - (lr * self.s_lr_scale) * update["s"].squeeze(-2)
        sign = torch.where(new_s < 0, -1.0, 1.0).to(s) if self.negative == "flip" else None
        before = self._of_active(state, decayed) * v
        new_u = stepped(u, update["u"], lr * self.vector_lr_scale)
        new_v = stepped(v, update["v"], lr * self.vector_lr_scale, across)
        gained = new_s - decayed if sign is not None else new_s.clamp(min=0) - decayed
        after = self._of_active(state, decayed + gained) * new_v
        turned = new_u - u
        if sign is not None:
            new_s, new_u = new_s.abs(), new_u * self._of_active(state, sign)
        return Change(new_u, new_v, new_s.clamp(min=0), sign, turned, before, after, gained)

    def pushed(self, state: State) -> Iterable[str]:
        """The factors in use; of those that are not, u where it may turn around."""
        turned = self.rest_keys[:1] if self.exact and self.negative == "flip" else ()
        return ["basis_u", "basis_v", "basis_s", *turned]

    def keep_(self, state: State, change: Change) -> None:
        """Write what :meth:`advanced` found."""
        torch._foreach_copy_([state[key] for key in FACTORS], [*change[:3]])
        if change.sign is not None:
            self._flip_rest_(state, change.sign)

    def _of_active(self, state: State, values: Tensor) -> Tensor:
        """Entries ``(..., r, 1)`` of ``(..., k)`` that belong to the vectors in use."""
        values = values.gather(-1, self._active(state)) if self.exact else values
        return values.unsqueeze(-1)

    def _flip_rest_(self, state: State, sign: Tensor) -> None:
        if self.exact:
            rest = state[self.rest_keys[0]]
            own = sign.gather(-1, state["basis_order"][..., self.rank :].long())
            rest.mul_(own.unsqueeze(-1).to(rest))

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r"""``W <- decay W + U' diag(s') V'^T - U diag(decay s) V^T``, rounded once.

        The difference is taken of the factors, not of the products: a step of zero is no step.
        """
        old_u, decay = state["basis_u"], into.guarded_decay()
        change = self.advanced(state, update, into.lr, of_all(decay), into.across)
        lefts, rights = ([x] for x in _moves(old_u, change))
        for where, u, v in self.rest(state):
            lefts.append(u)
            rights.append(v * change.gained.gather(-1, where).unsqueeze(-1))
        if into.param.dtype != old_u.dtype:
            lefts, rights = [torch.cat(lefts, -2)], [torch.cat(rights, -2)]
        for left, right in zip(lefts, rights, strict=True):
            ops.lift_add_(into.param, left.mT, right, None, decay, 1.0, into.rounding)
            decay = 1.0
        self.keep_(state, change)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; factors of several are stepped as one tensor."""
        first, plain = intos[0], type(self).push_ is Spectral.push_
        alike = all(into.lr == first.lr and into.across is None for into in intos)
        if not (plain and alike):
            yield from super().push_all_(intos, states, updates, terms)
            return
        for at in self._several(states, first.param):
            own = [intos[n] for n in at]
            if len(at) == 1:
                self.push_(own[0], states[at[0]], updates[at[0]], terms[at[0]])
                yield at[0]
                continue
            whole = _whole([states[n] for n in at])
            update = {key: stacked([updates[n][key] for n in at]) for key in updates[0]}
            decays = [into.guarded_decay() for into in guarded(own)]
            decay = decays[0]
            if isinstance(decay, Tensor):
                decay = stacked(decays).reshape(len(at), -1)[:, :1]  # type: ignore[arg-type]
            change = self.advanced(whole, update, first.lr, decay)
            left, right = _moves(whole["basis_u"], change)
            if first.rounding is None:
                left, right = left.to(first.param.dtype), right.to(first.param.dtype)
            parts = [[None] * len(at) if x is None else x.unbind(0) for x in change]
            lifts = zip(left.unbind(0), right.unbind(0), zip(*parts, strict=True), strict=True)
            for n, (own_left, own_right, moved) in zip(at, lifts, strict=True):
                into, scale = intos[n], decays[n - at[0]]
                ops.lift_add_(into.param, own_left.mT, own_right, None, scale, 1.0, into.rounding)
                self.keep_(states[n], Change(*moved))
                yield n


def of_all(decay: float | Tensor) -> float | Tensor:
    """A decay that all singular values of a matrix, and of its experts, have in common."""
    return decay.reshape(-1)[:1] if isinstance(decay, Tensor) else decay


def _whole(states: Sequence[State]) -> State:
    """Factors of several matrices, as those of a batch."""
    return {key: stacked([state[key] for state in states]) for key in FACTORS}


def _moves(old_u: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """Rows a and b of ``sum a b^T``, by which W moves."""
    left = torch.cat([change.turned, old_u], -2)
    return left, torch.cat([change.after, change.after - change.before], -2)
