"""State to and from files: our own, and other packages'."""

from lowrank_optim.checkpoints.load import hold_blocks

__all__ = ["hold_blocks"]
