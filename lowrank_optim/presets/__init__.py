"""Published settings, as arguments of the optimizers: each with its source.

A preset is a plain dict, to be read and changed:
``GaLoreAdamW(model.named_parameters(), **galore_pretrain("60m"))``. Its rank is for parameters
whose groups name none; those of :func:`lowrank_optim.lowrank_groups` name one, so give it there.

It holds what concerns the optimizer; schedule, batch and number of steps are in the docstrings.
Whatever a source leaves to a release's default that ours differs from is in the dict as well. What
no source that was read says is not in the dict, and the docstring names it.
"""

from lowrank_optim.presets.factored import (
    lost_pretrain,
    sltrain_pretrain,
    sst_pretrain,
    switchlora_pretrain,
)
from lowrank_optim.presets.finetuning import (
    badam_finetune,
    frugal_glue,
    galore_glue,
    golore_glue,
    lisa_finetune,
)
from lowrank_optim.presets.projected import (
    apollo_pretrain,
    dct_release,
    fira_pretrain,
    frugal_pretrain,
    galore_pretrain,
    golore_pretrain,
    ldadam_pretrain,
)

__all__ = [
    "apollo_pretrain",
    "badam_finetune",
    "dct_release",
    "fira_pretrain",
    "frugal_glue",
    "frugal_pretrain",
    "galore_glue",
    "galore_pretrain",
    "golore_glue",
    "golore_pretrain",
    "ldadam_pretrain",
    "lisa_finetune",
    "lost_pretrain",
    "sltrain_pretrain",
    "sst_pretrain",
    "switchlora_pretrain",
]
