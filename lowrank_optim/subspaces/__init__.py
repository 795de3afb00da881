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
from lowrank_optim.subspaces.random import Random
from lowrank_optim.subspaces.randomized import RandomizedSVD
from lowrank_optim.subspaces.svd import SVD

__all__ = [
    "PROJECTORS",
    "SVD",
    "Context",
    "Moved",
    "Projector",
    "Random",
    "RandomizedSVD",
    "Subspace",
    "make_projector",
    "register",
]
