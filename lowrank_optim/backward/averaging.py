"""Gradients, or their coordinates, averaged over the ranks while backward still runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.sharded.replicas import check_same_parameters
from lowrank_optim.groups import Group
from lowrank_optim.ops.devices import plainly
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding import averages, collectives
from lowrank_optim.sharding.averages import Averages
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.tensors.projected_grad import ProjectedGrad

TWICE = (
    "the gradient of {} arrived twice in one backward that averages over the ranks: a parameter "
    "that two checkpointed segments share needs use_reentrant=False; after a backward that raised, "
    "remove() the handle and attach_in_backward again, on every rank"
)
LOCAL = (
    "the gradients of this rank have not been averaged over the ranks since its last backward: run "
    "the last backward() before a step outside handle.no_sync(), and let accumulation_steps be "
    "the number of backwards that there are"
)


class Averaging:
    """What ranks do together with gradients, from the start of a backward to its end.

    A gradient is handed over when it arrives, in the form in which it is kept: its coordinates, or
    whole. At the end of the backward all have been averaged, before anybody reads ``p.grad``.

    Args:
        optimizer: whose parameters they are.
        group: the ranks.
        accumulation_steps: of as many backwards the last averages.
        form_of: brings ``p.grad`` of a parameter, from whichever backward, into the form in which
            it is kept; done for gradients that arrive.
        forms_of: shapes and dtypes of that form, before there is a gradient.
        averaged: called with every parameter whose average is in ``p.grad``.
        at_once: whether it is called as soon as a message has arrived, or at the end.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        group: dist.ProcessGroup,
        accumulation_steps: int,
        form_of: Callable[[Tensor], None],
        forms_of: Callable[[Tensor], Sequence[Form]],
        averaged: Callable[[Tensor], None],
        at_once: bool,
    ) -> None:
        self.group, self.accumulation_steps = group, accumulation_steps
        self._optimizer = optimizer
        self._form_of, self._forms_of, self._averaged = form_of, forms_of, averaged
        self._at_once = at_once
        self._paused = False
        self._backwards = 0
        """Ended since the last that averaged."""
        self._task = -1
        """Of autograd, at whose end this goes on."""
        self._running = self._averages_now = False
        self._here: dict[Tensor, None] = {}
        """Parameters whose gradients have arrived in this backward, in turn."""
        self._order: list[Tensor] = []
        """In which rank 0 had them in the first backward; empty until then."""
        self._forget_round()
        check_same_parameters(self._grouped(), group)
        start_equal([plan.param for plan in self._plans()], group)
        self.share()
        self._loading = optimizer.register_load_state_dict_post_hook(self._ask_again)

    def _forget_round(self) -> None:
        self._round: Averages | None = None
        self._forms: dict[Tensor, Sequence[Form]] = {}
        """Of what is averaged of each parameter in this round."""
        self._numbers: dict[Tensor, list[int]] = {}
        """Of those tensors among all."""
        self._owners: list[Tensor] = []
        self._left: dict[Tensor, int] = {}
        """Of each parameter, tensors that have not arrived yet."""
        self._places: dict[Tensor, list[Tensor]] = {}

    def _ask_again(self, *_: object) -> None:
        self._order = []

    def _grouped(self) -> list[tuple[ParamPlan, Group]]:
        groups = self._optimizer.param_groups
        return [(plan, group) for group in groups for plan in self._optimizer._items(group)]

    def _plans(self) -> list[ParamPlan]:
        return [plan for plan, _ in self._grouped()]

    def share(self) -> None:
        """Let the optimizer know that other ranks step its parameters alike."""
        self._optimizer._replicas.share([plan.param for plan in self._plans()], self.group)

    def remove(self) -> None:
        """The ranks go their own ways."""
        self._loading.remove()
        self._optimizer._replicas.release()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards within average nothing; what they add is averaged with the next that does."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # ---------------------------------------------------------------- a backward

    def arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is complete on this rank for this backward, and in form."""
        self._watch()
        if not self._averages_now or param.grad is None:
            return
        if param in self._here:
            raise RuntimeError(TWICE.format(self._name(param)))
        self._here[param] = None
        if self._order:
            self._hand_over(param)

    def _watch(self) -> None:
        """See to it that :meth:`_end` is called when all of this backward is over."""
        task = torch._C._current_graph_task_id()
        if not self._running:
            self._running, self._here = True, {}
            self._averages_now = not self._paused and self._backwards + 1 >= self.accumulation_steps
            if {*self._order} != {p for p in self._params() if p.requires_grad}:
                self._order = []  # not their number alone: one may be frozen as another is not
        if task != self._task:
            self._task = task
            _at_end_of_backward(self._end)

    @torch.no_grad()
    def _end(self) -> None:
        node = torch._C._current_autograd_node()
        if node is not None:  # the backward of a reentrant checkpoint, inside another that goes on

            def over(*_: object) -> None:
                handle.remove()
                _at_end_of_backward(self._end)

            handle = node.register_hook(over)
            return
        if not self._running:
            return
        self._backwards += 1
        if self._averages_now:
            with plainly():
                self._finish()
            self._backwards = 0
        self._running, self._task = False, -1

    def _finish(self) -> None:
        if not self._order:
            self._agree()
            for param in self._here:
                self._hand_over(param)
        for param in self._order:
            if param not in self._here:
                self._hand_over_late(param)
        assert self._round is not None
        self._round.finish()
        if not self._at_once:
            for param in self._order:
                self._put_back(param)
        self._forget_round()

    # ---------------------------------------------------------------- what ranks agree on

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _agree(self) -> None:
        """The order of messages is that in which gradients arrived on rank 0 in this backward.

        It is asked for once: a run that is resumed has the same messages, and so the same bits.

        Raises:
            RuntimeError: the optimizers of the ranks are at different steps.
        """
        params = [p for p in self._params() if p.requires_grad]
        place = {p: n for n, p in enumerate(params)}
        order = [place[p] for p in self._here]
        order += sorted(set(place.values()) - set(order))
        mine = torch.tensor([*order, self._digest(params)], device=params[0].device)
        got = collectives.from_first(mine, self.group)
        others = (got[-1] != mine[-1]).double()
        collectives.sum_([others], self.group)
        if others > 0:
            raise RuntimeError(
                f"on {int(others)} of {self.group.size()} ranks the optimizer is not at the step, "
                "or in the bases, of rank 0: load the same checkpoint on every rank, or on none"
            )
        self._order = [params[n] for n in got[:-1].tolist()]

    def _digest(self, params: Sequence[Tensor]) -> int:
        told = []
        for param in params:
            state = self._optimizer.state.get(param, {})
            counters = [float(state[k]) for k in ("step", "refresh_step") if k in state]
            told.append((counters, list(self._forms_of(param))))
        digest = hashlib.sha256(repr(told).encode()).digest()
        return int.from_bytes(digest[:7], "big")

    # ---------------------------------------------------------------- one gradient

    def _begin_round(self) -> Averages:
        forms: list[tuple[Form, torch.device]] = []
        for param in self._order:
            own = self._forms[param] = self._forms_of(param)
            self._numbers[param] = list(range(len(forms), len(forms) + len(own)))
            self._owners += [param] * len(own)
            self._left[param] = len(own)
            forms += [(each, param.device) for each in own]
        self._round = Averages(forms, self.group, self._ready if self._at_once else None)
        return self._round

    def _ready(self, numbers: Sequence[int]) -> None:
        for n in numbers:
            param = self._owners[n]
            self._left[param] -= 1
            if not self._left[param]:
                self._put_back(param)

    def _hand_over(self, param: Tensor) -> None:
        """Put a gradient where its average will be, which is ``p.grad`` from now on."""
        under_way = self._round or self._begin_round()
        grad = param.grad
        assert grad is not None
        parts, numbers = parts_of(grad), self._numbers[param]
        forms = [] if grad.is_sparse else [form(x) for x in parts]
        if forms != list(self._forms[param]):
            raise RuntimeError(
                f"the gradient of {self._name(param)} is {told(grad)}, which is not what the ranks "
                "average in this step: call zero_grad() after every step, and leave gradients dense"
            )
        places = [under_way.put(n, x) for n, x in zip(numbers, parts, strict=True)]
        put_parts(param, places)
        under_way.send()

    def _hand_over_late(self, param: Tensor) -> None:
        """Of a parameter that this backward did not reach: what earlier ones left, or nothing."""
        grad = param.grad
        if grad is not None and not (isinstance(grad, ProjectedGrad) and grad.empty):
            self._form_of(param)
            self._hand_over(param)
            return
        param.grad = None
        under_way = self._round or self._begin_round()
        self._places[param] = [under_way.put(n, None) for n in self._numbers[param]]
        under_way.send()

    def _put_back(self, param: Tensor) -> None:
        places = self._places.get(param)
        if places is not None:
            assert self._round is not None
            if not self._round.anyone_has(self._numbers[param][0]):
                return  # no rank has a gradient: it stays so, and no step moves the parameter
            param.grad = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
            self._form_of(param)
            put_parts(param, places)
        self._averaged(param)

    def _name(self, param: Tensor) -> str:
        return next(plan.name for plan in self._plans() if plan.param is param)

    # ---------------------------------------------------------------- before a step

    def discard(self) -> None:
        """Begin again, unless messages of a backward that raised are under way."""
        if self._round is None:
            self._running, self._averages_now, self._task = False, False, -1
            self._here, self._backwards = {}, 0

    def check_averaged(self) -> None:
        """Raise if a step would use gradients of this rank alone.

        Raises:
            RuntimeError: with what to do.
        """
        if self._running:
            raise RuntimeError(
                "step() inside a backward that averages over the ranks, or after one that raised: "
                "call it after backward(); after an error attach_in_backward again on every rank"
            )
        if self._backwards and any(p.grad is not None for p in self._params()):
            raise RuntimeError(LOCAL)
        self._backwards = 0


def _at_end_of_backward(call: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)


def parts_of(grad: Tensor) -> list[Tensor]:
    """The tensors that a gradient consists of: itself, or its coordinates."""
    return list(grad.coords.values()) if isinstance(grad, ProjectedGrad) else [grad]


def put_parts(param: Tensor, parts: Sequence[Tensor]) -> None:
    """Let the gradient of a parameter be these tensors."""
    grad = param.grad
    if isinstance(grad, ProjectedGrad):
        grad.coords.update(zip(grad.coords, parts, strict=True))
    else:
        (param.grad,) = parts


def told(grad: Tensor) -> str:
    """A gradient in words."""
    if isinstance(grad, ProjectedGrad):
        return str(grad)
    return f"a {'sparse ' if grad.is_sparse else ''}tensor {tuple(grad.shape)} in {grad.dtype}"


@torch.no_grad()
def start_equal(params: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give all ranks the parameters of rank 0 of the group, some at a time."""
    chunk: list[Tensor] = []
    for n, param in enumerate(params):
        chunk.append(param)
        last = n + 1 == len(params) or params[n + 1].device != param.device
        if last or sum(p.nbytes for p in chunk) >= averages.BUCKET_BYTES:
            tensors = chunk if dist.get_rank(group) == 0 else None
            got = collectives.broadcast(tensors, [form(p) for p in chunk], 0, group, param.device)
            for p, x in zip(chunk, got, strict=True):
                p.copy_(x)
            chunk = []
