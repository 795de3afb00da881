"""How moments are kept between steps: one file a member."""

from lowrank_optim.stores.base import STORES, OneByOne, Store, Whole, encoded, register, scale_key
from lowrank_optim.stores.block4 import Block4Store
from lowrank_optim.stores.block8 import Block8Store
from lowrank_optim.stores.floating import FloatStore

__all__ = [
    "STORES",
    "Block4Store",
    "Block8Store",
    "FloatStore",
    "OneByOne",
    "Store",
    "Whole",
    "encoded",
    "register",
    "scale_key",
]
