"""How parameters step that lie on several ranks: the phases, with what ranks tell each other."""

from lowrank_optim.engine.sharded.local import local_state
from lowrank_optim.engine.sharded.step import ShardedStep

__all__ = ["ShardedStep", "local_state"]
