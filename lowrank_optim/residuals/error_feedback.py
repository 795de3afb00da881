"""Error feedback: what a step could not use of the gradient is added to the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.quant4 import packed, unpacked
from lowrank_optim.ops.stacked import cast_all, stacked
from lowrank_optim.residuals.base import Measured, OneByOne, ResidualInputs
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_finite

FORMATS = (None, "float32", "bfloat16", "8bit", "4bit")
BITS = {"8bit": 8, "4bit": 4}
TILE_ELEMENTS = {False: 1 << 20, True: 1 << 24}
"""Entries that are worked on at once: on a CPU, or enough to fill an accelerator."""


class Levels(NamedTuple):
    r"""Rows in b bits, each on 2^b even levels from its least to its largest entry.

    .. math:: x \approx l + q s, \quad s = (\max x - \min x) / (2^b - 1), \quad |error| \le s / 2

    Constant rows are exact. With four bits a byte holds two entries, the first in the low half.
    """

    codes: Tensor
    """``(..., k)`` uint8, or ``(..., ceil(k / 2))``."""
    low: Tensor
    """``(...)`` float32: l."""
    step: Tensor
    """``(...)`` float32: s."""

    @classmethod
    def zeros(cls, shape: tuple[int, ...], bits: int, device: torch.device) -> Levels:
        """Rows of zeros."""
        width = shape[-1] if bits == 8 else -(-shape[-1] // 2)
        codes = torch.zeros(*shape[:-1], width, dtype=torch.uint8, device=device)
        low = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
        return cls(codes, low, low.clone())

    def write_(self, x: Tensor, bits: int) -> None:
        """Keep ``x (..., k)``, each entry at the nearest level."""
        least, most = x.aminmax(dim=-1)
        step = (most - least) / (2**bits - 1)
        scaled = (x - least.unsqueeze(-1)) / torch.where(step > 0, step, 1).unsqueeze(-1)
        codes = scaled.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        self.codes.copy_(packed(codes) if bits == 4 else codes)
        self.low.copy_(least)
        self.step.copy_(step)

    def read(self, bits: int, k: int) -> Tensor:
        """The values ``(..., k)`` in float32."""
        codes = unpacked(self.codes, k) if bits == 4 else self.codes
        return codes.float().mul_(self.step.unsqueeze(-1)).add_(self.low.unsqueeze(-1))


@dataclass(frozen=True)
class ErrorFeedback(OneByOne):
    r"""A memory E of the size of the weights.

    .. math:: A = G + E, \qquad E \leftarrow A - P P^T A

    Nothing of a gradient is lost, it only waits:
    :math:`\sum_t P_t P_t^T A_t + E_T = \sum_t G_t`. The memory is kept as ``(..., n, m)``, the
    projected dimension last, whatever side is projected. A exists for the time of the step, so that
    E is as it was if the step cannot end.

    Args:
        kept: "float32", "bfloat16", "8bit" or "4bit" (levels between the least and the largest
            entry of each row of m).
        maximize: whether coordinates are those of -A.
        lost: factor of what a refresh loses of the lifted first moment, which joins E: LDAdam's
            generalised error feedback has :math:`\beta_1 / (1 - \beta_1)`.
    """

    stepped: ClassVar[Sequence[str]] = ()
    memory: ClassVar[Sequence[str]] = ("error", "error_low", "error_step")
    wants: ClassVar[Wants] = "memory"

    kept: str = "float32"
    maximize: bool = False
    lost: float = 0.0

    def init(self, view: MatrixView, like: Tensor) -> State:
        """No error."""
        shape = (*view.batch, view.n, view.m)
        if self.kept in BITS:
            levels = Levels.zeros(shape, BITS[self.kept], like.device)
            return dict(zip(("error", "error_low", "error_step"), levels, strict=True))
        dtype = torch.bfloat16 if self.kept == "bfloat16" else compute_dtype(like.dtype)
        return {"error": torch.zeros(shape, dtype=dtype, device=like.device)}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Finite, and so are the lowest and the highest level of each row."""
        if self.kept not in BITS:
            check_finite(state, "error")
            return
        low, step = state["error_low"], state["error_step"]
        check_finite(state, "error_low")
        check_finite(state, "error_step", least=0)
        highest = low + step * (2 ** BITS[self.kept] - 1)
        check_finite({"the highest level of error": highest}, "the highest level of error")

    def before(self, state: State, grad: Tensor) -> Tensor:
        """``G + E``, which is not finite where G is not: nothing of such a step is kept."""
        out = torch.empty(grad.mT.shape, dtype=compute_dtype(grad.dtype), device=grad.device)
        for at in self._tiles(grad):
            out[..., at, :] = self._error(state, at, grad.shape[-2]).add(grad.mT[..., at, :])
        return out.mT

    def before_all(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        """On an accelerator gradients are turned, widened and added to, all at once."""
        if self.kept in BITS or not on_accelerator(grads[0]):
            return super().before_all(states, grads)
        dtype = compute_dtype(grads[0].dtype)
        errors = cast_all([state["error"] for state in states], dtype)
        outs = [*torch.stack([grad.mT for grad in grads]).to(dtype).unbind(0)]
        torch._foreach_add_(outs, errors)
        return [out.mT for out in outs]

    def measure(self, seen: ResidualInputs) -> Measured | None:
        """Each column alone."""
        return None

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """``A <- A - P R``, and no term."""
        return self.after_all([state], [seen])[0]

    def after_all(
        self,
        states: Sequence[State],
        seen: Sequence[ResidualInputs],
        measured: Sequence[Measured] = (),
    ) -> list[Term | None]:
        """As of each."""
        subspace = replace(seen[0].subspace, scale=1.0)
        lows = [own.low.to(own.grad.dtype) for own in seen]
        if seen[0].finite is not None:
            every = stacked(lows)
            fine = torch.stack([own.finite for own in seen if own.finite is not None])
            kept = torch.where(fine.view(-1, *[1] * lows[0].dim()), every, 0)
            lows = list(kept.unbind(0))
        rate = -1.0 if self.maximize else 1.0
        intos = [Target(own.grad, own.grad, None, lr=rate) for own in seen]
        none: list[Term | None] = [None] * len(seen)
        deque(subspace.push_all_(intos, states, [{"low": low} for low in lows], none), maxlen=0)
        return none

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """``E <- A - P R``."""
        for at in self._tiles(grad):
            self._keep_(state, at, grad.mT[..., at, :], finite)

    def keep_all_(
        self, states: Sequence[State], grads: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> None:
        """On an accelerator in one pass: ``E <- 0 E + 1 (A - P R)``, where that is finite."""
        if self.kept in BITS or not finite:
            super().keep_all_(states, grads, finite)
            return
        kept, rest = [state["error"] for state in states], [grad.mT for grad in grads]
        errors = cast_all(kept, rest[0].dtype)
        # a set of no rows, and all others are free: E <- 0 E + A. A is left as it is
        none = rest[0].new_empty((*rest[0].shape[:-2], 0), dtype=torch.int32)
        low = rest[0].new_empty((*none.shape, rest[0].shape[-1]))
        lists = errors, rest, [none] * len(rest), [low] * len(rest)
        ops.coordinate_add_(*lists, 0.0, -1.0, 1.0, 1.0, "sgd", finite)
        if errors[0].dtype != kept[0].dtype:
            torch._foreach_copy_(kept, errors)

    def _tiles(self, grad: Tensor) -> Iterator[slice]:
        rows = max(1, TILE_ELEMENTS[on_accelerator(grad)] * grad.shape[-1] // max(1, grad.numel()))
        for start in range(0, grad.shape[-1], rows):
            yield slice(start, start + rows)

    def _levels(self, state: State, at: slice) -> Levels:
        low, step = state["error_low"][..., at], state["error_step"][..., at]
        return Levels(state["error"][..., at, :], low, step)

    def _error(self, state: State, at: slice, k: int) -> Tensor:
        if self.kept in BITS:
            return self._levels(state, at).read(BITS[self.kept], k)
        return state["error"][..., at, :].to(
            torch.promote_types(state["error"].dtype, torch.float32)
        )

    def _keep_(self, state: State, at: slice, x: Tensor, finite: Tensor | None) -> None:
        if self.kept not in BITS:
            old = state["error"][..., at, :]
            old.copy_(x if finite is None else torch.where(finite, x, old.to(x.dtype)))
            return
        levels = self._levels(state, at)
        if finite is None:
            levels.write_(x, BITS[self.kept])
            return
        new = Levels(*(torch.empty_like(part) for part in levels))
        new.write_(x, BITS[self.kept])
        for part, fresh in zip(levels, new, strict=True):
            part.copy_(torch.where(finite, fresh, part))
