"""What every layer that stands in for a linear one has in common, and the registry of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from lowrank_optim.engine.plan import State
from lowrank_optim.groups import Group
from lowrank_optim.ops.devices import plainly
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import as_dtype, check_index, readable

logger = logging.getLogger(__name__)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, which stores its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""What torch keeps of the hooks around a module's call."""


def convertible(layer: nn.Module) -> bool:
    """Plain linear layers only: others may use their weight in ways of their own.

    So may one with a ``forward`` of its own, as packages put in its place.
    """
    return (type(layer) is nn.Linear or is_conv1d(layer)) and "forward" not in vars(layer)


def follow(new: nn.Module, old: nn.Module) -> None:
    """Let a layer that takes another's place have its mode, and its hooks.

    Dicts of hooks are shared, so that a handle that the user has still removes its hook.
    """
    new.train(old.training)
    for key in HOOKS:
        setattr(new, key, getattr(old, key))


class Reparameterized(nn.Module):
    """A linear layer whose weight is a function of other parameters."""

    options: ClassVar[Group] = {}
    """What the layer is told at its making, beside the rank, and the defaults."""
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
        follow(self, layer)

    def members(self) -> dict[str, nn.Parameter]:
        """The parameters of the weight that an optimizer is given."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """The weight ``(out, in)``, in the dtype of the factors or a wider one."""
        raise NotImplementedError

    def check_merge(self) -> None:
        """Raise if no plain layer does what this one does.

        Raises:
            ValueError: it is so.
        """

    @property
    def weight(self) -> Tensor:
        """The weight that this layer applies, as the original stored it; a copy."""
        with torch.no_grad(), plainly():
            product = self.product().to(self.weight_dtype)
            return (product.mT if self.conv1d else product).contiguous()

    def merged(self) -> nn.Module:
        """The original kind of layer with the weight that the factors multiply to."""
        self.check_merge()
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
        follow(layer, self)
        return layer

    def extra_repr(self) -> str:
        """As of ``nn.Linear``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class Factored(Reparameterized):
    """A layer that an optimizer of dense weights has a form of, with the same run.

    A subclass says how factors and optimizer state of the dense form become parameters
    (:meth:`from_state`) and back (:meth:`to_state`); conversion in both directions, at any time,
    follows from these. The first of its members holds the state of all.
    """

    form: ClassVar[str]
    """Value of the group key ``form`` by which the matching optimizer knows these layers."""

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
    """Class decorator: make a layer available as ``convert(model, name)``.

    Args:
        name: of the method, and the value of the group key ``form`` of its layers.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from lowrank_optim.nn import FORMS
        >>> FORMS["sst"].__name__
        'SpectralLinear'
    """

    def wrap(cls: _F) -> _F:
        if name in FORMS or name in CONVERTERS:
            raise ValueError(f"a form named {name!r} is registered already")
        cls.form = name
        FORMS[name] = cls
        return cls

    return wrap


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, and its name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def check_saved_index(
    state_dict: Mapping[str, Any], key: str, current: Tensor, size: int, order: str
) -> None:
    """Raise unless what is saved under ``key``, if anything is, are indices of ``size`` places.

    Raises:
        ValueError: as of :func:`lowrank_optim.tensors.values.check_index`.
    """
    if key not in state_dict:
        return
    given = state_dict[key]
    if isinstance(given, Tensor) and is_sharded(given):  # as every rank loads
        given = given.full_tensor()  # type: ignore[attr-defined]
    index = as_dtype(key, readable(key, given), current.dtype)
    if index.shape == current.shape:  # torch reports another
        check_index({key: index}, key, size, order)


def layer_of(model: nn.Module, name: str, param: Tensor) -> str | None:
    """Name of the one layer whose weight ``param`` is, if it can be replaced."""
    users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is param]
    place = name.rpartition(".")[0]
    layer = model.get_submodule(place) if users == [f"{place}.weight"] else None
    if layer is None or place == "" or not convertible(layer):
        logger.info("%s stays a dense weight", name)
        return None
    return place
