"""Work done inside backward: gradients projected, or stepped, and freed."""

from lowrank_optim.backward.attach import attach_in_backward
from lowrank_optim.backward.handle import InBackward

__all__ = ["InBackward", "attach_in_backward"]
