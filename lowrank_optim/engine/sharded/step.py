"""One step of all parameters that lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_optim.engine.blocks import advance, catch_up
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.offload import Staging
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import keep_refreshed, refresh_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import recall
from lowrank_optim.engine.sharded.guard import Asked, agreed
from lowrank_optim.engine.sharded.local import here, stepped, weights_here
from lowrank_optim.engine.sharded.means import dense_split, step_dense, weight_rms, weight_squares
from lowrank_optim.engine.sharded.phases import step_chunks
from lowrank_optim.engine.sharded.refresh import refresh_together
from lowrank_optim.engine.sharded.work import Work, chunks_of, fetch, is_projected, is_usable
from lowrank_optim.engine.step import step_buckets
from lowrank_optim.engine.undo import Undo
from lowrank_optim.rules.base import Split
from lowrank_optim.subspaces.block import Block


class ShardedStep:
    """Collects the parameters of all groups, and steps them with as few messages as there can be.

    The order of what ranks send each other depends on nothing that ranks do not share.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._work: list[Work] = []

    def add(
        self,
        items: Sequence[ParamPlan],
        states: Sequence[State],
        chosen: Strategies,
        lr: float | Tensor,
        weight_decay: float,
        undo: Undo,
        rest: Sequence[tuple[ParamPlan, State]] | None = None,
        begins: bool = True,
    ) -> None:
        """Parameters of a group, those without a gradient too; its blocks take turns.

        Args:
            items: the parameters.
            states: of each, what is here.
            chosen: what the group chose.
            lr: its learning rate.
            weight_decay: and its decay.
            undo: knows what to put back.
            rest: of blocks that step before or after others of their group, those others; None
                where all step now.
            begins: whether such blocks are the first of their group in this step.
        """
        twins = [here(item) for item in items]
        blocks = [
            (t, s) for t, s in zip(twins, states, strict=True) if isinstance(t.subspace, Block)
        ]
        if any(twin.param.grad is not None for twin, _ in blocks):
            others = [(weights_here(i), s) for i, s in rest or () if isinstance(i.subspace, Block)]
            every = [t for t, _ in (*blocks, *others)]
            by_param = {t.param: s for t, s in (*blocks, *others)}
            if rest is None:
                for state in by_param.values():
                    undo.begin(state)
                advance(every, by_param, chosen)
            else:
                for n, (twin, _) in enumerate(blocks):
                    catch_up(twin, every, by_param, chosen, undo, begins and n == 0)
        for item, twin, state in zip(items, twins, states, strict=True):
            self._work.append(Work(item, twin, state, chosen, lr, weight_decay))

    def run(self, undo: Undo) -> None:
        """Take the step."""
        recall([w.item.param for w in self._work])
        known = agreed(
            [Asked(w.item, w.twin, weight_squares(w.item, w.twin, w.chosen)) for w in self._work]
        )
        usable: list[Work] = []
        skipped: list[Work] = []
        for w in self._work:
            found = known.get(id(w.item.param))
            if found is not None:
                w.norm, w.rms = found.norm, weight_rms(w.item, w.twin, found.weights)
                undo.begin(w.state)
                (usable if is_usable(w) else skipped).append(w)
        projected: list[Work] = []
        dense: list[tuple[ParamPlan, Bucket, Split, Tensor | None]] = []
        alone: list[Bucket] = []
        for w in usable:
            if w.item.subspace is None or isinstance(w.item.subspace, Block):
                bucket = Bucket([w.twin], [w.state], w.chosen, w.lr, w.weight_decay, undo)
                split = dense_split(w.item)
                if w.chosen.rule.elementwise or split is None:
                    alone.append(bucket)
                else:
                    dense.append((w.item, bucket, split, w.rms))
            else:
                projected.append(w)
        chunks = chunks_of(projected)
        refresh_works(chunks, skipped, undo)  # first: it may fail, and then no weight has moved
        for w in skipped:
            w.state["step"] += 1
            warn_skipped(w.item)
        for alike in _by_choice(alone):
            step_buckets(alike, self._staging)
        step_dense(dense, self._staging)
        step_chunks(chunks, undo, self._staging)


def refresh_works(chunks: Sequence[list[Work]], skipped: Sequence[Work], undo: Undo) -> None:
    """Phase one, for all matrices that are due.

    What is drawn, or found of W, is so where a gradient is not finite too; what looks at the
    gradient counts as postponed.
    """
    due = []
    for chunk in chunks:
        own = [w for w in chunk if basis_due(w.item, w.state, w.chosen) and not is_projected(w)]
        if own and _looks(own[0]):
            fetch(own)
        due += own
    for w in skipped:
        subspace, weight = w.item.subspace, w.twin.param
        if subspace is None or isinstance(subspace, Block):
            continue
        if w.norm is None or not basis_due(w.item, w.state, w.chosen):
            continue
        if not subspace.needs_grad:
            due.append(w)
            continue
        keep_refreshed([(w.item, w.state)], w.chosen, undo)
        plan, step = stepped(w.item, weight), int(w.state["step"])
        refresh_(plan, w.state, weight, step, w.chosen, look=(w.norm, None))
    for w in due:
        keep_refreshed([(w.item, w.state)], w.chosen, undo)
    refresh_together([Due(w.item, w.twin, w.state, w.grad, w.chosen, w.norm) for w in due])


def _looks(w: Work) -> bool:
    """Whether a refresh looks at the columns that are here, or adds what it loses to them."""
    assert w.item.subspace is not None and w.item.part is not None
    if not w.item.subspace.needs_grad:
        return False
    return w.item.part.side != "whole" or bool(w.chosen.residual.lost)


def _by_choice(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Buckets of one group after the other."""
    found: dict[int, list[Bucket]] = {}
    for bucket in buckets:
        found.setdefault(id(bucket.chosen), []).append(bucket)
    return list(found.values())
