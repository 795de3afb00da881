"""Whether saved entries are those of the state that an optimizer would make; errors name both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.checkpoints.counters import dtype_of
from lowrank_optim.checkpoints.form import Entries, check_owners
from lowrank_optim.checkpoints.placed import as_one_process
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.forms import forms_of, whole_meta_state
from lowrank_optim.engine.state import check_state
from lowrank_optim.groups import Group
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.ops.quant4 import scale_count
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.values import as_dtype, readable

STRUCTURE = ("rank", "proj_type", "projector", "basis", "flatten")
"""Group keys that shape the state: a checkpoint may not change them silently."""

FOREIGN = "another optimizer"
"""What wrote a group that does not say which class did."""

HOLD = (
    "Idle blocks have no moments, and torch's loaders look for those alone that the optimizer has: "
    "call lowrank_optim.checkpoints.hold_blocks(optimizer) before reading from disk, or a "
    "flattened state"
)


def check_fit(
    optimizer: PlannedOptimizer,
    groups: list[Group],
    saved: dict[int, Entries],
    told: Sequence[str | None] | None = None,
) -> dict[int, dict[str, torch.dtype]]:
    """Compare every saved entry with the state that this optimizer would make.

    Args:
        optimizer: what the checkpoint is to be loaded into.
        groups: the groups it would have then, as many and as long as its own.
        saved: state by position of the parameter; entries get the shapes of one process.
        told: the format of moments that each group of the checkpoint tells of itself (default: none
            does).

    Returns:
        The dtype of every entry. It is the saved one, unless the checkpoint comes from another
        optimizer or from parameters of another dtype: a moment in a format that its store does not
        write would be read, updated and forgotten.

    Raises:
        ValueError: with the parameter's name and both values.
    """
    dtypes: dict[int, dict[str, torch.dtype]] = {}
    check_owners(optimizer.param_groups, groups)
    n = 0
    told = told or [None] * len(groups)
    for mine, loaded, format_ in zip(optimizer.param_groups, groups, told, strict=True):
        merged = {**loaded, "params": mine["params"]}
        if "param_names" in mine:
            merged.setdefault("param_names", mine["param_names"])
        with _told_whose(optimizer, merged):
            optimizer._check(merged)
        chosen = optimizer._strategies(merged)
        planned = optimizer._planned(mine), optimizer._planned(merged, instead=mine)
        for ours, there in zip(*planned, strict=True):
            if n in saved:
                _same_structure(optimizer, ours, there, mine, merged, saved[n])
                expected = whole_meta_state(there, chosen, active=True)
                # or torch may have read codes into floats, of another format that it was made for
                alike = format_ is not None and format_ == mine["state_dtype"]
                saved[n] = as_one_process(there, chosen, saved[n], expected, alike)
                dtypes[n] = _fitting(optimizer, there, chosen, loaded, saved[n])
            n += 1
    return dtypes


def _fitting(
    optimizer: PlannedOptimizer, item: ParamPlan, chosen: Strategies, loaded: Group, found: Entries
) -> dict[str, torch.dtype]:
    """Dtypes of the entries of one parameter, all of which are what its state may hold."""
    with _named(optimizer, item, loaded):
        tensors = {key: readable(key, value) for key, value in found.items()}
    # a block's moments are there or not, by when the checkpoint was written
    active = any(slot.name in found for slot in chosen.rule.slots(item.param.shape))
    last = tensors.get("refresh_step")
    active |= last is not None and bool((last >= 0).any())  # must be: nobody else has them
    expected = whole_meta_state(item, chosen, active)
    _same_shapes(optimizer, item, chosen, loaded, tensors, expected)
    _same_method(optimizer, item, loaded)
    with _named(optimizer, item, loaded):
        check_state(
            item, chosen, {k: as_dtype(k, local(x), expected[k].dtype) for k, x in tensors.items()}
        )
        dtypes = {k: dtype_of(k, x, tensors[k]) for k, x in expected.items()}
    idle = isinstance(item.subspace, Block) and float(tensors["refresh_step"]) < 0
    # moments that a reader left in its place: of another turn, or zeros of :func:`hold_blocks`
    kept = whole_meta_state(item, chosen, active=False) if idle else expected
    return {k: dtypes[k] for k in kept}


@contextmanager
def _named(optimizer: PlannedOptimizer, item: ParamPlan, loaded: Group) -> Iterator[None]:
    """Say in an error about a value whose it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"checkpoint written by {loaded['method']} cannot be loaded into {item.name} of "
            f"{type(optimizer).__name__}: {error}. Nothing was loaded: the checkpoint is damaged, "
            "was written for other parameters, or the run had failed when it was saved"
        ) from None


@contextmanager
def _told_whose(optimizer: PlannedOptimizer, loaded: Group) -> Iterator[None]:
    """Say in an error about a value of a group that nobody here gave it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"checkpoint written by {loaded['method']} has a group that {type(optimizer).__name__} "
            f"cannot take: {error}. {_remedy(optimizer, '', None, loaded)}"
        ) from None


def _same_method(optimizer: PlannedOptimizer, item: ParamPlan, loaded: Group) -> None:
    """Raise if another method wrote the state of a matrix, whatever the names of its entries."""
    if item.subspace is not None and _of_another_method(optimizer, loaded):
        ours = type(optimizer).__name__
        raise _misfit(optimizer, item.name, "the method", loaded["method"], ours, loaded)


def _of_another_method(optimizer: PlannedOptimizer, loaded: Group) -> bool:
    """Whether a class of this package wrote a group that is neither this one's base nor its own."""
    theirs, ours = METHODS.get(loaded["method"]), type(optimizer)
    return theirs is not None and not (issubclass(theirs, ours) or issubclass(ours, theirs))


def _same_structure(
    optimizer: PlannedOptimizer,
    here: ParamPlan,
    there: ParamPlan,
    mine: Group,
    loaded: Group,
    found: Entries,
) -> None:
    """Raise if the groups see the parameter in different ways."""
    if "projector" in found:
        raise ValueError(
            f"the state of {here.name} holds a projector object: "
            "read this checkpoint with lowrank_optim.import_galore_torch"
        )
    if here.subspace is not None:
        for key in STRUCTURE:
            if loaded.get(key) != mine.get(key):
                raise _misfit(optimizer, here.name, key, loaded.get(key), mine.get(key), loaded)
    if (here.subspace is None) != (there.subspace is None):
        theirs, ours = ("dense" if x.subspace is None else "projected" for x in (there, here))
        raise _misfit(optimizer, here.name, "the parameter", theirs, ours, loaded)


def _same_shapes(
    optimizer: PlannedOptimizer,
    item: ParamPlan,
    chosen: Strategies,
    loaded: Group,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    """Raise if the saved entries are not those of the optimizer, or have other shapes."""
    for key in sorted(expected.keys() & found.keys()):
        theirs, ours = _format(key, found), _format(key, expected)
        if theirs != ours and "bit" in theirs + ours:
            raise _misfit(optimizer, item.name, f"format of {key}", theirs, ours, loaded)
    if expected.keys() != found.keys():
        error = _misfit(optimizer, item.name, "state", sorted(found), sorted(expected), loaded)
        if isinstance(item.subspace, Block):
            raise ValueError(f"{error}. {HOLD}")
        raise error
    forms = forms_of(item, chosen) if item.sharded else {}
    for key, tensor in expected.items():
        shape, own = tuple(found[key].shape), tuple(tensor.shape)
        if is_sharded(found[key]) and key in forms:
            own = forms[key].shape
        if shape != own:
            raise _misfit(optimizer, item.name, f"shape of {key}", shape, own, loaded)


def _format(key: str, entries: Mapping[str, Tensor]) -> str:
    """Name of the store that wrote an entry: codes have scales beside them."""
    x, scales = entries[key], entries.get(scale_key(key))
    if scales is not None:
        rows, count = x.shape[:-1], scale_count(2 * x.shape[-1])
        # a block of columns may be a dimension, with one scale
        in_4bit = scales.shape == (*rows, count) or (count == 1 and scales.shape == rows)
        return "4bit" if in_4bit else "8bit"
    return "codes without scales" if x.dtype == torch.uint8 else str(x.dtype).removeprefix("torch.")


def _misfit(
    optimizer: PlannedOptimizer, name: str, what: str, theirs: Any, mine: Any, loaded: Group
) -> ValueError:
    return ValueError(
        f"checkpoint written by {loaded['method']} does not fit {name} in "
        f"{type(optimizer).__name__}: {what} is {theirs} there and {mine} here. "
        f"{_remedy(optimizer, what, theirs, loaded)}"
    )


def _remedy(optimizer: PlannedOptimizer, what: str, theirs: Any, loaded: Group) -> str:
    """The optimizer that would take a checkpoint."""
    if loaded["method"] == FOREIGN and what == "state":
        make = "a group of rank=None for it, as moments of whole parameters fit those alone"
    elif _of_another_method(optimizer, loaded):
        make = f"a {loaded['method']}, as the run did that saved it"
    elif what in STRUCTURE:
        make = f"the optimizer with {what}={theirs!r}, as the run did that saved it"
    else:
        make = "the optimizer and its groups as the run did that saved it"
    return f"Nothing was loaded: make {make}, or load the weights alone, and all state begins anew"
