"""Checkpoints of other packages, read into ours."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import IO, Any, cast

import torch
from torch import Tensor

from lowrank_optim.checkpoints import bitsandbytes_state as bnb
from lowrank_optim.checkpoints.form import Entries, StateDict, check_form
from lowrank_optim.checkpoints.matching import check_fit
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.state import init_state
from lowrank_optim.groups import Group, canonical
from lowrank_optim.groups.values import whole
from lowrank_optim.rules import AdamW, Lion, Slot
from lowrank_optim.stores import Store
from lowrank_optim.tensors.values import counter, readable

FACTORS = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}
"""Adafactor's means along rows and columns change places where the matrix is seen transposed."""


class ProjectorRecord:
    """The attributes of a pickled ``GaLoreProjector``, and none of its code."""

    rank: int
    update_proj_gap: int
    scale: float
    proj_type: str
    ortho_matrix: Any


def import_galore_torch(
    checkpoint: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any], optimizer: PlannedOptimizer
) -> StateDict:
    r"""A galore-torch checkpoint as a state dict for ``optimizer.load_state_dict``.

    Their projector is a Python object that holds :math:`U_{:,:r}` or :math:`V^T_{:r}`; it becomes
    the tensor ``basis``, and the moments are turned with it; loading gives both the dtypes that
    ``optimizer`` keeps. Dense parameters are carried over too. With ``projector="svd"`` and
    ``stagger=False`` the next refresh falls on the step at which galore-torch would have made it.

    Args:
        checkpoint: path or file of a saved ``GaLoreAdamW`` or ``GaLoreAdafactor`` state dict (or of
            a checkpoint that has it under ``"optimizer"``), or that dict itself. Files are read
            without galore-torch and without running any code that they hold.
        optimizer: what the state dict is for, with the same parameters in groups of the same order,
            lengths and ranks; it is left as it is.

    Raises:
        ValueError: the file holds other objects, or its state does not fit ``optimizer``.
        TypeError: ``checkpoint`` is none of these.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, import_galore_torch
        >>> weight = torch.nn.Parameter(torch.zeros(4, 6))
        >>> optimizer = GaLoreAdamW([weight], rank=2, projector="svd", stagger=False)
        >>> theirs = {"state": {}, "param_groups": [{"params": [0], "rank": 2, "lr": 0.01}]}
        >>> optimizer.load_state_dict(import_galore_torch(theirs, optimizer))
        >>> optimizer.param_groups[0]["lr"]
        0.01

    Differs from a resume in galore-torch: the arithmetic from here on is this package's (eps after
    bias correction, decay first, signs of new bases aligned with the old). Adafactor's first moment
    is there an average of directions times the learning rate; it is divided by the last one, which
    is exact while that is constant. Moments of the 8-bit optimizer keep their codes where its
    blocks are ours (see :func:`import_bitsandbytes`): not where the matrix is seen transposed.
    """
    entries_of, groups = _opened(checkpoint, optimizer)
    state: dict[Any, Entries] = {}
    filled: list[Group] = []
    saved: dict[int, Entries] = {}
    for mine, group in zip(optimizer.param_groups, groups, strict=True):
        items, store = optimizer._items(mine), optimizer._strategies(mine).store
        entries = {i: entries_of[i] for i in group["params"] if i in entries_of}
        named = {i: item.name for i, item in zip(group["params"], items, strict=True)}
        group |= {"method": "galore_torch"}
        projectors = {i: _projector(named[i], entry) for i, entry in entries.items()}
        group |= _projector_keys({named[i]: own for i, own in projectors.items()})
        filled.append({**mine, **group})
        for i, item in zip(group["params"], items, strict=True):
            if i in entries:
                expected = _expected(optimizer, mine, item)
                state[i] = saved[item.index] = _converted(
                    item, entries[i], projectors[i], group, expected, store
                )
    check_fit(optimizer, filled, saved)
    return {"state": state, "param_groups": groups}


def import_bitsandbytes(
    checkpoint: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any], optimizer: PlannedOptimizer
) -> StateDict:
    r"""A bitsandbytes checkpoint as a state dict for ``optimizer.load_state_dict``.

    A moment keeps its codes and scales where its blocks are ours: where the last dimension is a
    multiple of 256 or divides it, and in vectors. Otherwise, and where ``optimizer`` keeps another
    format, :math:`x = \mathrm{map}[c]\, s` is written anew.

    Args:
        checkpoint: path or file of a saved ``AdamW8bit`` or ``Lion8bit`` state dict (their 32-bit
            and paged forms too, or a checkpoint that has one under ``"optimizer"``), or that dict
            itself. Read with ``weights_only=True``, without bitsandbytes.
        optimizer: what the state dict is for: dense parameters under AdamW or Lion, in groups of
            the same order and lengths; it is left as it is.

    Raises:
        ValueError: the file holds other objects, or its state does not fit ``optimizer``.
        TypeError: ``checkpoint`` is none of these.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW8bit, import_bitsandbytes
        >>> weight = torch.nn.Parameter(torch.zeros(4, 6))
        >>> optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": None}])
        >>> m, v = torch.full((4, 6), 0.5), torch.full((4, 6), 0.25)
        >>> entry = {"step": 3, "state1": m, "state2": v}
        >>> theirs = {"state": {0: entry}, "param_groups": [{"params": [0], "lr": 0.01}]}
        >>> optimizer.load_state_dict(import_bitsandbytes(theirs, optimizer))
        >>> float(optimizer.state[weight]["step"]), float(optimizer.state[weight]["exp_avg"][0, 0])
        (3.0, 0.5)

    Differs from a resume in bitsandbytes: new codes are the nearest ones (see docs/kernels.md). A
    checkpoint does not say which optimizer wrote it: Adam and LAMB have the moments of AdamW, and
    SGD, RMSprop and Adagrad as many as Lion; only AdamW's (bitsandbytes' Adam is the same), and
    Lion's for Lion, mean here what they meant there.
    """
    entries_of, groups = _opened(checkpoint, optimizer)
    rule = bnb.rule_of(optimizer)
    state: dict[Any, Entries] = {}
    filled: list[Group] = []
    saved: dict[int, Entries] = {}
    for mine, group in zip(optimizer.param_groups, groups, strict=True):
        if rule is Lion:
            group.pop("eps", None)
        filled.append({**mine, **group, "method": "bitsandbytes"})
        store = optimizer._strategies(mine).store
        for i, item in zip(group["params"], optimizer._items(mine), strict=True):
            if not entries_of.get(i):
                continue
            if item.subspace is not None:
                raise ValueError(
                    f"{item.name} is projected here, and a moment of bitsandbytes is dense: put it "
                    "in a group with rank=None, or read galore-torch's with import_galore_torch"
                )
            expected = _expected(optimizer, mine, item)
            state[i] = saved[item.index] = bnb.dense(
                item.name, entries_of[i], rule, expected, store
            )
    check_fit(optimizer, filled, saved)
    return {"state": state, "param_groups": groups}


def export_bitsandbytes(optimizer: PlannedOptimizer) -> StateDict:
    """The state of ``optimizer`` as a state dict for bitsandbytes.

    Load it into ``bitsandbytes.optim.AdamW8bit`` or ``Lion8bit`` with the same parameters in groups
    of the same order. The inverse of :func:`import_bitsandbytes`: what is in 8 bits is so there,
    with the same codes where its blocks are the same, and the rest is float32.

    Args:
        optimizer: AdamW or Lion, all of whose parameters are dense.

    Raises:
        ValueError: bitsandbytes has no such state.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW8bit, export_bitsandbytes
        >>> weight = torch.nn.Parameter(torch.zeros(64, 256))
        >>> optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": None}])
        >>> weight.grad = torch.ones(64, 256)
        >>> optimizer.step()
        >>> export_bitsandbytes(optimizer)["state"][0]["state1"].dtype
        torch.uint8
    """
    rule = bnb.rule_of(optimizer)
    state: dict[Any, Entries] = {}
    groups: list[Group] = []
    for group in optimizer.param_groups:
        if group["maximize"]:
            raise ValueError("bitsandbytes has no maximize")
        items, store = optimizer._items(group), optimizer._strategies(group).store
        for item in items:
            if item.subspace is not None:
                raise ValueError(f"{item.name} is projected, and bitsandbytes' states are dense")
            own = optimizer.state.get(item.param)
            if not own or not own["step"]:
                continue  # bitsandbytes, too, makes the state at the first gradient
            entry = state[item.index] = {"step": int(own["step"])}
            for n, slot in enumerate(rule().slots(item.param.shape), 1):
                entry |= bnb.written(n, own, slot, item.param, store)
        keys: Group = {k: group[k] for k in ("betas", "weight_decay", "initial_lr") if k in group}
        keys |= {"lr": float(group["lr"]), "eps": group.get("eps", 0.0)}
        keys |= {} if rule is Lion else bnb.ADEMAMIX
        groups.append({**keys, "params": [item.index for item in items]})
    return {"state": state, "param_groups": groups}


def _opened(
    checkpoint: str | os.PathLike[str] | IO[bytes] | Mapping[str, Any], optimizer: PlannedOptimizer
) -> tuple[Mapping[Any, Entries], list[Group]]:
    """The state of each parameter, bitsandbytes' unwrapped, and the groups under our names.

    Raises:
        ValueError: it is no optimizer's state, or that of one with other groups.
    """
    theirs = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    theirs = theirs.get("optimizer", theirs)
    if not isinstance(theirs, Mapping) or not {"state", "param_groups"} <= theirs.keys():
        held = sorted(map(str, theirs)) if isinstance(theirs, Mapping) else type(theirs).__name__
        raise ValueError(f"not an optimizer checkpoint: it holds {held}")
    check_form(theirs)
    groups = [canonical(bnb.without_defaults(group)) for group in theirs["param_groups"]]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError(
            f"checkpoint has groups of {[len(g['params']) for g in groups]} parameters, the "
            f"optimizer of {[len(g['params']) for g in optimizer.param_groups]}"
        )
    return {i: bnb.unwrapped(entry) for i, entry in theirs["state"].items()}, groups


def _expected(optimizer: PlannedOptimizer, group: Group, item: ParamPlan) -> Mapping[str, Tensor]:
    """The state that ``optimizer`` would make for a parameter, on the meta device."""
    like = torch.empty_like(item.param, device="meta")
    return init_state(item, optimizer._strategies(group), like)


def _read(file: str | os.PathLike[str] | IO[bytes]) -> Mapping[str, Any]:
    """The dict in a file that may hold tensors, plain containers and galore-torch's projectors."""
    if not isinstance(file, str | os.PathLike) and not hasattr(file, "read"):
        raise TypeError(
            "checkpoint must be a path, a file, or the state dict itself, as "
            f"optimizer.state_dict() gives it, got {type(file).__name__}"
        )
    name = "galore_torch.galore_projector.GaLoreProjector"
    try:
        with torch.serialization.safe_globals([(ProjectorRecord, name)]):
            theirs = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"refused to read {file}: it holds an object that is neither a tensor, a plain "
            f"container nor a galore-torch projector ({str(error).splitlines()[-1]})"
        ) from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # which one depends on the byte where it breaks off
        raise ValueError(
            f"{file} cannot be read as a file of torch.save ({type(error).__name__}: {error}): it "
            "is cut off, damaged or something else"
        ) from error
    if not isinstance(theirs, Mapping):
        raise ValueError(f"not an optimizer checkpoint: {type(theirs).__name__}")
    return theirs


def _projector(name: str, entry: Mapping[str, Any]) -> ProjectorRecord | None:
    """A saved projector, whatever its class.

    Raises:
        ValueError: it lacks what a step of galore-torch reads of it.
    """
    projector = entry.get("projector")
    if projector is None:
        return None
    missing = [key for key in ProjectorRecord.__annotations__ if not hasattr(projector, key)]
    if missing:
        raise ValueError(
            f"projector of {name} must be a GaLoreProjector, got {type(projector).__name__} "
            f"without {', '.join(missing)}"
        )
    gap, bases = projector.update_proj_gap, projector.ortho_matrix
    if not whole(1).holds(gap):
        raise ValueError(f"update_proj_gap of {name} must be a positive int, got {gap!r}")
    bases = bases if isinstance(bases, list | tuple) else [bases]
    count = 2 if projector.proj_type == "full" else 1
    if len(bases) != count or not all(isinstance(x, Tensor) and x.dim() == 2 for x in bases):
        kinds = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in bases]
        raise ValueError(
            f"the projector of {name} has no basis: of proj_type={projector.proj_type!r} "
            f"ortho_matrix must be {'two matrices' if count > 1 else 'a matrix'}, got {kinds}"
        )
    for basis in bases:
        readable(f"ortho_matrix of {name}", basis)
    return cast(ProjectorRecord, projector)


def _projector_keys(projectors: Mapping[str, ProjectorRecord | None]) -> Group:
    """Group keys as the projectors have them: galore-torch ignores later edits of its groups.

    Raises:
        ValueError: two projectors of one group differ.
    """
    keys: Group = {}
    first: dict[str, str] = {}
    for name, projector in projectors.items():
        for key in ("rank", "update_proj_gap", "scale", "proj_type") if projector else ():
            value = getattr(projector, key)
            if keys.setdefault(key, value) != value:
                raise ValueError(
                    f"{key} of one group is {keys[key]!r} for {first[key]} and {value!r} for {name}"
                )
            first.setdefault(key, name)
    return keys


def _converted(
    item: ParamPlan,
    entry: Entries,
    projector: ProjectorRecord | None,
    group: Group,
    expected: Mapping[str, Tensor],
    store: Store,
) -> Entries:
    """The state of one parameter under our names, in our orientation and formats."""
    steps = bnb.steps_of(item.name, entry)
    out: Entries = {"step": counter(steps)}
    moments = {
        k: readable(f"{k} of {item.name}", v)
        for k, v in entry.items()
        if k.startswith("exp_avg") and v is not None
    }
    if "clip_threshold" in group and "exp_avg" in moments:
        lr = _last_lr(item.name, steps, entry, group)
        moments["exp_avg"] = moments["exp_avg"] / lr if lr else 0 * moments["exp_avg"]
    kept: Mapping[str, Tensor | bnb.Flat] = moments
    if "state1" in entry:
        kept = bnb.moments(item.name, entry, AdamW().slots(item.param.shape))
    if projector is None or item.view is None:
        for key, value in kept.items():
            out |= bnb.stored(key, value, _slot(key), expected, False, store)
        return out
    flip = item.view.flip
    bases = projector.ortho_matrix
    bases = bases if isinstance(bases, list | tuple) else [bases]
    step, gap = int(steps), projector.update_proj_gap
    out["refresh_step"] = counter((step - 1) // gap * gap)
    out["postponed"] = counter(0.0)
    out["basis"] = bnb.own_copy(bases[0].mT if flip else bases[0])
    if len(bases) == 2:  # proj_type "full"
        out["basis_right"] = bnb.own_copy(bases[1].mT)
    for key, value in kept.items():
        turned = flip and (isinstance(value, bnb.Flat) or value.dim() == 2)
        own = f"low.{FACTORS.get(key, key) if flip else key}"
        out |= bnb.stored(own, value, _slot(key), expected, turned, store)
    return out


def _slot(key: str) -> Slot:
    """A moment of theirs."""
    return Slot(key, signed="sq" not in key)


def _last_lr(name: str, step: float, entry: Entries, group: Group) -> float:
    """The learning rate that galore-torch's Adafactor multiplied its last direction by.

    Raises:
        ValueError: something that it depends on is missing.
    """
    if not step:
        return 0.0
    needed = ["lr", "relative_step", "warmup_init", "scale_parameter", "eps"]
    lacking = [key for key in needed if key not in group]
    if group.get("scale_parameter") and "RMS" not in entry:
        lacking.append("RMS")
    lr = None if lacking else group["lr"]
    if not lacking and group["relative_step"]:
        lr = min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
    if lr is None:
        raise ValueError(
            f"exp_avg of {name} holds a learning rate of galore-torch's Adafactor, which is not "
            f"known without {', '.join(lacking or ['lr'])} of its group and state"
        )
    return float(lr * max(group["eps"][1], float(entry["RMS"])) if group["scale_parameter"] else lr)
