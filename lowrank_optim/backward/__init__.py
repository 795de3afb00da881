"""Work done inside backward: gradients projected, or stepped, and freed."""

from lowrank_optim.backward.attach import InBackward, attach_in_backward

__all__ = ["InBackward", "attach_in_backward"]
