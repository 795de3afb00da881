"""Module forms: layers of factors, whose weights have no gradient of their own size."""

from lowrank_optim.nn.base import CONVERTERS, FORMS, Factored, register_form
from lowrank_optim.nn.convert import convert, merge, to_modules, to_weights
from lowrank_optim.nn.spectral import SpectralLinear

__all__ = [
    "CONVERTERS",
    "FORMS",
    "Factored",
    "SpectralLinear",
    "convert",
    "merge",
    "register_form",
    "to_modules",
    "to_weights",
]
