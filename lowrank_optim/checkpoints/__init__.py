"""State to and from files: our own, and other packages'."""

from lowrank_optim.checkpoints.loaders import hold_blocks
from lowrank_optim.checkpoints.placed import in_blocks

__all__ = ["hold_blocks", "in_blocks"]
