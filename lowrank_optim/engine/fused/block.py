"""An active block: AdamW on all of its rows, in one pass over W and G."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.fused.base import is_finite, is_plain
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.block import Block


class FusedBlock:
    """A dense step by our own kernel, where torch's AdamW would need copies of the moments."""

    def can_step(self, bucket: Bucket) -> bool:
        """Active, in narrow weights: in float32 it is torch's AdamW to the bit."""
        (item, *_), (state, *_) = bucket.items, bucket.states
        if not isinstance(item.subspace, Block) or "exp_avg" not in state or bucket.chosen.aged:
            return False
        if int(state["refresh_step"]) < 0 or not is_plain(bucket):
            return False
        return state["exp_avg"].dtype == compute_dtype(item.param.dtype) != item.param.dtype

    def step_(self, bucket: Bucket) -> None:
        """The step of rows with all of them picked."""
        (item,), (state,), chosen, lr, weight_decay, _ = bucket
        rule, view, since = chosen.rule, item.view, int(state["refresh_step"])
        assert isinstance(rule, AdamW) and view is not None and item.param.grad is not None
        assert not isinstance(lr, Tensor)
        grad = view.of(item.param.grad)
        state["step"] += 1
        if not is_finite(item, grad):
            return
        eps, correction = rule.factors(float(state["step"]) - since)
        rows = torch.arange(view.m, dtype=torch.int32)
        shape = (*view.batch, view.m, view.n)
        first, second = (state[name].view(shape) for name in ("exp_avg", "exp_avg_sq"))
        ops.coordinate_adamw_(
            [view.of(item.param)], [grad], [rows], [first], [second], *rule.betas,
            [eps], [lr * chosen.lr_scale * correction], [0.0], 1 - lr * weight_decay, "none",
        )  # fmt: skip
