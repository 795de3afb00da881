"""Subspaces: which coordinates of a gradient are optimised."""

from lowrank_optim.subspaces.base import PROJECTORS, Subspace, make_projector, register
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.coordinate import Columns, Rows
from lowrank_optim.subspaces.dct import DCT
from lowrank_optim.subspaces.entries import RandK
from lowrank_optim.subspaces.fixed import FixedBasis
from lowrank_optim.subspaces.golore import GoLore
from lowrank_optim.subspaces.hadamard import Hadamard
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.random import Random
from lowrank_optim.subspaces.randomized import RandomizedSVD
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.shared import Shared
from lowrank_optim.subspaces.svd import SVD
from lowrank_optim.subspaces.switched import Switched

__all__ = [
    "DCT",
    "PROJECTORS",
    "SVD",
    "BasisChange",
    "Block",
    "Columns",
    "FixedBasis",
    "GoLore",
    "Hadamard",
    "Projector",
    "RandK",
    "Random",
    "RandomizedSVD",
    "RefreshContext",
    "Rows",
    "Shared",
    "Subspace",
    "Switched",
    "make_projector",
    "register",
]
