"""Rows or columns as coordinates: AdamW on them and the free rule elsewhere, in one pass."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.fused.base import is_finite, is_plain, time_of
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.state import slot_key
from lowrank_optim.residuals import ResidualInputs
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.coordinate import FREE, Coordinates


class FusedRows:
    """Gradient, moments and weights are each read once, and no coordinates are kept between."""

    def can_step(self, bucket: Bucket) -> bool:
        """AdamW on rows, at one time for all of them."""
        item, chosen = bucket.items[0], bucket.chosen
        if not isinstance(item.subspace, Coordinates) or chosen.aged or not is_plain(bucket):
            return False
        kept = bucket.states[0][slot_key("low", "exp_avg")].dtype
        return kept == compute_dtype(item.param.dtype)

    def step_(self, bucket: Bucket) -> None:
        """A step of each, its rows drawn again if it is time."""
        items, states, chosen, lr, weight_decay, undo = bucket
        rule = chosen.rule
        assert isinstance(rule, AdamW) and not isinstance(lr, Tensor)
        for item, state in zip(items, states, strict=True):
            view, subspace = item.view, item.subspace
            assert view is not None and subspace is not None and item.param.grad is not None
            grad, step = view.of(item.param.grad), int(state["step"])
            if basis_due(item, state, chosen):
                undo.keep(state, subspace.refreshed(state))
                refresh_(item, state, grad, step, chosen)
            state["step"] += 1
            if not is_finite(item, grad):
                continue
            eps, correction = rule.factors(time_of(state, chosen))
            seen = ResidualInputs(grad, grad, grad, correction, subspace, None)
            term = chosen.residual.after(state, seen)
            size = lr * chosen.lr_scale * correction
            free, gain = "none", 0.0
            if term is not None:
                assert isinstance(term.gain, float | int)
                free, gain = FREE[term.kind], term.gain
            first, second = (state[slot_key("low", name)] for name in ("exp_avg", "exp_avg_sq"))
            # one call each, while its gradient is in the cache
            ops.coordinate_adamw_(
                [view.of(item.param)], [grad], [state["index"]], [first], [second], *rule.betas,
                [eps], [size * subspace.scale], [size * gain], 1 - lr * weight_decay, free,
            )  # fmt: skip
            undo.done(state)
