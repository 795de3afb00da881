"""Drop-in torch optimizers that train large models with low-rank state."""

from lowrank_optim import memory, presets
from lowrank_optim.backward.attach import attach_in_backward
from lowrank_optim.checkpoints.importers import (
    export_bitsandbytes,
    import_bitsandbytes,
    import_galore_torch,
)
from lowrank_optim.fitting import fit
from lowrank_optim.groups import lowrank_groups
from lowrank_optim.methods import (
    ApolloAdamW,
    ApolloAdamW8bit,
    BAdamW,
    BAdamW8bit,
    DCTAdamW,
    DCTAdamW8bit,
    FiraAdamW,
    FiraAdamW8bit,
    FrugalAdamW,
    FrugalAdamW8bit,
    FrugalLion,
    FrugalSGD,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
    LDAdamW,
    LDAdamW8bit,
    LisaAdamW,
    LisaAdamW8bit,
    SSTAdamW,
    SSTAdamW8bit,
    SwitchLoRAAdamW,
    SwitchLoRAAdamW8bit,
)
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.subspaces import PROJECTORS, Projector, register

__version__ = "0.1.0"

__all__ = [
    "PROJECTORS",
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
    "LowRankOptimizer",
    "Projector",
    "SSTAdamW",
    "SSTAdamW8bit",
    "SwitchLoRAAdamW",
    "SwitchLoRAAdamW8bit",
    "attach_in_backward",
    "export_bitsandbytes",
    "fit",
    "import_bitsandbytes",
    "import_galore_torch",
    "lowrank_groups",
    "memory",
    "presets",
    "register",
]
