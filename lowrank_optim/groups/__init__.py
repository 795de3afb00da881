"""Parameter groups: what their keys mean, and how to make them from a model."""

from lowrank_optim.groups.from_model import describe, lowrank_groups
from lowrank_optim.groups.keys import canonical
from lowrank_optim.groups.values import Group, check, check_rank

__all__ = ["Group", "canonical", "check", "check_rank", "describe", "lowrank_groups"]
