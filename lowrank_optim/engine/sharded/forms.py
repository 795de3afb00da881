"""The shapes that entries of a state have as DTensors, where these are not those of one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import init_state, moment_shapes
from lowrank_optim.ops import quant, quant4
from lowrank_optim.sharding.parts import Side
from lowrank_optim.stores import Block4Store, scale_key
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.matrix import MatrixView


class Form(NamedTuple):
    """How an entry of a state lies on the ranks: split, in blocks, or both.

    Ranks must not have parts of a block, and DTensor cuts a dimension at any index. So the n
    columns of what is kept in blocks become two dimensions, ``(ceil(n / unit), unit)``: shapes
    depend on the matrix and not on the number of ranks, which get whole blocks however many.
    """

    shape: tuple[int, ...]
    """Of all of it."""
    dim: int | None
    """The dimension that is split; None where every rank has all, or the parameter's places say."""
    block: int | None = None
    """The dimension of one process's entry that becomes two, the last block filled up."""
    fill: int = 0
    """What fills it up."""
    kind: str = "values"
    """``moments`` are stepped with what fills them up, ``values`` without; ``scales`` are flat."""

    def kept(self, x: Tensor) -> Tensor:
        """An entry of one process in this form, or one that is in it already."""
        return x if tuple(x.shape) == self.shape else self.blocked(x)

    def blocked(self, x: Tensor) -> Tensor:
        """An entry of one process, or a part of it that begins with a block."""
        if self.kind == "scales":
            shape = list(self.shape)
            if self.dim is not None:
                rest = math.prod(self.shape) // max(1, self.shape[self.dim])
                shape[self.dim] = x.numel() // max(1, rest)
            return x.reshape(shape)
        if self.block is None:
            return x
        unit, size = self.shape[self.block + 1], x.shape[self.block]
        if size % unit:
            x = F.pad(x, [0, 0] * (x.dim() - 1 - self.block) + [0, -size % unit], value=self.fill)
        blocks = -(-size // unit)
        return x.reshape(*x.shape[: self.block], blocks, unit, *x.shape[self.block + 1 :])

    def seen(self, x: Tensor, columns: int) -> Tensor:
        """A part as a step reads and writes it: a view, of ``columns`` columns if of values."""
        if self.kind == "scales":
            return x.view(-1)
        if self.block is None:
            return x
        size = x.shape[self.block] * x.shape[self.block + 1]
        flat = x.view(*x.shape[: self.block], size, *x.shape[self.block + 2 :])
        return flat if self.kind == "moments" else flat.narrow(self.block, 0, columns)


def forms_of(item: ParamPlan, chosen: Strategies) -> Mapping[str, Form]:
    """Of the entries that are split, or in blocks; all others are as one process has them."""
    part = item.part
    assert part is not None
    if part.side == "entries":
        own = whole_meta_state(item, chosen, active=True)
        if isinstance(chosen.store, Block4Store):  # rows of bytes, and of scales
            kept = [key for key in own if scale_key(key) in own]
            return {
                k: Form(tuple(own[k].shape), None) for key in kept for k in (key, scale_key(key))
            }
        blocks = quant.BLOCK
        return {
            scale_key(key): Form((*x.shape[:-1], -(-x.shape[-1] // blocks)), None, kind="scales")
            for key, x in own.items()
            if scale_key(key) in own
        }
    assert item.view is not None and item.subspace is not None
    return _forms(item.view, item.subspace, chosen, part.side, part.unit, item.param.dtype)


def kept_meta_state(item: ParamPlan, chosen: Strategies, active: bool | None = None) -> State:
    """The shapes that entries have as the optimizer keeps them, on all ranks together."""
    found = whole_meta_state(item, chosen, active)
    if item.part is None or not item.part.sharded:
        return found
    forms = forms_of(item, chosen)
    return {k: x.new_empty(forms[k].shape) if k in forms else x for k, x in found.items()}


def whole_meta_state(item: ParamPlan, chosen: Strategies, active: bool | None = None) -> State:
    """The shapes that they have on one process; formats are those of the parameter's placement."""
    like = torch.empty(item.param.shape, dtype=item.param.dtype, device="meta")
    if item.part is not None and item.part.side != "entries":
        item = replace(item, part=None)
    return init_state(item, chosen, like, active)


def split_dims(item: ParamPlan, chosen: Strategies) -> dict[str, tuple[int, int]]:
    """The dimension along which each entry of a state is split, and its size in all."""
    assert item.part is not None
    if item.part.side == "entries":
        return {}
    forms = forms_of(item, chosen)
    return {k: (f.dim, f.shape[f.dim]) for k, f in forms.items() if f.dim is not None}


Shape = tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _forms(
    view: MatrixView,
    subspace: Subspace,
    chosen: Strategies,
    side: Side,
    unit: int,
    dtype: torch.dtype,
) -> dict[str, Form]:
    """Found by what a state would be of one column, or one matrix, more."""
    # what depends on the whole stays as it is
    known = subspace if side == "batch" else subspace.of_columns(0, view.n, view.n)

    def shapes_of(own: MatrixView, of_values: bool = True) -> dict[str, Shape]:
        like = torch.empty(own.shape, dtype=dtype, device="meta")
        item = ParamPlan(like, "", 0, 0, own, known)
        kept = {k: tuple(x.shape) for k, x in init_state(item, chosen, like).items()}
        return {**kept, **moment_shapes(item, chosen)} if of_values else kept

    shapes, values = shapes_of(view, of_values=False), shapes_of(view)
    columns = _grown(values, shapes_of(view._replace(n=view.n + 1)))
    split = {} if side == "whole" else columns
    if side == "batch":
        split = _grown(values, shapes_of(view._replace(batch=(view.batch[0] + 1,))))
    signed = {slot.name: slot.signed for slot in chosen.rule.slots((view.m, view.n))}
    found: dict[str, Form] = {}
    for key, shape in shapes.items():
        if key in found:
            continue
        col, coded = columns.get(key), scale_key(key) in shapes
        block = col if unit > 1 else None
        in_bytes = coded and isinstance(chosen.store, Block4Store)
        if coded:
            own = shapes[scale_key(key)]
            found[scale_key(key)] = (
                Form(own, split.get(key))
                if in_bytes
                else _scales(shape, own, block, split.get(key))
            )
        if block is not None:
            size = unit // 2 if in_bytes else unit
            blocks = (*shape[:block], -(-shape[block] // size), size, *shape[block + 1 :])
            slot = key.split(".")[-1]
            zero = quant4.zero_byte if in_bytes else quant.zero_code
            fill = zero(signed[slot]) if coded else 0
            kind = "moments" if slot in signed else "values"
            found[key] = Form(blocks, split.get(key), block, fill, kind)
        elif key in split:
            found[key] = Form(shape, split[key])
    return found


def _scales(shape: Shape, own: Shape, block: int | None, split: int | None) -> Form:
    """Of a moment of ``shape``: as many as it has blocks, and split as they are."""
    if shape[-1] >= quant.BLOCK:
        return Form((*shape[:-1], -(-shape[-1] // quant.BLOCK)), split, kind="scales")
    # blocks hold whole rows: one rank has all of them
    return Form(
        (1, *own) if block is not None else own, None if split is None else 0, kind="scales"
    )


def _grown(shapes: Mapping[str, Shape], larger: Mapping[str, Shape]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, shape in shapes.items():
        for i, (a, b) in enumerate(zip(shape, larger[key], strict=True)):
            if a != b:
                found.setdefault(key, i)
    return found
