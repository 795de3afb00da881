"""What every layer that stands in for a linear one has in common, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from lowrank_optim.engine.plan import State
from lowrank_optim.groups import Group
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.tensors.matrix import MatrixView


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, which stores its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def convertible(layer: nn.Module) -> bool:
    """Plain linear layers only: others may use their weight in ways of their own."""
    return type(layer) is nn.Linear or is_conv1d(layer)


class Factored(nn.Module):
    """A linear layer whose weight is a function of factors.

    A subclass says how factors and optimizer state of the dense form become parameters
    (:meth:`from_state`) and back (:meth:`to_state`); conversion in both directions, at any time,
    follows from these.
    """

    form: ClassVar[str]
    """Value of the group key ``form`` by which the matching optimizer knows these layers."""
    options: ClassVar[Group] = {}
    """Group keys that the layer needs at its making, and their defaults."""
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.conv1d = is_conv1d(layer)
        rows, cols = weight.shape
        self.in_features, self.out_features = (rows, cols) if self.conv1d else (cols, rows)
        self.weight_dtype, self.weight_shape = weight.dtype, tuple(weight.shape)
        self._source = type(layer)
        self.register_parameter("bias", getattr(layer, "bias", None))
        self.train(layer.training)

    @classmethod
    def initial(cls, group: Group, view: MatrixView, weight: Tensor, uid: int) -> State:
        """State of the dense form, as its first step would make it."""
        raise NotImplementedError

    @classmethod
    def from_state(cls, layer: nn.Module, group: Group, view: MatrixView, state: State) -> Self:
        """Take the factors out of ``state``; what is left is the optimizer's."""
        raise NotImplementedError

    def to_state(self) -> State:
        """The factors, under the keys of the dense form's state."""
        raise NotImplementedError

    def members(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer steps together, the one that holds its state first."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """The weight ``(out, in)``, in the dtype of the factors."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight that this layer applies, as the original stored it; a copy."""
        with torch.no_grad():
            product = self.product().to(self.weight_dtype)
            return (product.mT if self.conv1d else product).contiguous()

    def merged(self) -> nn.Module:
        """The original kind of layer with the weight that the factors multiply to."""
        weight = self.weight
        size = (
            (self.out_features, self.in_features)
            if self.conv1d
            else (self.in_features, self.out_features)
        )
        make: Callable[..., nn.Module] = self._source
        with torch.device("meta"):
            layer = make(*size)
        layer.register_parameter("weight", nn.Parameter(weight))
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """As of ``nn.Linear``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


FORMS: dict[str, type[Factored]] = {}
"""Layers by the name of their method: all conversions are made from them."""


class Converter(NamedTuple):
    """A method that converts models itself."""

    layer: type[nn.Module]
    """Its layers, whose method ``merged()`` returns the plain one."""
    convert: Callable[..., list[Group]]
    """Called with the model, ``rank``, ``target_modules`` and options."""
    to_modules: Callable[[nn.Module, LowRankOptimizer], LowRankOptimizer]
    to_weights: Callable[[nn.Module, LowRankOptimizer], LowRankOptimizer]


CONVERTERS: dict[str, Converter] = {}
"""Those methods by name."""

_F = TypeVar("_F", bound=type[Factored])


def register_form(name: str) -> Callable[[_F], _F]:
    """Class decorator: make a layer available as ``convert(model, name)``."""

    def wrap(cls: _F) -> _F:
        cls.form = name
        FORMS[name] = cls
        return cls

    return wrap


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, and its name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
