"""The op vocabulary: schemas, checks and fakes. What an op computes is in ``reference/``.

Every op takes parallel lists of tensors, mutates its outputs and returns nothing (column norms and
scores are the exception), so its fake has nothing to compute. ``define`` and ``impl`` cost 3.3 us a
call where ``custom_op`` costs 19.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops import written
from lowrank_optim.ops.dispatch import backend
from lowrank_optim.ops.tiles import FLAT, by_tiles

NAMESPACE = "lowrank_optim"
_BLOCKS = "int[] rows, int[] cols, int[] blocks"
_ROWS = "Tensor[] row_eps, Tensor[] row_scale, Tensor[] finite"
_APPLY = "Tensor(a!)[] params, Tensor[] grads"
_FACTORS = "Tensor[] steps, Tensor[] decays"

SCHEMAS = {
    "adamw_direction_": "(Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, "
    f"Tensor(c!)[] outs, float beta1, float beta2, float[] eps, {_ROWS}) -> ()",
    "lion_direction_": "(Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] outs, float beta1, "
    "float beta2, Tensor[] finite) -> ()",
    "moment_": "(Tensor[] xs, Tensor(a!)[] moments, Tensor(b!)[] outs, float decay, float weight, "
    "Tensor[] finite) -> ()",
    "adamw_direction_8bit_": "(Tensor[] grads, Tensor(a!)[] codes1, Tensor(b!)[] scales1, "
    "Tensor(c!)[] codes2, Tensor(d!)[] scales2, Tensor(e!)[] outs, Tensor signed_map, "
    f"Tensor unsigned_map, {_BLOCKS}, float beta1, float beta2, float[] eps, {_ROWS}) -> ()",
    "lion_direction_8bit_": "(Tensor[] grads, Tensor(a!)[] codes, Tensor(b!)[] scales, "
    f"Tensor(c!)[] outs, Tensor signed_map, {_BLOCKS}, float beta1, float beta2, Tensor[] finite) "
    "-> ()",
    "moment_8bit_": "(Tensor[] xs, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor(c!)[] outs, "
    f"Tensor signed_map, {_BLOCKS}, float decay, float weight, Tensor[] finite) -> ()",
    "quantize_blockwise_": "(Tensor[] xs, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor table, "
    f"{_BLOCKS}) -> ()",
    "dequantize_blockwise_": "(Tensor[] codes, Tensor[] scales, Tensor(a!)[] outs, Tensor table, "
    f"{_BLOCKS}) -> ()",
    "stochastic_round_": "(Tensor[] xs, Tensor(a!)[] outs, int[] seeds, int[] offsets, "
    "int[] widths, int[] row_strides, int[] column_strides) -> ()",
    "column_norms": "(Tensor[] xs) -> Tensor[]",
    "decay_": "(Tensor(a!)[] params, float decay, Tensor[] factors, Tensor[] finite) -> ()",
    "direction_add_": "(Tensor(a!)[] params, Tensor[] updates, float decay, float lr, "
    f"{_FACTORS}) -> ()",
    "addmm_": f"(Tensor(a!)[] params, Tensor[] lefts, Tensor[] rights, {_FACTORS}) -> ()",
    "count_": "(Tensor(a!)[] counts, Tensor[] finite) -> ()",
    "row_steps_": "(Tensor[] ages, Tensor(a!)[] eps_rows, Tensor(b!)[] scale_rows, float beta1, "
    "float beta2, float eps) -> ()",
    "residual_factors_": "(Tensor[] lows, Tensor[] directions, Tensor[] grads, Tensor(a!)[] norms, "
    "Tensor(b!)[] outs, float tiny, float share, float noise, float limiter, Tensor[] finite) "
    "-> ()",
    "row_dots_": "(Tensor[] xs, Tensor[] ys, Tensor(a!)[] outs) -> ()",
    "turn_rows_": "(Tensor[] xs, Tensor[] directions, Tensor[] lengths, Tensor[] across, "
    "Tensor(a!)[] outs, Tensor(b!)[] moves, float lr) -> ()",
    "step_rows_": "(Tensor[] xs, Tensor[] directions, Tensor(a!)[] outs, Tensor(b!)[] moves, "
    "float lr, float decay, bool ahead, Tensor[] decays) -> ()",
    "lift_add_scaled_": f"({_APPLY}, Tensor[] bases, Tensor[] updates, Tensor[] lows, "
    f"Tensor[] columns, float decay, float lr, float scale, Tensor[] finite, {_FACTORS}) -> ()",
    "lift_add_sign_": f"({_APPLY}, Tensor[] bases, Tensor[] updates, Tensor[] lows, float decay, "
    f"float lr, float scale, float gain, Tensor[] finite, {_FACTORS}, Tensor[] gains) -> ()",
    "coordinate_add_": f"({_APPLY}, Tensor[] indices, Tensor[] updates, float decay, float lr, "
    f"float scale, float gain, str free, Tensor[] finite, {_FACTORS}, Tensor[] gains) -> ()",
    "coordinate_adamw_": f"({_APPLY}, Tensor[] indices, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, float beta1, float beta2, float[] eps, float[] steps, "
    "float[] free_steps, float decay, str free) -> ()",
    "top_rows_": "(Tensor[] scores, Tensor(a!)[] indices, Tensor(b!)[] sources, "
    "Tensor(c!)[] finite, Tensor(d!)[] usable) -> ()",
    "move_rows_": "(Tensor(a!)[] xs, Tensor[] sources, int[] fills) -> ()",
    "cosine_scores": "(Tensor[] grads, Tensor[] plan, str basis, str ranking) -> Tensor[]",
    "cosine_project_": "(Tensor[] grads, Tensor[] indices, Tensor(a!)[] outs, Tensor[] plan, "
    "str basis) -> ()",
    "cosine_top_project_": "(Tensor[] grads, Tensor(a!)[] indices, Tensor(b!)[] sources, "
    "Tensor(c!)[] finite, Tensor(d!)[] usable, Tensor(e!)[] outs, Tensor[] plan, str basis, "
    "str ranking) -> ()",
    "cosine_lift_add_": "(Tensor(a!)[] params, Tensor[] indices, Tensor[] updates, Tensor[] plan, "
    "str basis, float decay, float[] steps, Tensor[] finite) -> ()",
    "cosine_adamw_": f"({_APPLY}, Tensor[] indices, Tensor[] sources, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, float beta1, float beta2, float[] eps, Tensor[] row_eps, "
    "Tensor[] row_scale, float[] steps, Tensor[] plan, str basis, float decay) -> ()",
}

PLAN = "plan"
"""What all matrices of a call share: not one a matrix."""


ROLES = {"codes": torch.uint8, "scales": torch.float32, "finite": torch.bool, "usable": torch.bool}
"""Dtype of the arguments whose names start so."""


ON_DEVICE = ("steps", "decays", "gains")
"""Optional lists of factors on the device, one a tensor, that come last: ``()``, in float32 or in
float64. Where they are, what serves takes them (:func:`~lowrank_optim.ops.dispatch.backend`)."""


IN_ARITHMETIC = ("columns", "lengths")
"""Small inputs that kernels read in the format of arithmetic: of float64 in float64 alone. Those of
:data:`ON_DEVICE` are read as they are."""


PACKED = {"stochastic_round_": ("xs",)}
"""Inputs that must be contiguous, as everything must that is written, but for parameters."""


class _Listed(NamedTuple):
    """What every call of an op must hold to of one of its lists of tensors."""

    place: int
    """Among the arguments."""
    name: str
    dtype: torch.dtype | None
    """That of all, if it is always the same."""
    packed: bool
    """Whether they must be contiguous."""


def _listed(op: Any, packed: frozenset[str]) -> list[_Listed]:
    """The lists of an op that are parallel."""
    return [
        _Listed(i, a.name, ROLES.get(a.name.rstrip("12")), a.name in packed)
        for i, a in enumerate(op._schema.arguments)
        if str(a.type) == "List[Tensor]" and a.name != PLAN
    ]


def _check(op: str, lists: Sequence[_Listed], values: Sequence[Any]) -> None:
    """Raise unless parallel lists are equally long, of their dtypes, and contiguous where written.

    Raises:
        ValueError: they are not.
    """
    count = len(values[0])
    for place, name, dtype, packed in lists:
        value = values[place]
        if not value:
            continue
        if len(value) != count:
            raise ValueError(f"{op}: {name} has {len(value)} tensors, not {count}")
        if dtype is not None and not all([x.dtype == dtype for x in value]):
            raise ValueError(f"{op}: {name} must be {dtype}")
        if name in ON_DEVICE and not all([_is_factor(x) for x in value]):
            found = next(f"{x.dtype} {tuple(x.shape)}" for x in value if not _is_factor(x))
            raise ValueError(f"{op}: {name} must be float32 or float64 (), got {found}")
        if name in IN_ARITHMETIC:
            wide = [torch.promote_types(x.dtype, torch.float32) for x in values[0]]
            if wide != [x.dtype for x in value]:
                raise ValueError(f"{op}: {name} must be {wide[0]}, got {value[0].dtype}")
        if packed and not all([x.is_contiguous() for x in value]):
            strides = [x.stride() for x in value if not x.is_contiguous()]
            raise ValueError(f"{op}: {name} must be contiguous, got strides {strides[0]}")


def _is_factor(x: Tensor) -> bool:
    return x.dim() == 0 and x.dtype in (torch.float32, torch.float64)


calls = SimpleNamespace()
"""The ops by name, as the package calls them: past the dispatcher, unless :func:`is_heard`."""


runs: dict[str, Callable[..., Any]] = {}
"""What the dispatcher runs for each: asked by a mode that watches what an op does in itself."""


def is_heard(like: Tensor) -> bool:
    """Whether something but the op itself has to see a call of it on tensors like this one.

    Modes (tracing, fake tensors, counting), subclasses, a profiler and autograd do. To pass four
    lists of tensors by the dispatcher costs a host more than to launch their kernel.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(like) not in _PLAIN
        or like.is_meta
        or torch.is_grad_enabled()
        or torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _shorter(op: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, or ``run`` with arguments in the types that the dispatcher would give them."""
    types = [str(a.type) for a in op._schema.arguments]
    scalars = [i for i, kind in enumerate(types) if kind == "float"]
    lists = [i for i, kind in enumerate(types) if kind.startswith("List")]

    def call(*args: Any) -> Any:
        if not args[0] or is_heard(args[0][0]):
            return op(*args)
        given = [*args]
        for i in scalars:
            given[i] = float(args[i])
        for i in lists:
            given[i] = [*args[i]]
        return run(*given)

    return call


def _define(name: str, schema: str) -> None:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    op = getattr(torch.ops.lowrank_optim, name).default
    arguments = [argument.name for argument in op._schema.arguments]
    changed = {a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write}
    packed = frozenset(changed - {"params"} | {*PACKED.get(name, ())})
    lists = _listed(op, packed)
    flat, in_8bit = name in FLAT, any(argument.startswith("codes") for argument in arguments)

    places = [i for i, argument in enumerate(arguments) if argument in changed]
    taken = [str(a.type) == "List[Tensor]" and a.name in ON_DEVICE for a in op._schema.arguments]
    plain = len(arguments) - sum(taken)

    def run(*args: Any) -> Any:
        _check(name, lists, args)
        if not args[0]:
            return [] if name in FOUND else None
        call = getattr(backend(args[0][0], in_8bit, any(args[plain:])), name)
        found = None
        writes = [args[i] for i in places if args[i] and not args[i][0].is_inference()]
        around = written.announce(writes)
        try:
            if flat and not all([x.is_contiguous() for x in args[0]]):
                by_tiles(call, arguments, args)
            else:
                found = call(*args)
            written.begin()  # of a kernel that did not say so
        finally:
            written.announce(around)
        return found

    def fake(*args: Any) -> Any:
        _check(name, lists, args)
        return [FOUND[name](x) for x in args[0]] if name in FOUND else None

    runs[name] = run
    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(qualified)(fake)
    setattr(calls, name, _shorter(op, run))


def _norms_like(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:-2], 1, x.shape[-1]), dtype=dtype)


def _scores_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


FOUND = {"column_norms": _norms_like, "cosine_scores": _scores_like}
"""Ops that return tensors, and how they look."""

for _name, _schema in SCHEMAS.items():
    _define(_name, _schema)
