"""The state of bitsandbytes' optimizers: its keys and blocks, without bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.checkpoints.form import Entries
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.groups import Group
from lowrank_optim.ops import quant
from lowrank_optim.ops.quant import Quantized
from lowrank_optim.rules import AdamW, Lion, Slot
from lowrank_optim.stores import Block8Store, Store, encoded, scale_key
from lowrank_optim.stores.base import State
from lowrank_optim.tensors.values import WIDE_COUNTER_MAX, check_counter, counter, readable

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where a state dict hides what FSDP must not gather; the optimizer's own state has it flat."""
ADEMAMIX: Group = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
"""Keys that every group of a two-moment optimizer has, for one that ours are not."""


class Flat(NamedTuple):
    """A moment in 8 bits whose blocks of 256 run over the flattened tensor."""

    codes: Tensor
    scales: Tensor
    signed: bool

    def values(self) -> Tensor:
        """In float32."""
        flat = Quantized(self.codes.reshape(-1), self.scales, self.signed)
        return ops.dequantize([flat])[0].view(self.codes.shape)


def unwrapped(entry: Mapping[str, Any]) -> Entries:
    """The state of one parameter as bitsandbytes' optimizer has it.

    Raises:
        ValueError: what it hides is no state.
    """
    inner = entry.get(WRAPPED, {})
    if not isinstance(inner, Mapping):
        raise ValueError(f"{WRAPPED} of a state must be a dict, got {type(inner).__name__}")
    return {k: v for k, v in entry.items() if k != WRAPPED} | dict(inner)


def without_defaults(group: Mapping[str, Any]) -> Group:
    """A group without AdEMAMix's keys; ``alpha`` alone is Fira's."""
    drop = ADEMAMIX if "t_alpha" in group else ()
    return {k: v for k, v in group.items() if k not in drop}


def rule_of(optimizer: PlannedOptimizer) -> type[AdamW] | type[Lion]:
    """The rule whose moments bitsandbytes keeps too.

    Raises:
        ValueError: it has no such optimizer.
    """
    for rule in (AdamW, Lion):
        if optimizer.rule_class is rule:
            return rule
    raise ValueError(
        f"{type(optimizer).__name__} has other moments than bitsandbytes' AdamW8bit and Lion8bit"
    )


def steps_of(name: str, entry: Mapping[str, Any]) -> float:
    """How many steps a saved state of another package has taken.

    Raises:
        ValueError: it does not say so.
    """
    if "step" not in entry:
        raise ValueError(f"the state of {name} has no step: it holds {sorted(entry) or 'nothing'}")
    given = readable(f"step of {name}", entry["step"])
    if given.numel() != 1:
        raise ValueError(f"step of {name} must be one number, got shape {tuple(given.shape)}")
    count = given.reshape(())
    check_counter({f"step of {name}": count}, f"step of {name}", most=WIDE_COUNTER_MAX)
    return float(count)


def dense(
    name: str,
    entry: Mapping[str, Any],
    rule: type[AdamW] | type[Lion],
    expected: Mapping[str, Tensor],
    store: Store,
) -> Entries:
    """The state of one dense parameter under our keys, in the formats of ``expected``.

    Raises:
        ValueError: it is not a state of that rule.
    """
    out: Entries = {"step": counter(steps_of(name, entry))}
    slots = rule().slots(())
    found = moments(name, entry, slots)
    for slot in slots:
        out |= stored(slot.name, found[slot.name], slot, expected, False, store)
    return out


def moments(name: str, entry: Mapping[str, Any], slots: Sequence[Slot]) -> dict[str, Tensor | Flat]:
    """The moments of one parameter by the names of our slots.

    Raises:
        ValueError: they are not those of a blockwise optimizer with as many moments.
    """
    found = [k for k in ("state1", "state2") if k in entry]
    if len(found) != len(slots):
        raise ValueError(
            f"the state of {name} has {found or 'no moments'}, not the {len(slots)} moments "
            f"{', '.join(slot.name for slot in slots)}"
        )
    return {slot.name: _moment(name, entry, n, slot) for n, slot in enumerate(slots, 1)}


def _moment(name: str, entry: Mapping[str, Any], n: int, slot: Slot) -> Tensor | Flat:
    codes, scales, table = (entry.get(f"{key}{n}") for key in ("state", "absmax", "qmap"))
    if not isinstance(codes, Tensor) or codes.dtype not in (torch.uint8, torch.float32):
        held = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"state{n} of {name} must be uint8 or float32, got {held}")
    codes = readable(f"state{n} of {name}", codes)
    if codes.dtype == torch.float32:
        return codes
    if not isinstance(scales, Tensor) or not isinstance(table, Tensor):
        raise ValueError(
            f"state{n} of {name} has no absmax{n} and qmap{n}: only blockwise 8-bit states are read"
        )
    scales, table = readable(f"absmax{n} of {name}", scales), readable(f"qmap{n} of {name}", table)
    blocks = -(-codes.numel() // quant.BLOCK)
    if scales.dtype != torch.float32 or tuple(scales.shape) != (blocks,):
        raise ValueError(
            f"absmax{n} of {name} is {scales.dtype} {tuple(scales.shape)}, not a float32 for each "
            f"of the {blocks} blocks of state{n}"
        )
    if not torch.equal(table, quant.dynamic_map(slot.signed, table.device)):
        kind = "signed" if slot.signed else "unsigned"
        raise ValueError(f"qmap{n} of {name} is not the {kind} dynamic map")
    return Flat(codes, scales, slot.signed)


def same_blocks(shape: Sequence[int]) -> bool:
    """Whether our blocks of a tensor are those of the flattened tensor."""
    rows, cols, block = quant.layout(shape)
    return block == quant.BLOCK and (rows <= 1 or cols % block == 0)


def stored(
    key: str,
    value: Tensor | Flat,
    slot: Slot,
    expected: Mapping[str, Tensor],
    flip: bool,
    store: Store,
) -> Entries:
    """A moment under our key, as the store behind ``expected`` keeps it.

    Args:
        key: of our state.
        value: theirs.
        slot: what it holds.
        expected: the state that the optimizer would make, for keys and formats.
        flip: their matrix is the transpose of ours.
        store: of the optimizer.
    """
    in_codes = scale_key(key) in expected
    same = in_codes and isinstance(store, Block8Store) and not flip
    if same and isinstance(value, Flat) and same_blocks(value.codes.shape):
        return {key: own_copy(value.codes), scale_key(key): own_copy(value.scales)}
    values = value.values() if isinstance(value, Flat) else value
    values = own_copy(values.mT if flip else values)
    return encoded(store, key, slot, values.float()) if in_codes else {key: values}


def written(n: int, state: State, slot: Slot, param: Tensor, store: Store) -> Entries:
    """Our moment of a dense parameter under their keys.

    What is in 8 bits here is so there, and the rest is float32: bitsandbytes goes by the dtype.
    """
    kept, scales = state[slot.name], state.get(scale_key(slot.name))
    if scales is None or not isinstance(store, Block8Store):
        values = store.read(state, slot.name, slot, param.shape, param, dense=True)
        assert isinstance(values, Tensor)
        return {f"state{n}": own_copy(values.float())}
    if not same_blocks(kept.shape):
        values = ops.dequantize([Quantized(kept, scales, slot.signed)])[0].reshape(-1)
        flat = Quantized(
            torch.empty_like(values, dtype=torch.uint8),
            values.new_empty(quant.layout(values.shape).scales),
            slot.signed,
        )
        ops.quantize_([values], [flat])
        kept, scales = flat.codes.view(kept.shape), flat.scales
    table = quant.dynamic_map(slot.signed, kept.device)
    out = {f"state{n}": kept, f"qmap{n}": table, f"absmax{n}": scales}
    return {k: own_copy(v) for k, v in out.items()}


def own_copy(x: Tensor) -> Tensor:
    """A contiguous copy: what is loaded may be a view that keeps a whole singular factor alive."""
    return x.detach().clone(memory_format=torch.contiguous_format)
