"""How moments are kept between steps: one file a member."""

from lowrank_optim.stores.base import STORES, OneByOne, Store, Whole, register, scale_key
from lowrank_optim.stores.block8 import Block8Store
from lowrank_optim.stores.floating import FloatStore

__all__ = [
    "STORES",
    "Block8Store",
    "FloatStore",
    "OneByOne",
    "Store",
    "Whole",
    "register",
    "scale_key",
]
