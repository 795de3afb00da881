"""What a model and its optimizer will need, and what an optimizer holds now."""

from lowrank_optim.memory.estimating import estimate
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.layouts import LAYOUTS, AdamW8bitLayout
from lowrank_optim.memory.reporting import GIB, Report, host_bytes, report, storage_bytes

__all__ = [
    "GIB",
    "LAYOUTS",
    "AdamW8bitLayout",
    "Estimate",
    "Report",
    "estimate",
    "host_bytes",
    "report",
    "storage_bytes",
]
