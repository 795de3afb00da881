"""Cosines that kernels transform: AdamW on the chosen ones, in one pass over W and G."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.fused.base import is_finite, is_plain, time_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.state import age_key, slot_key
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Rows
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.dct import DCT


class FusedCosines:
    """Tiles of columns are transformed, stepped and transformed back within the cache."""

    def can_step(self, bucket: Bucket) -> bool:
        """AdamW on one side of matrices whose cosines kernels transform, all else dropped."""
        item, chosen = bucket.items[0], bucket.chosen
        subspace, view = item.subspace, item.view
        if not isinstance(subspace, DCT) or view is None or subspace.two_sided or view.batch:
            return False
        if type(chosen.residual) is not Drop or not is_plain(bucket):
            return False
        kept = bucket.states[0][slot_key("low", "exp_avg")].dtype
        return kept == compute_dtype(item.param.dtype) and subspace.fused(view.m, item.param)

    def step_(self, bucket: Bucket) -> None:
        """Cosines are chosen again where it is time; the step reads moments where they stood."""
        items, states, chosen, lr, weight_decay, undo = bucket
        rule, subspace, view = chosen.rule, items[0].subspace, items[0].view
        assert isinstance(rule, AdamW) and isinstance(subspace, DCT) and view is not None
        assert not isinstance(lr, Tensor)
        grads = [view.of(item.param.grad) for item in items if item.param.grad is not None]
        for state in states:
            undo.keep(state, ("basis_index", age_key("low")))  # moments move in the step itself
        sources, looked = _chosen_again(items, states, grads, chosen, undo)
        torch._foreach_add_([state["step"] for state in states], [torch.ones(())] * len(items))
        at = [n for n, ok in enumerate(looked) if ok or is_finite(items[n], grads[n])]
        if not at:
            return
        factors = [rule.factors(time_of(states[n], chosen)) for n in at]
        rows, corrections = Rows(), [correction for _, correction in factors]
        if chosen.aged:
            rows = rule.rows([states[n][age_key("low")].add_(1) for n in at], torch.float32)
            corrections = [1.0] * len(at)
        first, second = (
            [states[n][slot_key("low", x)] for n in at] for x in ("exp_avg", "exp_avg_sq")
        )
        size = lr * chosen.lr_scale * subspace.scale
        ops.cosine_adamw_(
            [view.of(items[n].param) for n in at], [grads[n] for n in at],
            [states[n]["basis_index"] for n in at], [sources[n] for n in at] if sources else [],
            first, second, *rule.betas, [eps for eps, _ in factors], rows,
            [size * correction for correction in corrections], subspace.plan(view.m, grads[0]),
            subspace.basis, 1 - lr * weight_decay,
        )  # fmt: skip


def _chosen_again(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    grads: Sequence[Tensor],
    chosen: Strategies,
    undo: Undo,
) -> tuple[list[Tensor], list[bool]]:
    """Where the moments of each row stand, if any moved; and whose gradient was looked at."""
    subspace = items[0].subspace
    assert isinstance(subspace, DCT)
    due = [n for n, item in enumerate(items) if basis_due(item, states[n], chosen)]
    looks = dict(zip(due, subspace.look_at([grads[n] for n in due]), strict=True))
    found: dict[int, Tensor] = {}
    looked = [False] * len(items)
    for n, look in looks.items():
        own: dict[str, Tensor] = {}
        if chosen.on_refresh == "reset":
            undo.keep(states[n], subspace.refreshed(states[n]))
        step = int(states[n]["step"])
        looked[n] = refresh_(items[n], states[n], grads[n], step, chosen, sources=own, look=look)
        if own:
            (found[n],) = own.values()
    if not found:
        return [], looked
    stay = torch.arange(subspace.rank, dtype=torch.int32)
    return [found.get(n, stay) for n in range(len(items))], looked
