"""Layers for training from the start: what they begin with is not the weight that was there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import torch
from torch import Tensor, nn

from lowrank_optim.engine.draws import seeded
from lowrank_optim.groups import Group, lowrank_groups
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.values import check_module
from lowrank_optim.nn.base import (
    CONVERTERS,
    Converter,
    Reparameterized,
    check_saved_index,
    layer_of,
    parent_of,
)
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.tensors.matrix import matrix_view
from lowrank_optim.tensors.values import readable

PLACES = ("params", "param_names", "rank", "flatten", "targets")
"""Keys of a group of weights that those of its factors have not, or have another value of."""


class FromStart(Reparameterized):
    """A layer of a low-rank and a sparse part, whose parameters any optimizer steps.

    ``a (r, in)`` and ``b (out, r)`` are the low-rank part, ``values`` the entries of the sparse
    one, and ``index`` says where they are, for good: a parameter without gradient.
    """

    method: ClassVar[str]
    """Its name for :func:`lowrank_optim.nn.convert`."""
    a: nn.Parameter
    b: nn.Parameter
    values: nn.Parameter
    index: nn.Parameter

    @classmethod
    def check_options(cls, options: Group) -> None:
        """Raise for an option that is out of range.

        Raises:
            ValueError: with what was given and what is allowed.
        """
        check_positive("density", options["density"], 1.0)

    @classmethod
    def begin(cls, layer: nn.Module, rank: int, options: Group, draws: torch.Generator) -> Self:
        """The layer that stands in for ``layer``.

        Args:
            layer: ``nn.Linear``, or GPT-2's ``Conv1D``.
            rank: r, no more than the smaller side.
            options: all of :attr:`options`.
            draws: of the layer's name and the seed.
        """
        raise NotImplementedError

    def places(self) -> int:
        """How many places ``index`` may point to."""
        raise NotImplementedError

    def members(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {"a": self.a, "b": self.b, "values": self.values}

    def _hold(self, a: Tensor, b: Tensor, values: Tensor, index: Tensor, like: Tensor) -> None:
        """Become the owner of these, in the dtype and on the device of ``like``."""
        for name, x in (("a", a), ("b", b), ("values", values)):
            own = x.to(like.device, like.dtype).contiguous()
            self.register_parameter(name, nn.Parameter(own))
        where = index.to(like.device, index_dtype(self.places()))
        self.index = nn.Parameter(where, requires_grad=False)

    def settings(self) -> dict[str, float]:
        """Numbers that the parameters mean nothing without."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The settings, so that a checkpoint does not go into a layer with others."""
        return torch.tensor(list(self.settings().values()), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: they are those of this layer, or the state is not loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As of any module, unless ``index`` or the settings do not fit."""
        try:
            check_saved_index(state_dict, f"{prefix}index", self.index, self.places(), "ascending")
            self._check_settings(prefix, state_dict.get(f"{prefix}_extra_state"))
        except ValueError as error:
            args[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_settings(self, prefix: str, given: Any) -> None:
        """Raise unless saved settings, if there are any, are those of this layer.

        Raises:
            ValueError: one is not.
        """
        if given is None:
            return
        key, settings = f"{prefix}_extra_state", self.settings()
        saved = readable(key, given).flatten().tolist()
        if len(saved) != len(settings):
            raise ValueError(
                f"{key} holds {len(saved)} numbers; allowed are {len(settings)}: "
                f"{', '.join(settings)} of {self.method!r}"
            )
        for (name, own), value in zip(settings.items(), saved, strict=True):
            if own != value:
                raise ValueError(
                    f"{name} of {prefix.removesuffix('.')} is {value:g} in the checkpoint and "
                    f"{own:g} here: convert with the options that the saved model had"
                )

    def _input(self, x: Tensor) -> Tensor:
        """The input in the dtype of products, once ``index`` is known to be one.

        Raises:
            RuntimeError: it was cast.
        """
        if self.index.is_floating_point():
            raise RuntimeError(
                f"the index of the sparse part is in {self.index.dtype}, which has not all places: "
                "keep int32 where parameters are cast, as FSDP2 of torch 2.13 does"
            )
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def extra_repr(self) -> str:
        """Sizes, rank and number of sparse entries."""
        return f"{super().extra_repr()}, rank={len(self.a)}, sparse={self.values.numel()}"


def index_dtype(places: int) -> torch.dtype:
    """The smallest that index_add takes."""
    return torch.int32 if places < 2**31 else torch.int64


def uniform(shape: Sequence[int], bound: float, draws: torch.Generator, like: Tensor) -> Tensor:
    """Draws from U(-bound, bound), in float32 or wider; without memory on the meta device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:
        return torch.empty(*shape, device="meta", dtype=dtype)
    return torch.empty(*shape, dtype=dtype).uniform_(-bound, bound, generator=draws)


def check_positive(name: str, value: Any, high: float) -> None:
    """Raise unless ``0 < value <= high``.

    Raises:
        ValueError: it is not.
    """
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < value <= high:
        raise ValueError(f"{name} must be a number in (0, {high:g}], got {value!r}")


def _convert(
    cls: type[FromStart],
    model: nn.Module,
    *,
    rank: int | float = 128,
    target_modules: str | Sequence[str] = "all-linear",
    **options: Any,
) -> list[Group]:
    """:func:`lowrank_optim.nn.convert` of these layers.

    Raises:
        ValueError: an option is out of range, a weight is sharded already, or no layer is targeted.
    """
    check_module(model)
    own = {key: options.pop(key, default) for key, default in cls.options.items()}
    cls.check_options(own)
    groups = lowrank_groups(model, rank=rank, target_modules=target_modules, **options)
    sharded = [n for n, p in model.named_parameters() if is_sharded(p)]
    if sharded:
        raise ValueError(f"{sharded[0]} is sharded already: convert first, then shard the model")
    out: list[Group] = []
    clamped: list[str] = []
    for group in groups:
        wanted, keys = group.get("rank"), {k: v for k, v in group.items() if k not in PLACES}
        held: Group = {**keys, "rank": None, "params": [], "param_names": []}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            place = None if wanted is None else layer_of(model, name, param)
            view = matrix_view(param.shape, "std")
            members: dict[str, Tensor] = {name: param}
            if wanted is not None and place is not None and view is not None:
                asked, r = view.directions(wanted), view.full_rank
                if asked > r:
                    clamped.append(f"{name} of shape {tuple(param.shape)}")
                draws = seeded(own.get("seed", 0), uid_of(name), 0)
                parent, last = parent_of(model, place)
                layer = cls.begin(parent.get_submodule(last), min(asked, r), own, draws)
                setattr(parent, last, layer)
                members = {f"{place}.{part}": x for part, x in layer.members().items()}
            held["params"] += members.values()
            held["param_names"] += members
        out.append(held)
    if not any(isinstance(layer, cls) for layer in model.modules()):
        raise ValueError(f"target_modules {target_modules!r} matches no linear layer")
    if clamped:
        more = f" and {len(clamped) - 1} more" if len(clamped) > 1 else ""
        warnings.warn(
            f"rank {rank} is clamped to the smaller side for {clamped[0]}{more}", stacklevel=3
        )
    return out


def _no_dense_form(cls: type[FromStart], model: nn.Module, optimizer: LowRankOptimizer) -> NoReturn:
    """Neither direction exists in the middle of a run: no optimizer has these over dense weights.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"no optimizer has {cls.method!r} over dense weights, so a run cannot change its form: "
        f"convert(model, {cls.method!r}) before the run, and merge(model) after it"
    )


_F = TypeVar("_F", bound=type[FromStart])


def register_layer(cls: _F) -> _F:
    """Class decorator: make a layer available as ``convert(model, cls.method)``."""
    refused = partial(_no_dense_form, cls)
    CONVERTERS[cls.method] = Converter(cls, partial(_convert, cls), refused, refused)
    return cls
