"""State of one process in the shapes and formats of several ranks, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.checkpoints.form import Entries
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.forms import forms_of, whole_meta_state
from lowrank_optim.engine.state import unit_of
from lowrank_optim.groups import Group
from lowrank_optim.groups.names import bare
from lowrank_optim.ops import quant, quant4
from lowrank_optim.rules.base import Slot
from lowrank_optim.sharding.parts import as_if_sharded, is_sharded
from lowrank_optim.stores import Block4Store, Block8Store, Store, encoded, scale_key
from lowrank_optim.subspaces.block import Block

UNITS = (quant.BLOCK, quant4.BLOCK, quant4.BLOCK // 2)
"""Entries, or bytes, of a block of columns; of fewer columns there is one block."""


def as_one_process(
    item: ParamPlan,
    chosen: Strategies,
    entries: Entries,
    expected: Mapping[str, Tensor],
    encodes: bool = True,
) -> Entries:
    """Saved entries in the shapes of one process, in the formats that are kept here.

    Ranks keep blocks of columns in two dimensions, and in float32 what has blocks that none of them
    would have whole. DTensors stay as they are where the parameter is one: their reader made
    them after the state that is here. What has another shape is left for who checks it.

    Args:
        item: the parameter.
        chosen: what its group chose, with what the checkpoint says of it.
        entries: its saved state.
        expected: what it would be here, in the shapes of one process.
        encodes: whether floats that are to be codes are known to be moments (default: True).
    """
    if not isinstance(chosen.store, Block8Store | Block4Store):
        return entries
    found = dict(entries)
    for key, x in entries.items():
        if not isinstance(x, Tensor) or (is_sharded(x) and is_sharded(item.param)):
            continue
        if is_sharded(x):
            found[key] = x = x.full_tensor()  # type: ignore[attr-defined]
        of_scales = any(scale_key(other) == key for other in entries)
        shape = tuple(expected[key].shape) if key in expected else ()
        if of_scales and isinstance(chosen.store, Block8Store):
            shape = (x.numel(),)
        found[key] = _out_of_blocks(x, shape)
    for slot in chosen.rule.slots(item.param.shape):
        for key in [k for k in entries if k.split(".")[-1] == slot.name]:
            _reformat(found, key, slot, expected, chosen.store, encodes)
    return found


def _out_of_blocks(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``(..., blocks, unit, ...)`` as ``(..., n, ...)``; anything else as it is."""
    if len(shape) == 1 and x.dim() > 1 and x.numel() == shape[0]:
        return x.reshape(-1)
    if x.dim() != len(shape) + 1:
        return x
    for dim, size in enumerate(shape):
        blocks, unit = x.shape[dim : dim + 2]
        own = (*shape[:dim], blocks, unit, *shape[dim + 1 :])
        known = unit in UNITS or (unit in (size, size + size % 2) and unit < quant.BLOCK)
        if tuple(x.shape) == own and known and -(-size // unit) == blocks:
            return x.flatten(dim, dim + 1).narrow(dim, 0, size).contiguous()
    return x


def _reformat(
    found: Entries,
    key: str,
    slot: Slot,
    expected: Mapping[str, Tensor],
    store: Store,
    encodes: bool,
) -> None:
    """Decode or encode a moment, where the one place keeps it as codes and the other does not."""
    x, need, of_scales = found[key], expected.get(key), scale_key(key)
    if need is None or not isinstance(x, Tensor) or is_sharded(x):
        return
    whole = slot._replace(averaged=None)  # shapes are those of the slot
    coded, codes = of_scales in found, of_scales in expected
    if coded and not codes:
        kept = {k: found[k] for k in (key, of_scales)}
        if _alike(kept, _empty(store, key, whole, need)):
            kept = {k: v.contiguous() for k, v in kept.items()}
            moment = store.read(kept, key, whole, need.shape, need, dense=True)
            assert isinstance(moment, Tensor)
            found[key] = moment
            del found[of_scales]
    if not (encodes and codes and not coded and x.is_floating_point()):
        return
    if _alike(_empty(store, key, whole, x), {k: expected[k] for k in (key, of_scales)}):
        found.update(encoded(store, key, whole, x.contiguous()))


def _empty(store: Store, key: str, slot: Slot, like: Tensor) -> Entries:
    """What a store keeps of a moment of this shape, without data."""
    made: dict[str, Tensor] = {}
    store.alloc(made, key, slot, like.shape, torch.empty_like(like, device="meta"))
    return made


def _alike(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        isinstance(x, Tensor) and x.shape == wanted[k].shape and x.dtype == wanted[k].dtype
        for k, x in found.items()
    )


def send_as_kept(optimizer: PlannedOptimizer, model: Any, sent: dict[str, Any]) -> None:
    """What torch's loader is about to cut for the ranks, in the shapes that they have.

    It takes as much of each tensor as a rank has of its own: of the same shape, in all.

    Args:
        optimizer: of the ranks.
        model: its model, for the names that the loader goes by.
        sent: the whole state by name; changed.
    """
    names = {id(param): bare(name) for name, param in model.named_parameters()}
    state = {bare(name): name for name in sent.get("state", {})}
    groups = {bare(n): g for g in sent.get("param_groups", []) for n in g.get("params", [])}
    for group in optimizer.param_groups:
        for item in optimizer._items(group):
            name = names.get(id(item.param))
            if name not in state or not item.sharded:
                continue
            chosen = optimizer._strategies(_as_saved(group, groups.get(name, {})))
            sent["state"][state[name]] = _as_kept(item, chosen, sent["state"][state[name]])


def in_blocks(optimizer: PlannedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of plain parameters in the shapes and formats that ranks keep.

    ``torch.distributed.checkpoint`` reads tensors of the shapes that were saved. Of ``"8bit"`` and
    ``"4bit"`` moments those of DTensors differ from those of plain parameters: their blocks are a
    dimension, and what has blocks that no rank would have whole is in float32. Between an optimizer
    of plain parameters and a sharded one, pass the state through this before ``dcp.save`` and
    ``dcp.load``; loading takes both shapes. Nothing else changes, and nothing of DTensors. Tensors
    that are split along their last dimension without a subspace are not foreseen: their moments are
    in float32.

    Args:
        optimizer: of named parameters.
        state_dict: of ``get_optimizer_state_dict``, by name and not flattened.

    Raises:
        ValueError: the state is flattened, or the optimizer has no names.

    Example:
        >>> import torch
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        >>> from lowrank_optim import GaLoreAdamW8bit
        >>> from lowrank_optim.checkpoints import in_blocks
        >>> model = torch.nn.Linear(700, 40, bias=False)
        >>> optimizer = GaLoreAdamW8bit(model.named_parameters(), rank=8)
        >>> state = in_blocks(optimizer, get_optimizer_state_dict(model, optimizer))
        >>> state["state"]["weight"]["low.exp_avg"].shape
        torch.Size([8, 3, 256])
    """
    if "state" not in state_dict:
        raise ValueError(
            "in_blocks takes a state dict by name, got one without 'state', as of "
            "flatten_optimizer_state_dict=True: leave that option out"
        )
    state = dict(state_dict["state"])
    names = {bare(str(name)): name for name in state}
    for group in optimizer.param_groups:
        chosen = optimizer._strategies(group)
        for item in optimizer._items(group):
            name = names.get(bare(item.name))
            if name is None and item.param in optimizer.state:
                raise ValueError(
                    f"the state dict has {[*names][:3]} and the optimizer {item.name}: make the "
                    "optimizer of model.named_parameters(), and take the state of "
                    "get_optimizer_state_dict(model, optimizer)"
                )
            dense = item.subspace is None or isinstance(item.subspace, Block)
            if name is None or item.sharded or not (dense or _can_split(item)):
                continue
            view, unit = None, 1
            if not dense and item.view is not None and item.subspace is not None:
                view, unit = item.view, unit_of(item.view, item.subspace, chosen)
            twin = replace(item, part=as_if_sharded(view, item.param.shape, unit))
            state[name] = _as_kept(twin, chosen, state[name])
    return {**state_dict, "state": state}


def _can_split(item: ParamPlan) -> bool:
    return item.alone and item.subspace is not None and item.subspace.whole is None


def _as_kept(item: ParamPlan, chosen: Strategies, entries: Entries) -> Entries:
    """Whole entries as ranks keep them."""
    expected = whole_meta_state(item, chosen, active=True)
    found, forms = as_one_process(item, chosen, entries, expected), forms_of(item, chosen)
    return {
        key: forms[key].kept(x) if key in forms and _fits(x, expected.get(key)) else x
        for key, x in found.items()
    }


def _as_saved(group: Group, saved: Group) -> Group:
    """A group with the format of its moments that a checkpoint has."""
    return {**group, **{k: v for k, v in saved.items() if k == "state_dtype"}}


def _fits(x: Any, expected: Tensor | None) -> bool:
    return isinstance(x, Tensor) and expected is not None and x.shape == expected.shape
