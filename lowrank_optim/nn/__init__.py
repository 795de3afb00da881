"""Module forms: layers of factors, whose weights have no gradient of their own size."""

from lowrank_optim.nn import switchlora_forms as _switchlora_forms  # noqa: F401  (registers)
from lowrank_optim.nn.base import (
    CONVERTERS,
    FORMS,
    Converter,
    Factored,
    Reparameterized,
    register_form,
)
from lowrank_optim.nn.convert import convert, merge, to_modules, to_weights
from lowrank_optim.nn.lost import LOSTLinear
from lowrank_optim.nn.sltrain import SLTrainLinear
from lowrank_optim.nn.spectral import SpectralLinear
from lowrank_optim.nn.switchlora import SwitchLoRALinear

__all__ = [
    "CONVERTERS",
    "FORMS",
    "Converter",
    "Factored",
    "LOSTLinear",
    "Reparameterized",
    "SLTrainLinear",
    "SpectralLinear",
    "SwitchLoRALinear",
    "convert",
    "merge",
    "register_form",
    "to_modules",
    "to_weights",
]
