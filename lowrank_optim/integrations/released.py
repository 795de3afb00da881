"""Classes of this package under the names of released ones, for code that imports those."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec, spec_from_loader
from os import PathLike
from types import ModuleType
from typing import Any, NamedTuple

from lowrank_optim.groups import Group, canonical
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.optimizer import LowRankOptimizer

__all__ = ["as_apollo_torch", "as_galore_torch"]

_OF_BITSANDBYTES = {
    "args": (None,),
    "min_8bit_size": (4096,),
    "percentile_clipping": (100,),
    "block_wise": (True,),
    "optim_bits": (8, 32),  # the release reads neither
    "is_paged": (False,),
}
"""Arguments of the released 8-bit class, and the values that ask for nothing."""


def _eight_bits(given: Group) -> Group:
    """Without what only repeats how moments in 8 bits are kept; paged ones are in host memory."""
    if given.get("is_paged") is True:
        given = {**given, "is_paged": False, "state_device": "cpu"}
    return {k: v for k, v in given.items() if v not in _OF_BITSANDBYTES.get(k, ())}


def _step_size(given: Group) -> Group:
    """A learning rate that is given alone is one, as ``optim="galore_adafactor"`` has it.

    ``"galore_adafactor_layerwise"`` names no ``scale_parameter``, and the release refuses it.
    """
    alone = given.get("lr") is not None and not {"relative_step", "scale_parameter"} & given.keys()
    return {**given, "scale_parameter": False} if alone else given


class _Stand(NamedTuple):
    """What stands in for a released class."""

    method: str
    """Name of a class of this package."""
    defaults: Group
    """Of the released class, where they are others."""
    read: Callable[[Group], Group] = dict
    """Its arguments as ours."""


class _Release(NamedTuple):
    """A released package."""

    distribution: str
    version: str
    classes: Mapping[str, _Stand]


RELEASES: dict[str, _Release] = {
    "galore_torch": _Release(
        "galore-torch",
        "1.0",
        {
            "GaLoreAdamW": _Stand("GaLoreAdamW", {"eps": 1e-6, "weight_decay": 0.0}),
            "GaLoreAdamW8bit": _Stand("GaLoreAdamW8bit", {}, _eight_bits),
            "GaLoreAdafactor": _Stand("GaLoreAdafactor", {}, _step_size),
        },
    ),
    "apollo_torch": _Release(
        "apollo-torch",
        "1.0",
        {"APOLLOAdamW": _Stand("ApolloAdamW", {"eps": 1e-6, "weight_decay": 0.0})},
    ),
}
"""Packages by the name of their module."""


LAYERWISE = (
    "the layer-wise optimizers of transformers' Trainer (5.23) follow no learning-rate schedule "
    "and are not in its checkpoints: trainer_optimizer(args, in_backward='step') of "
    "lowrank_optim.integrations.transformers has both"
)
"""Said where Trainer makes one optimizer a parameter: its other strings make two groups."""


def as_galore_torch(**options: Any) -> ModuleType:
    r"""Make ``import galore_torch`` find the classes of this package, in this process.

    Everything that asks for GaLore by a string then trains with them: ``optim="galore_adamw"``,
    ``"galore_adamw_8bit"``, ``"galore_adafactor"`` and the three ``"…_layerwise"`` of transformers'
    Trainer, ``use_galore`` of LLaMA-Factory, ``optimizer: galore_adamw`` of axolotl.

    As in galore-torch, a group without ``rank`` is dense, also where it comes alone; and ``eps``
    and ``weight_decay`` of GaLoreAdamW are 1e-6 and 0.0 unless they are given. Trainer hands on
    the learning rate alone, whatever its arguments say of decay, betas and eps: give them here, or
    use :func:`lowrank_optim.integrations.transformers.trainer_optimizer`, which reads them all.

    Args:
        **options: defaults of the classes, for what the strings cannot say, such as
            ``projector="dct"``, ``weight_decay=0.1`` or ``state_dtype="bfloat16"``. Each class
            takes those that it knows.

    Returns:
        The module.

    Raises:
        RuntimeError: galore-torch is installed, which is left as it is; or an older transformers
            has looked for it already.
        TypeError: an option is none of any of the classes, or is ``rank``, which groups give.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from lowrank_optim.integrations import as_galore_torch
        >>> as_galore_torch(projector="dct")  # doctest: +SKIP
        >>> TrainingArguments(  # doctest: +SKIP
        ...     optim="galore_adamw", optim_target_modules="all-linear", optim_args="rank=64"
        ... )

    Differs from galore-torch: :class:`lowrank_optim.GaLoreAdamW` says how. Checkpoints are those of
    this package's classes.
    """
    return _register("galore_torch", options)


def as_apollo_torch(**options: Any) -> ModuleType:
    """Make ``import apollo_torch`` find ``ApolloAdamW``: ``optim="apollo_adamw"`` of transformers.

    Args:
        **options: as of :func:`as_galore_torch`.

    Raises:
        RuntimeError: apollo-torch is installed, or an older transformers has looked for it.
        TypeError: an option is not one of the class.
    """
    return _register("apollo_torch", options)


def _register(name: str, options: Group) -> ModuleType:
    release = RELEASES[name]
    found = find_spec(name)
    if found is not None and found.loader is not _FINDER:
        raise RuntimeError(
            f"{name} is installed ({found.origin}), and it is what would be imported: uninstall it "
            f"(pip uninstall {release.distribution}), or give Trainer an optimizer of this package "
            "by lowrank_optim.integrations.transformers.trainer_optimizer"
        )
    classes = _stand_ins(name, release, canonical(options))
    before = _FINDER.modules.get(name)
    _FINDER.modules[name] = classes
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)  # last: an installed package is found first
    try:
        _tell_transformers(name)
    except RuntimeError:
        _FINDER.modules.pop(name)
        _FINDER.modules.update({} if before is None else {name: before})
        raise
    sys.modules.pop(name, None)
    return import_module(name)


def _tell_transformers(name: str) -> None:
    """Have transformers look again, which remembers what it found.

    Raises:
        RuntimeError: it is one that looks at its import alone.
    """
    known = sys.modules.get("transformers.utils.import_utils")
    available = getattr(known, f"is_{name}_available", None)
    if available is None:
        return
    if hasattr(available, "cache_clear"):
        available.cache_clear()
    if not available():
        raise RuntimeError(
            f"transformers has looked for {name} already: call as_{name}() before it is imported"
        )


def _stand_ins(module: str, release: _Release, options: Group) -> dict[str, type[LowRankOptimizer]]:
    """The classes by their released names.

    Raises:
        TypeError: an option is not one of any class.
    """
    if "rank" in options:
        raise TypeError(
            f"as_{module}() takes no rank, got {options['rank']!r}: groups say theirs, and those "
            "without are dense; give it where the groups are made, as in optim_args='rank=64'"
        )
    known = {stand.method: _arguments(METHODS[stand.method]) for stand in release.classes.values()}
    unknown = [key for key in options if not any(key in keys for keys in known.values())]
    if unknown:
        raise TypeError(
            f"as_{module}() got an unexpected keyword argument {unknown[0]!r}: {', '.join(known)} "
            f"take {', '.join(sorted(set().union(*known.values()) - {'rank'}))}"
        )
    return {
        name: _stand_in(
            module, name, stand, {k: v for k, v in options.items() if k in known[stand.method]}
        )
        for name, stand in release.classes.items()
    }


def _arguments(method: type[LowRankOptimizer]) -> set[str]:
    """Names of arguments of the constructor, and of the options that it takes."""
    return set(method.group_keys()) - set(method.extra_keys)


def _stand_in(module: str, name: str, stand: _Stand, options: Group) -> type[LowRankOptimizer]:
    """A subclass that takes the arguments of the released class, with its defaults."""
    method = METHODS[stand.method]
    signature = inspect.signature(method.__init__)
    positions = [
        p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ][2:]  # after self and params

    @wraps(method.__init__)
    def init(self: LowRankOptimizer, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        signature.bind(self, params, *args, **kwargs)  # Python's own errors
        given = canonical({**dict(zip(positions, args, strict=False)), **kwargs})
        own = {**stand.defaults, **options}
        method.__init__(self, params, **stand.read({**own, **given}))
        if len(self.param_groups) == 1 and _calling_module().startswith("transformers."):
            warnings.warn(LAYERWISE, stacklevel=2)

    def entries(self: LowRankOptimizer, params: Iterable[Any], defaults: Group) -> list[Any]:
        return _dense_without_rank(method._entries(self, params, defaults))

    own = {"__init__": init, "_entries": entries, "__doc__": method.__doc__}
    # named anew after its making, as a public name would take the place of the method's
    cls = type(f"_{name}", (method,), own)
    cls.__name__ = cls.__qualname__ = stand.method
    cls.__module__ = module
    return cls


def _calling_module() -> str:
    """Name of the module that has called who asks."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _dense_without_rank(entries: list[Any]) -> list[Any]:
    """Groups that say so, where they name no rank: a layer-wise loop gives each parameter alone."""
    if not entries:
        return entries
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    return [
        {**g, "rank": None} if isinstance(g, dict) and "rank" not in canonical(g) else g
        for g in groups
    ]


class _Metadata(Distribution):
    """What ``importlib.metadata`` knows of a package that is stood in for."""

    def __init__(self, module: str) -> None:
        release = RELEASES[module]
        self._texts = {
            "METADATA": (
                f"Metadata-Version: 2.1\nName: {release.distribution}\n"
                f"Version: {release.version}+lowrank.optim\n"
            ),
            "top_level.txt": f"{module}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path}: it is lowrank_optim that stands in for this package")


class _Finder(DistributionFinder, Loader):
    """Finds registered modules, after all that is installed."""

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, type[LowRankOptimizer]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.modules:
            return None
        return spec_from_loader(fullname, self, origin="lowrank_optim")

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        wanted = None if context is None else context.name
        for module in self.modules:
            if wanted is None or re.sub(r"[-_.]+", "_", wanted).lower() == module:
                yield _Metadata(module)

    def exec_module(self, module: ModuleType) -> None:
        classes = self.modules[module.__name__]
        release = RELEASES[module.__name__]
        module.__doc__ = f"lowrank_optim under the name of {release.distribution}."
        vars(module).update({**classes, "__all__": list(classes), "__version__": release.version})


_FINDER = _Finder()
