"""Steps of a whole bucket by one kernel a matrix, on a host that can look at gradients.

Each gives the numbers of the phases (:mod:`lowrank_optim.engine.step`), as the arithmetic of each
element is the same; what it saves is the passes between them.
"""

from lowrank_optim.engine.bucket import BucketStep
from lowrank_optim.engine.fused.block import FusedBlock
from lowrank_optim.engine.fused.cosines import FusedCosines
from lowrank_optim.engine.fused.rows import FusedRows

FUSED: tuple[BucketStep, ...] = (FusedRows(), FusedCosines(), FusedBlock())
"""What a bucket is offered to first."""

__all__ = ["FUSED", "FusedBlock", "FusedCosines", "FusedRows"]
