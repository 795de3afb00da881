"""How a model is trained: what an estimate is asked about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.losses import Loss
from lowrank_optim.memory.world import World


@dataclass(frozen=True)
class Training:
    """How a model is trained, apart from its optimizer: arguments of :func:`estimate`."""

    in_backward: Literal["project", "step"] | None = None
    accumulation_steps: int = 1
    first_basis: Literal["micro", "boundary"] = "micro"
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tokens: int | tuple[int, int] | None = None
    checkpointing: bool = False
    transients: bool = True
    device: str = "meta"
    """The type of the one that it is trained on; ``"meta"`` is an accelerator."""
    loss: Loss = "transformers"
    loss_chunk: int | None = None
    autocast: Autocast | None = None
    world: World | None = None
    """The ranks among which FSDP2 shards the model."""

    def on(self, world: World | None) -> Training:
        """The same among ranks, which find first bases together, in a step."""
        return self if world is None else replace(self, world=world, first_basis="boundary")

    @property
    def forward_and_backward(self) -> tuple[Any, ...]:
        """What they depend on, apart from the coordinates that gradients become."""
        run = self.tokens, self.checkpointing, self.loss, self.loss_chunk, self.autocast
        mode = self.in_backward if self.world is not None or self.in_backward == "step" else None
        return mode, self.accumulation_steps, *run

    @property
    def attached(self) -> tuple[Any, ...]:
        """What steps depend on."""
        project = self.in_backward == "project"
        own = (("first_basis", self.first_basis), ("coords_dtype", self.coords_dtype))
        return self.in_backward, own if project else ()
