"""``mode="step"``: each parameter is stepped inside backward."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lowrank_optim.backward.clipping import clip_each_
from lowrank_optim.backward.handle import InBackward
from lowrank_optim.backward.parallel import MESSAGE
from lowrank_optim.backward.runs import Runs
from lowrank_optim.backward.shards import Together, like_shard
from lowrank_optim.backward.stepped_grad import SteppedGrad
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.sharded.local import here
from lowrank_optim.groups import Group, notices
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.subspaces.block import Block

logger = logging.getLogger(__name__)


class StepMode(InBackward):
    """Each parameter is stepped, and its gradient freed, in the last backward before a step."""

    averages_at_once = True

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        accumulation_steps: int,
        keep_norms: bool,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.accumulation_steps, self.keep_norms = accumulation_steps, keep_norms
        self._arrivals: dict[Tensor, int] = {}
        self._begun_groups: set[int] = set()
        self._stepped: set[Tensor] = set()
        """Parameters that have taken this step."""
        self._runs = Runs()
        self._together = Together(partial(self._step_shards, keep_norms=keep_norms))
        self._in_time = False
        """Whether a gradient has arrived as often as it should."""
        super().__init__(optimizer, max_norm, process_group, accumulation_steps)
        # else a scaler finds no gradient, and says so in words that do not help
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        if max_norm is not None:
            warnings.warn(
                f"mode='step' clips the gradient of each parameter to norm {max_norm}, not their "
                "global norm, which is known only when all of them exist",
                stacklevel=notices.users_level(),
            )

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        if self._runs.begin():
            self._forget_failed(param)
        arrivals = self._arrivals[param] = self._arrivals.get(param, 0) + 1
        if arrivals < self.accumulation_steps:
            return
        if arrivals > self.accumulation_steps:
            raise RuntimeError(
                f"a gradient arrived {arrivals} times before optimizer.step(), and its parameter "
                f"was stepped at accumulation_steps={self.accumulation_steps}: pass the number of "
                "backwards before a step, under FSDP2 of those that reduce gradients; a parameter "
                "that two checkpointed segments share needs use_reentrant=False; zero_grad() "
                "leaves out a batch"
            )
        self._in_time = True
        if param.grad is None:
            return
        if is_sharded(param):
            if self._find(param)[1].alone:  # step() takes layers of factors
                self._together.arrived(param)
        elif self._ranks is None:
            self._averaged(param)

    def _forget_failed(self, param: Tensor) -> None:
        """The backward before this one raised, and ``zero_grad()`` was another's, as a module's.

        Raises:
            RuntimeError: nobody's: gradients of that backward are still there.
        """
        self._let_go()
        for other, arrivals in self._arrivals.items():
            left = other.grad is not None and not isinstance(other.grad, SteppedGrad)
            if arrivals and left and other is not param:
                raise RuntimeError(
                    f"a backward raised before its end, and left a gradient of part of a batch in "
                    f"{self._find(other)[1].name}: call zero_grad() and begin the batch again, or "
                    "step() to apply what is there"
                )
        self._discard()

    def _discard(self) -> None:
        """A batch is left out; of parameters that have taken its step, say so."""
        super()._discard()
        if self._stepped:
            logger.warning(
                "a batch was left out after %d of %d parameters had taken its step inside "
                "backward: they are one step ahead of the others, and are not put back",
                len(self._stepped),
                len(self._hooks),
            )
        self._forget_norms()
        self._begin_again()

    def _begin_again(self) -> None:
        self._arrivals, self._begun_groups, self._stepped = {}, set(), set()
        self._runs.forget()
        self._together.forget()

    def _averaged(self, param: Tensor) -> None:
        self._arrivals[param] = self.accumulation_steps  # a last backward may have missed it
        self._step(param, self.keep_norms)

    def no_sync(self) -> AbstractContextManager[None]:
        """Not of this mode.

        Raises:
            RuntimeError: ``accumulation_steps`` says which backward steps, and so averages.
        """
        raise RuntimeError(
            "mode='step' averages and steps in the last of accumulation_steps backwards: pass that "
            "number to attach_in_backward, in place of no_sync()"
        )

    def _step(self, param: Tensor, keep_norm: bool = False) -> None:
        """Step and free, unless it must wait for its siblings."""
        group, plan = self._find(param)
        if not plan.alone:
            return
        self.optimizer._make_state()
        norm = None
        if self.max_norm is not None:
            norm = clip_grad_norm_([param], self.max_norm)
        elif keep_norm:
            assert param.grad is not None
            norm = torch.linalg.vector_norm(param.grad)
        begins = isinstance(plan.subspace, Block) and id(group) not in self._begun_groups
        self._begun_groups |= {id(group)} if begins else set()
        alike = {} if self._ranks is None else self.optimizer._replicas.known
        try:
            self.optimizer._step_alone(plan, group, begins, alike)
        except BaseException:  # its gradient is still to be applied, or zeroed
            self._arrivals[param] = min(self._arrivals.get(param, 0), self.accumulation_steps - 1)
            self._begun_groups -= {id(group)} if begins else set()
            raise
        self._stepped.add(param)
        param.grad = SteppedGrad(param, norm) if keep_norm and norm is not None else None

    def _step_shards(self, params: Sequence[Tensor], keep_norms: bool = False) -> None:
        """Step and free what lies on several ranks, all at once."""
        self.optimizer._make_state()
        by_group: dict[int, tuple[Group, list[ParamPlan]]] = {}
        for param in params:
            group, plan = self._find(param)
            by_group.setdefault(id(group), (group, []))[1].append(plan)
        left = [self._left_of(param) if keep_norms else None for param in params]
        if self.max_norm is not None:
            clip_each_([self._find(param)[1] for param in params], self.max_norm)
        self.optimizer._step_shards(list(by_group.values()), self._begun_groups)
        self._stepped.update(params)
        for param, grad in zip(params, left, strict=True):
            param.grad = grad

    def _left_of(self, param: Tensor) -> Tensor:
        """A DTensor without memory, of which each rank keeps the norm of what it had."""
        shard = here(self._find(param)[1]).param.grad
        assert shard is not None
        return like_shard(param, SteppedGrad(shard, torch.linalg.vector_norm(shard)))

    def _settle_shards(self) -> None:
        """What backward did not step: blocks, which know whose turn it is; step() takes others."""
        self._together.forget()
        late = [p for p in self._hooks if is_sharded(p) and p.grad is not None]
        late = [p for p in late if self._find(p)[1].alone]
        counts = {self._arrivals.get(p, 0) for p in late}
        if any(count >= self.accumulation_steps for count in counts):
            raise RuntimeError(
                "a gradient of a DTensor is there after its step inside backward: a backward "
                "raised before its end, or somebody wrote it. Call zero_grad() on every rank, "
                "which leaves this batch out, or remove() the handle and attach_in_backward again"
            )
        if late and not self._in_time:
            warnings.warn(
                f"gradients arrived {max(counts)} times before optimizer.step(), and waited for it "
                f"as accumulation_steps={self.accumulation_steps}: backwards under "
                f"set_requires_gradient_sync(False) hand none over. Pass accumulation_steps="
                f"{max(counts)}, the number of those that reduce gradients",
                stacklevel=notices.users_level(),
            )
            self._in_time = True
        blocks = [p for p in late if isinstance(self._find(p)[1].subspace, Block)]
        if blocks:
            self._step_shards(blocks)
        shards = [self._find(p)[1] for p in self._hooks if is_sharded(p)]
        if shards and self.max_norm is not None:
            clip_each_(shards, self.max_norm)

    def _forget_norms(self) -> None:
        for param in self._hooks:
            self._forget_norm(param)

    def _forget_norm(self, param: Tensor) -> None:
        if isinstance(getattr(param.grad, "_local_tensor", param.grad), SteppedGrad):
            param.grad = None

    def _forget(self, param: Tensor) -> None:
        self._forget_norm(param)
        self._arrivals.pop(param, None)

    @torch.no_grad()
    def _settle(self) -> None:
        """Parameters that some backward did not reach are stepped now.

        Raises:
            RuntimeError: a ``GradScaler`` steps: gradients were applied with its factor in them;
            or somebody wrote the gradient of a parameter that has been stepped.
        """
        if hasattr(self.optimizer, "grad_scale"):
            for name in ("grad_scale", "found_inf"):  # the scaler's, which cannot clean up now
                delattr(self.optimizer, name)
            raise RuntimeError(
                "the loss was scaled by a GradScaler, and mode='step' has applied its gradients as "
                "they were, inside backward: start again with mode='project', or in bfloat16"
            )
        self._forget_norms()
        self._settle_shards()
        plain = [param for param in self._hooks if not is_sharded(param)]
        for param in plain:
            if param.grad is not None:
                if (
                    self._arrivals.get(param, 0) >= self.accumulation_steps
                    and self._find(param)[1].alone
                ):
                    raise RuntimeError(f"a gradient is back after its step: {MESSAGE}")
                self._step(param)
        if self.max_norm is not None:
            for param in plain:
                if param.grad is not None:
                    clip_grad_norm_([param], self.max_norm)

    def _after_step(self, *_: Any) -> None:
        self._begin_again()
        super()._after_step()

    def remove(self) -> None:
        """As of every mode."""
        self._forget_norms()
        vars(self.optimizer).pop("_step_supports_amp_scaling", None)
        super().remove()
        self._together.close()
