"""What is left of a step that raised: the next one, with the same gradients, takes the rest."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.sharded.failures import this_rank
from lowrank_optim.engine.undo import Undo

logger = logging.getLogger(__name__)

AGAIN = "step() again steps these alone, zero_grad() leaves them out"
RANKS_DIFFER = (
    "Other ranks may have taken all of it, or wait for this one: end the run, and go on from a "
    "checkpoint"
)
ALONE = (
    "a step of %s raised%s amid what ranks do together, and messages of another step would meet "
    f"those of that one. {RANKS_DIFFER}"
)
PARTLY = (
    "a step that raised may have stepped %s in part, and this one steps it whole: moments and "
    "decay of that batch may be in it twice. Load a checkpoint where that matters"
)


class Retry:
    """Which parameters of an optimizer have taken a step that raised, and which may have in part.

    Nobody takes a step twice. DTensors are not among them: their ranks go on together, or not.
    """

    def __init__(self) -> None:
        self.taken: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """Who took it, by place: the gradient that it was, and its version."""
        self.partly: list[str] = []
        """Names of those that may have been left stepped in part."""
        self.alone = ""
        """Which rank raised alone amid what ranks do together, as a clause; a load lifts it."""

    def forget(self) -> None:
        """Let all parameters take the next step: the last has ended, or its batch is left out."""
        self.taken = {}

    def forget_unless(self, params: Sequence[Tensor]) -> None:
        """Let all take the next step, unless the gradients are still those of the one that raised.

        Args:
            params: all of the optimizer's.
        """
        for place, (ref, version) in self.taken.items():
            grad = params[place].grad if place < len(params) else None
            if grad is None or ref() is not grad or grad._version != version:
                self.taken = {}
                return

    def check_together(self, method: str) -> None:
        """Raise where a step would send messages that no rank awaits.

        Args:
            method: the optimizer's name.

        Raises:
            RuntimeError: this rank alone did not end the last step.
        """
        if self.alone:
            raise RuntimeError(ALONE % (method, self.alone))

    def warn_partly(self) -> None:
        """Say which parameters a step may step for the second time in part."""
        if self.partly:
            logger.warning(PARTLY, ", ".join(self.partly))
            self.partly = []

    def remember(
        self, error: BaseException, undo: Undo, items: Iterable[ParamPlan], method: str
    ) -> None:
        """Note who took a step that raised, by the gradient, and say so in its error.

        Args:
            error: what was raised.
            undo: of the step, once it has put back what it knows of.
            items: those that it was to step.
            method: the optimizer's name.
        """
        items = list(items)
        here = {item.index: item.param.grad for item in items if not item.sharded}
        for place in undo.taken:
            grad = here.get(place)
            if grad is not None:
                self.taken[place] = weakref.ref(grad), grad._version
        count = sum(item.alone or item.subspace is not None for item in items)
        error.add_note(
            f"{len(undo.taken)} of {count} parameters had taken this step of {method}{this_rank()};"
            f" the others are as they were. {RANKS_DIFFER if self.alone else AGAIN}"
        )
        if undo.cut:
            error.add_note(
                f"{', '.join(undo.cut)} of them may lack a part of it: whatever was being written "
                "when it was interrupted stays as it was then"
            )
        self.partly = undo.partly
        if undo.partly:
            error.add_note(
                f"but {', '.join(undo.partly)} may have been stepped in part: what is large, "
                "or on an accelerator, is not copied before. Go on from a checkpoint where "
                "that matters"
            )
