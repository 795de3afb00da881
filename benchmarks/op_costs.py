"""What a call of each op of the package launches on an accelerator, and moves and computes there.

The one table of these figures: the model of a step (:mod:`benchmarks.counting`), the floors of
``python -m benchmarks.kernels`` and the watch of the tests all read it. A test runs the launchers
of ``lowrank_optim/ops/triton`` and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lowrank_optim
from lowrank_optim.ops.cosine import SPAN, at_once, tile_width, whole_at_once
from lowrank_optim.ops.schema import PLAN
from lowrank_optim.ops.stacked import in_lines, is_words
from lowrank_optim.ops.tiles import FLAT, tile_elements

PACKAGE = lowrank_optim.__name__
MATRIX, SCALAR = "matrix", "scalar"
"""Units that do the arithmetic of a kernel: those of 16-bit products, or those of float32."""
Arguments = Mapping[str, Any]
"""Of a call, by the names of the schema."""


class Kernel(NamedTuple):
    """One call on the device."""

    op: str
    launches: int
    bytes: int
    """Read and written."""
    flops: int = 0
    """Of products, of transforms and of the package's ops; of other torch ops none are counted."""
    unit: str = SCALAR


def size(x: Tensor) -> int:
    """Bytes of a tensor that lie in memory: dimensions that are expanded count once."""
    return x.element_size() * math.prod(
        n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0
    )


def tensors(value: Any) -> list[Tensor]:
    """All of arguments or results, in lists too."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def sizes(of: Sequence[Tensor]) -> int:
    """Bytes of each once, however often it is named."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x
            for x in of}  # fmt: skip
    return sum(map(size, seen.values()))


# ---------------------------------------------------------------- floors


class Floor(NamedTuple):
    """What an op costs at least: docs/kernels.md has the formulas."""

    bytes: int
    flops: int


EACH = {
    "adamw_direction_": 10, "lion_direction_": 6, "moment_": 3, "adamw_direction_8bit_": 10,
    "lion_direction_8bit_": 6, "moment_8bit_": 6, "dequantize_blockwise_": 1, "column_norms": 2,
    "decay_": 1, "direction_add_": 3, "residual_factors_": 9, "row_dots_": 2, "turn_rows_": 8,
    "step_rows_": 5,
}  # fmt: skip
"""Flops an element of the first argument; searches and exponentials are not flops."""
OUTPUTS = {
    "quantize_blockwise_": ("codes", "scales"), "top_rows_": ("sources", "finite", "usable"),
    "row_steps_": ("eps_rows", "scale_rows"), "turn_rows_": ("moves",),
    "step_rows_": ("moves",),
}  # fmt: skip
"""What is written and not read, besides ``outs``."""


def floor(name: str, given: Arguments) -> Floor:
    """Bytes and flops of a call of ``lowrank_optim::name``, arguments by name."""
    if name.startswith("cosine_"):
        return _cosine_floor(name, given)
    read = {k: v for k, v in given.items() if k != "outs" and k not in OUTPUTS.get(name, ())}
    total = sum(sizes(tensors(x)) for x in read.values())
    total += sum(sizes(tensors(given[k])) for k in written(name))
    first: list[Tensor] = next(iter(given.values()))
    flops = sum(EACH.get(name, 0) * x.numel() for x in first)
    if name == "column_norms":
        total += sum(4 * x.numel() // max(1, x.shape[-2]) for x in first)
    elif name == "top_rows_":
        flops = sum(31 * x.numel() for x in first)
    elif name == "addmm_":
        pairs = zip(first, given["lefts"], strict=True)
        flops = sum(2 * w.numel() * p.shape[-1] for w, p in pairs)
    elif name.startswith("lift_add"):
        products = 2 if name == "lift_add_sign_" else 1
        flops = sum(w.numel() * (2 * products * p.shape[-1] + 6) for w, p in
                    zip(first, given["bases"], strict=True))  # fmt: skip
    elif name.startswith("coordinate_"):
        rows = given["updates" if name == "coordinate_add_" else "exp_avgs"]
        flops = sum(4 * w.numel() for w in first)
        if name == "coordinate_adamw_":
            flops += sum(10 * x.numel() for x in rows)
        else:  # rows in the set take nothing of G
            grads = given["grads"]
            unread = sum(x.numel() * g.element_size() for x, g in zip(rows, grads, strict=True))
            total -= sizes(grads) if given["free"] == "none" else unread
    return Floor(total, flops)


def written(name: str) -> list[str]:
    """Arguments that an op of the package writes."""
    schema = getattr(getattr(torch.ops, PACKAGE), name).default._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


def _cosine_floor(name: str, given: Arguments) -> Floor:
    first: list[Tensor] = next(iter(given.values()))
    total = sum(sizes([x]) for x in first)  # W, or G where there is no W
    flops = sum(2.5 * x.numel() * math.log2(max(2, x.shape[0])) for x in first)
    if name == "cosine_project_":
        total += sizes(given["outs"])
    elif name == "cosine_top_project_":
        changed = ("indices", "sources", "finite", "usable", "outs")
        total += sizes(given["indices"]) + sum(sizes(given[k]) for k in changed)
    elif name == "cosine_lift_add_":
        total += sizes(first) + sizes(given["updates"])
    elif name == "cosine_adamw_":
        total += sizes(first) + sizes(given["grads"])
        total += 2 * (sizes(given["exp_avgs"]) + sizes(given["exp_avg_sqs"]))
        flops = 2 * flops + 10 * sum(x.numel() for x in given["exp_avgs"])
    return Floor(total, round(flops))


# ---------------------------------------------------------------- launches

EXACT = frozenset({
    "column_norms", "coordinate_add_", "top_rows_", "row_dots_", "turn_rows_", "step_rows_",
})  # fmt: skip
"""Code that is compiled for shapes and strides: a list of these is one launch for each."""
LIFTS = frozenset({"lift_add_scaled_", "lift_add_sign_"})
"""Products: one launch a matrix."""
COMPOSED = {"coordinate_adamw_": 17}
"""Kernels of what plain torch serves, for one matrix of one tile and ``free="sign"``.

No accelerator asks for it.
"""


def package_kernels(name: str, given: Arguments) -> list[Kernel]:
    """What Triton's backend launches for a call."""
    if name in COSINES:
        return COSINES[name](given)
    least = floor(name, given)
    first: list[Tensor] = next(iter(given.values()))
    full = [i for i, x in enumerate(first) if x.numel()]
    if name in COMPOSED:  # each of its kernels passes over what it works on
        count = COMPOSED[name]
        return [Kernel(name, count * len(full), count * least.bytes, least.flops)]
    if name in LIFTS:
        half = bool(given["bases"]) and given["bases"][0].dtype == torch.bfloat16
        lift = Kernel(name, len(full), least.bytes, least.flops, MATRIX if half else SCALAR)
        return [*_ready(name, given, full), lift] if half else [lift]
    if name == "addmm_":
        half = first[0].element_size() == 2
        loose = [first[i] for i in full if not in_lines(first[i])]
        product = Kernel(name, len(full), least.bytes, least.flops, MATRIX if half else SCALAR)
        return [*_there_and_back(loose), product]
    if name == "move_rows_":
        return [Kernel(name, len({_moved_as(first[i]) for i in full}), least.bytes)]
    if name == "decay_":
        return _decay(given, full, least)
    if name == "direction_add_":
        return _direction_add(given, full, least)
    count, gathered = 0, []
    if name in FLAT:  # a gradient of other strides is gathered a tile at a time
        for x in (first[i] for i in full if not first[i].is_contiguous()):
            tiles = -(-x.numel() // tile_elements(x))
            gathered.append(Kernel("gather", tiles, 2 * size(x)))
            count += tiles
        full = [i for i in full if first[i].is_contiguous()]
    count += len(_alike(given, full, exact=name in EXACT))
    return [*gathered, Kernel(name, count, least.bytes, least.flops)]


def _ready(name: str, given: Arguments, at: Sequence[int]) -> list[Kernel]:
    """What a lift in bfloat16 makes of its right operands before it: one of both, or casts."""
    pairs = [(given["updates"][i], given["lows"][i]) for i in at]
    read = sum(size(x) for pair in pairs for x in pair)
    made = sum(2 * x.numel() for pair in pairs for x in pair)
    if name == "lift_add_sign_":
        return [Kernel("cast", 2 * len(at), read + made)]
    return [Kernel("lift_term", len(at), read + made // 2)]


def _alike(given: Arguments, at: Sequence[int], *, exact: bool) -> list[list[int]]:
    """Positions that share a launch: of the same dtypes and blocks, or shapes and strides too."""
    lists = [x for k, x in given.items() if k != PLAN and isinstance(x, list) and x]
    lists = [x for x in lists if isinstance(x[0], Tensor)]
    found: dict[Any, list[int]] = {}
    for i in at:
        key: list[Any] = [x[i].dtype for x in lists]
        if "blocks" in given:  # masked to the next power of two, or whole blocks of a power of two
            cols, block = given["cols"][i], given["blocks"][i]
            whole = cols % block == 0 and block & (block - 1) == 0
            key += [(block - 1).bit_length(), whole]
        if exact:
            key += [(x[i].shape, x[i].stride()) for x in lists]
        found.setdefault(tuple(key), []).append(i)
    return [*found.values()]


def _moved_as(x: Tensor) -> tuple[int, bool]:
    """What rows ``(r, k)`` that move in one launch share: how many, and words or bytes."""
    return x.shape[0], is_words(x, x.shape[1])


def _decay(given: Arguments, full: Sequence[int], least: Floor) -> list[Kernel]:
    """One launch for all that is dense; others go one by one, by a copy."""
    params = given["params"]
    loose = [i for i in full if not in_lines(params[i])]
    groups = _alike(given, [i for i in full if i not in loose], exact=False)
    own = Kernel("decay_", len(groups) + len(loose), least.bytes, least.flops)
    return [*_there_and_back([params[i] for i in loose]), own]


def _direction_add(given: Arguments, full: Sequence[int], least: Floor) -> list[Kernel]:
    """One launch for all that lies in memory by rows; others go one by one, by a copy."""
    loose = [i for i in full if not given["params"][i].is_contiguous()]
    groups = _alike(given, [i for i in full if i not in loose], exact=False)
    turned = [x for x in (given["updates"][i] for i in full) if not x.is_contiguous()]
    gathered = [Kernel("gather", 1, 2 * size(x)) for x in turned]
    own = Kernel("direction_add_", len(groups) + len(loose), least.bytes, least.flops)
    return [*_there_and_back([given["params"][i] for i in loose]), *gathered, own]


def _there_and_back(weights: Sequence[Tensor]) -> list[Kernel]:
    """Copies of weights that have gaps in memory, and back."""
    return [Kernel("gather", 2, 4 * size(w)) for w in weights]


FFT = 8.0
"""Bytes an element of a transform of float32: it reads all and writes half a complex spectrum, in
one pass if all stages of a column fit a multiprocessor, as they do up to some thousand rows."""


class _Passes:
    """Kernels over all columns of alike matrices ``(m, n)``, as many at once as a tile holds."""

    def __init__(self, xs: Sequence[Tensor], together: int = 0) -> None:
        (m, n), count = xs[0].shape, len(xs)
        self.elements = m * n * count
        self.calls = -(-count // (together or at_once(m, n, True)))
        self.tiles = self.calls * -(-n // tile_width(m, True))
        self.work = round(2.5 * self.elements * math.log2(max(2, m)))

    def each(self, op: str, share: float) -> Kernel:
        """One of them, by its bytes an element."""
        flops = self.work if "fft" in op else 0
        return Kernel(op, self.tiles, round(share * self.elements), flops)

    def transform(self) -> Kernel:
        """Reals to half a spectrum."""
        return self.each("fft_r2c", FFT)


def _groups(given: Arguments, *names: str) -> list[list[int]]:
    first = given[names[0]]
    own = {k: given[k] for k in names}
    return _alike(own, [i for i, x in enumerate(first) if x.numel()], exact=True)


def _scores(given: Arguments) -> list[Kernel]:
    found = []
    for at in _groups(given, "grads"):
        own = [given["grads"][i] for i in at]
        found += _scored(own, _Passes(own), 1)
    return found


def _scored(xs: Sequence[Tensor], passes: _Passes, sums: int) -> list[Kernel]:
    x, each = xs[0], 4 * passes.elements // SPAN + 4 * len(xs) * xs[0].shape[0]
    return [
        passes.each("cosine_fold", x.element_size() + 4),
        passes.transform(),
        passes.each("cosine_score", 4 + 4 / SPAN),
        Kernel("sum", sums, each),
    ]


def _picked(passes: _Passes, x: Tensor, out: Tensor) -> Kernel:
    return passes.each("cosine_pick", 2 * out.element_size() * out.shape[0] / x.shape[0])


CHOSEN = ("grads", "indices", "sources", "finite", "usable", "outs")


def _top_project(given: Arguments) -> list[Kernel]:
    """One transform for both, but of what is too large to be kept whole."""
    found: list[Kernel] = []
    for at in _groups(given, *CHOSEN):
        own: Arguments = {k: [given[k][i] for i in at] for k in CHOSEN}
        (x, *_), (out, *_) = own["grads"], own["outs"]
        count = whole_at_once(*x.shape, True)
        scores = [g.new_empty(g.shape[0], dtype=torch.float32) for g in own["grads"]]
        top = floor("top_rows_", {"scores": scores, **{k: own[k] for k in CHOSEN[1:5]}})
        if count:
            passes = _Passes(own["grads"], count)
            found += [*_scored(own["grads"], passes, passes.calls), _picked(passes, x, out)]
            found.append(Kernel("top_rows_", passes.calls, *top))
        else:
            found += [*_scores(own), Kernel("top_rows_", 1, *top), *_project(own)]
    return found


def _project(given: Arguments) -> list[Kernel]:
    found = []
    for at in _groups(given, "outs", "grads", "indices"):
        x, out = given["grads"][at[0]], given["outs"][at[0]]
        passes = _Passes([given["grads"][i] for i in at])
        folded = passes.each("cosine_fold", x.element_size() + 4)
        found += [folded, passes.transform(), _picked(passes, x, out)]
    return found


def _lift(given: Arguments) -> list[Kernel]:
    found = []
    for at in _groups(given, "params", "indices", "updates"):
        w, low = given["params"][at[0]], given["updates"][at[0]]
        passes = _Passes([given["params"][i] for i in at])
        places = Kernel("cosine_place", 1, 4 * len(at) * (w.shape[0] + low.shape[0]))
        placed = passes.each("cosine_fold", low.element_size() * low.shape[0] / w.shape[0] + 4)
        added = passes.each("cosine_add", 4 + 2 * w.element_size())
        found += [places, placed, passes.transform(), added]
    return found


MOVES = 12
"""Kernels that move the rows of both moments of a matrix."""


def _adamw(given: Arguments) -> list[Kernel]:
    """The three in turn; an accelerator never asks for it."""
    rows = given["exp_avgs"]
    direction = {"grads": rows, **{k: given[k] for k in ("exp_avgs", "exp_avg_sqs")}, "outs": rows}
    direction |= {"row_eps": given["row_eps"], "row_scale": given["row_scale"], "finite": []}
    moved = [
        Kernel("rows", MOVES, 4 * size(rows[i])) for i in range(len(given["sources"]))
    ]  # fmt: skip
    return [
        *moved,
        *_project({**given, "outs": rows}),
        *package_kernels("adamw_direction_", direction),
        *_lift({**given, "updates": rows}),
    ]


COSINES: dict[str, Callable[[Arguments], list[Kernel]]] = {
    "cosine_scores": _scores,
    "cosine_project_": _project,
    "cosine_top_project_": _top_project,
    "cosine_lift_add_": _lift,
    "cosine_adamw_": _adamw,
}
