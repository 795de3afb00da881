"""What the moments do when the basis moves: one file a member."""

from lowrank_optim.transports.base import TRANSPORTS, Moments, Transport, register
from lowrank_optim.transports.keep import keep
from lowrank_optim.transports.project import project
from lowrank_optim.transports.reset import reset

__all__ = ["TRANSPORTS", "Moments", "Transport", "keep", "project", "register", "reset"]
