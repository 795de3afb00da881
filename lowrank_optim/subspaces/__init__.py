"""Subspaces: which coordinates of a gradient are optimised."""

from lowrank_optim.subspaces.base import (
    PROJECTORS,
    Context,
    Moved,
    Projector,
    Subspace,
    make_projector,
    register,
)
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.coordinate import Columns, Rows
from lowrank_optim.subspaces.entries import RandK
from lowrank_optim.subspaces.random import Random
from lowrank_optim.subspaces.randomized import RandomizedSVD
from lowrank_optim.subspaces.svd import SVD

__all__ = [
    "PROJECTORS",
    "SVD",
    "Block",
    "Columns",
    "Context",
    "Moved",
    "Projector",
    "RandK",
    "Random",
    "RandomizedSVD",
    "Rows",
    "Subspace",
    "make_projector",
    "register",
]
