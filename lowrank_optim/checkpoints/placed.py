"""State of one process in the shapes and formats of several ranks, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.checkpoints.form import Entries
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.forms import forms_of, whole_meta_state
from lowrank_optim.groups import Group
from lowrank_optim.groups.names import bare
from lowrank_optim.ops import quant
from lowrank_optim.ops.quant import Quantized
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.stores import Block8Store, scale_key


def as_one_process(
    item: ParamPlan, chosen: Strategies, entries: Entries, expected: Mapping[str, Tensor]
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
    """
    found = dict(entries)
    for key, x in entries.items():
        if not isinstance(x, Tensor) or (is_sharded(x) and is_sharded(item.param)):
            continue
        if is_sharded(x):
            found[key] = x = x.full_tensor()  # type: ignore[attr-defined]
        of_scales = any(scale_key(other) == key for other in entries)
        shape = (x.numel(),) if of_scales else tuple(expected[key].shape) if key in expected else ()
        found[key] = _out_of_blocks(x, shape)
    if isinstance(chosen.store, Block8Store):
        for slot in chosen.rule.slots(item.param.shape):
            for key in [k for k in entries if k.split(".")[-1] == slot.name]:
                _reformat(found, key, slot.signed, expected)
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
        if tuple(x.shape) == own and unit and -(-size // unit) == blocks:
            return x.flatten(dim, dim + 1).narrow(dim, 0, size).contiguous()
    return x


def _reformat(found: Entries, key: str, signed: bool, expected: Mapping[str, Tensor]) -> None:
    """Decode or encode a moment, where the one place keeps it in 8 bits and the other does not."""
    x, scales, need = found[key], found.get(scale_key(key)), expected.get(key)
    if need is None or not isinstance(x, Tensor) or is_sharded(x) or x.shape != need.shape:
        return
    blocks = quant.layout(x.shape).scales
    if scales is not None and scale_key(key) not in expected:
        fits = isinstance(scales, Tensor) and scales.dtype == torch.float32
        if fits and x.dtype == torch.uint8 and tuple(scales.shape) == (blocks,):
            codes, scales = x.contiguous(), scales.contiguous()
            found[key] = ops.dequantize([Quantized(codes, scales, signed)])[0].to(need.dtype)
            del found[scale_key(key)]
    elif scales is None and scale_key(key) in expected and x.is_floating_point():
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        into = Quantized(codes, torch.empty(blocks, device=x.device), signed)
        ops.quantize_([x.float().contiguous()], [into])
        found[key], found[scale_key(key)] = into.codes, into.scales


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
            expected = whole_meta_state(item, chosen, active=True)
            entries = as_one_process(item, chosen, sent["state"][state[name]], expected)
            forms = forms_of(item, chosen)
            sent["state"][state[name]] = {
                key: forms[key].kept(x) if key in forms and _fits(x, expected.get(key)) else x
                for key, x in entries.items()
            }


def _as_saved(group: Group, saved: Group) -> Group:
    """A group with the format of its moments that a checkpoint has."""
    return {**group, **{k: v for k, v in saved.items() if k == "state_dtype"}}


def _fits(x: Any, expected: Tensor | None) -> bool:
    return isinstance(x, Tensor) and expected is not None and x.shape == expected.shape
