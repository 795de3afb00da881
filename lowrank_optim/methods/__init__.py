"""Methods: one file per paper, each a composition of roles."""

from lowrank_optim.methods.apollo import ApolloAdamW, ApolloAdamW8bit
from lowrank_optim.methods.dct_adamw import DCTAdamW, DCTAdamW8bit
from lowrank_optim.methods.fira import FiraAdamW, FiraAdamW8bit
from lowrank_optim.methods.frugal import FrugalAdamW, FrugalAdamW8bit, FrugalLion, FrugalSGD
from lowrank_optim.methods.galore import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
)
from lowrank_optim.methods.ldadam import LDAdamW, LDAdamW8bit
from lowrank_optim.methods.lisa import BAdamW, BAdamW8bit, LisaAdamW, LisaAdamW8bit
from lowrank_optim.methods.sst import SSTAdamW, SSTAdamW8bit
from lowrank_optim.methods.switchlora import SwitchLoRAAdamW, SwitchLoRAAdamW8bit

__all__ = [
    "ApolloAdamW",
    "ApolloAdamW8bit",
    "BAdamW",
    "BAdamW8bit",
    "DCTAdamW",
    "DCTAdamW8bit",
    "FiraAdamW",
    "FiraAdamW8bit",
    "FrugalAdamW",
    "FrugalAdamW8bit",
    "FrugalLion",
    "FrugalSGD",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLoreSGD",
    "LDAdamW",
    "LDAdamW8bit",
    "LisaAdamW",
    "LisaAdamW8bit",
    "SSTAdamW",
    "SSTAdamW8bit",
    "SwitchLoRAAdamW",
    "SwitchLoRAAdamW8bit",
]
