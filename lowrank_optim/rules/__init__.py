"""Rules: how a small gradient becomes a direction."""

from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import Rule, Slot, compute_dtype
from lowrank_optim.rules.lion import Lion
from lowrank_optim.rules.sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "Lion", "Rule", "Slot", "compute_dtype"]
