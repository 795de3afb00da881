"""Options of every optimizer: keyword arguments of its constructor that groups may override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from lowrank_optim.groups.keys import (
    TORCH_FLAGS,
    projector_keys,
    refuse_apollo,
    remedy,
    with_projector,
    without_torch_flags,
)
from lowrank_optim.groups.values import Group


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes, and every parameter group may override."""

    rank: int | float
    """Directions kept, or a fraction of the projected dimension, where no group names a rank
    (default: 128)."""
    update_proj_gap: int
    """Steps between refreshes of a basis (default: 200)."""
    scale: float
    """Factor of the low-rank update (default: 0.25)."""
    proj_type: str
    """Side to project: std, reverse_std, left, right, full (default: "std", the smaller)."""
    projector: str
    """How a basis is found: a registered name (default: "rsvd")."""
    on_refresh: str
    """What moments do at a refresh: keep, reset, project (default: "keep")."""
    state_dtype: str
    """How moments are stored: float32, bfloat16, 8bit, 4bit (default: "float32")."""
    state_device: str | None
    """Where moments lie between steps: "cpu" is pinned host memory, None is beside the parameter
    (default: None)."""
    stochastic_rounding: bool
    """Round updates of bfloat16 weights without bias (default: False)."""
    stagger: bool
    """Spread refreshes over the gap; False refreshes all at 0, T, 2T (default: True)."""
    maximize: bool
    """Ascend (default: False)."""
    capturable: bool
    """Count steps on the device, so that a CUDA graph can hold one (default: False)."""
    flatten: bool
    """See a 3-d parameter as one matrix (out, rest), as of Conv1d, not as a batch, as of experts
    (default: False; :func:`lowrank_optim.lowrank_groups` sets it by module)."""
    seed: int
    """Of random bases and stochastic rounding (default: 0)."""


class ProjectorOptions(Options, total=False):
    """:class:`Options`, and what one ``projector`` reads: another refuses it."""

    oversample: int
    """Of ``"rsvd"``: columns of the search beyond the rank (default: 8)."""
    max_iterations: int
    """Of ``"rsvd"``: power iterations of a refresh at most (default: 8)."""
    tolerance: float
    """Of ``"rsvd"``: part of the captured energy for which another iteration is not worth it
    (default: 0.01)."""
    random_from: int | float
    """Of ``"golore"``: the first step with random bases, or the part of ``total_steps`` before
    (default: 0)."""
    total_steps: int | None
    """Of ``"golore"``: steps of the run (default: None)."""
    basis: str
    """Of ``"dct"``: ``"dct2"`` or ``"dct3"`` (default: "dct2")."""
    transform: str
    """Of ``"dct"``: how the transform is computed, auto, matmul, fft (default: "auto")."""
    ranking: str
    """Of ``"dct"`` and ``"hadamard"``: the norm by which directions are chosen, l2, l1
    (default: "l2")."""
    layers: str | None
    """Of ``"block"``: a pattern whose matches are one block each (default: None, a tensor each)."""
    active_layers: int
    """Of ``"block"``: blocks of ``layers`` that are active at once (default: None, the density)."""
    layer_weights: Any
    """Of ``"block"``: weights of the draws of ``layers`` (default: None, all alike)."""


DEFAULTS: Options = {
    "rank": 128,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "projector": "rsvd",
    "on_refresh": "keep",
    "state_dtype": "float32",
    "state_device": None,
    "stochastic_rounding": False,
    "stagger": True,
    "maximize": False,
    "capturable": False,
    "flatten": False,
    "seed": 0,
}


def with_defaults(cls: type[Any], options: Mapping[str, Any]) -> Group:
    """``options`` of a constructor completed, without torch's that have no effect here.

    What the projector reads is an option too, as it is a key of groups.

    Args:
        cls: the optimizer class, which says what it reads and what means nothing to it.
        options: those that were given.

    Raises:
        TypeError: an option is not known.
        ValueError: an argument of torch asks for something that no optimizer here does.
    """
    name = cls.__name__
    refuse_apollo(options, cls.group_keys(), name, "the constructor")
    given = {**DEFAULTS, **with_projector(without_torch_flags(options, name))}
    read = set() if "projector" in cls.unused else projector_keys(given["projector"])
    unknown = [key for key in given if key not in DEFAULTS and key not in read]
    if unknown:
        key, allowed = unknown[0], cls.group_keys() | read | TORCH_FLAGS.keys()
        raise TypeError(
            f"{name}() got an unexpected keyword argument {key!r}{remedy(key, allowed)}"
        )
    return given
