"""Arguments for every op, and what they become by straight-line float64 code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import schema as _schema  # noqa: F401  (defines the ops)
from lowrank_optim.ops.quant import dynamic_map, layout

Arguments = dict[str, Any]
Expected = dict[str, list[tuple[Tensor, Tensor | None]]]
"""By argument: values in float64, and where they are meant (None: everywhere)."""

BETA1, BETA2, DECAY, LR, SCALE, GAIN = 0.9, 0.99, 0.98, 0.1, 0.25, 0.5
# empty; one element; below and above a vector of 16; tails of a row, of a block, and none
FLAT = [(0,), (1,), (17,), (5, 1, 67), (3, 300), (2, 512), (2, 3, 40)]
MATRICES = [(1, 1), (17, 33), (70, 35), (2, 9, 14)]
ELEMENTWISE = ["adamw_direction_", "lion_direction_", "moment_"]
BITS8 = [f"{name}8bit_" for name in ELEMENTWISE]
FACTORS = ("steps", "decays", "gains")
"""Optional factors of numbers of the host, on the device."""
APPLIES = ["lift_add_scaled_", "lift_add_sign_", "coordinate_add_"]


def names(op: str) -> list[str]:
    """The arguments of an op, in order."""
    return [a.name for a in getattr(torch.ops.lowrank_optim, op).default._schema.arguments]


def call(op: str, arguments: Arguments) -> list[Tensor] | None:
    """Through the dispatcher of torch."""
    result: list[Tensor] | None = getattr(torch.ops.lowrank_optim, op)(
        *(arguments[name] for name in names(op))
    )
    return result


def on(device: str, arguments: Arguments) -> Arguments:
    """The same arguments on a device; also a deep copy that keeps the order of dimensions."""

    def move(x: Any) -> Any:
        if isinstance(x, list):
            return [move(y) for y in x]
        return x.to(device, copy=True) if isinstance(x, Tensor) else x

    return {name: move(x) for name, x in arguments.items()}


def strided(x: Tensor, how: str) -> Tensor:
    """``x`` stored by rows, by columns, or as every other column of a wider tensor."""
    if how == "columns" and x.dim() > 1:
        return x.mT.contiguous().mT
    if how == "slice" and x.dim():
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:-1])


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales: of the entries on both sides the nearer, and of two as near the lower."""
    rows, cols, block = layout(x.shape)
    table, codes, scales = dynamic_map(signed, x.device).double(), [], []
    for row in x.double().reshape(rows, cols) if x.numel() else []:
        for piece in row.split(block):
            top = piece.abs().max()
            unit = piece / top if top > 0 else piece
            above = torch.searchsorted(table, unit).clamp(1, len(table) - 1)
            nearer = table[above] - unit < unit - table[above - 1]
            codes.append((above - 1 + nearer).to(torch.uint8))
            scales.append(top.float())
    if not codes:
        return x.new_zeros(x.shape, dtype=torch.uint8), x.new_zeros(0, dtype=torch.float32)
    return torch.cat(codes).reshape(x.shape), torch.stack(scales)


def per_element(scales: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of each element's block, in float64."""
    rows, cols, block = layout(shape)
    each = -(-cols // block) if cols else 0
    wide = scales.double().reshape(rows, each).repeat_interleave(block, 1)[:, :cols]
    return wide.reshape(tuple(shape))


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """``map[code] scale`` in float64."""
    table = dynamic_map(signed, codes.device).double()
    return table[codes.long()] * per_element(scales, codes.shape)


# ---------------------------------------------------------------- arguments


def elementwise(
    op: str,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, ...]] = FLAT,
    how: str = "rows",
    by_row: bool = False,
    unsound: int | None = None,
    magnitude: float = 1.0,
) -> Arguments:
    """Gradients, moments and outputs full of NaN; gradient ``unsound`` is NaN and said to be."""
    wide = _wide(dtype)
    xs = [strided((magnitude * torch.randn(s, dtype=wide)).to(dtype), how) for s in shapes]
    first = [magnitude * torch.randn(s, dtype=wide) for s in shapes]
    second = [(magnitude * torch.rand(s, dtype=wide)) ** 2 for s in shapes]
    found: Arguments = {
        "outs": [torch.full(s, torch.nan, dtype=dtype) for s in shapes],
        "beta1": BETA1,
        "beta2": BETA2,
        "decay": DECAY,
        "weight": 0.5,
        "eps": [10.0 ** -(3 + i) * magnitude for i in range(len(shapes))],
        "row_eps": [],
        "row_scale": [],
        "finite": [],
    }
    if by_row:
        found["row_eps"] = [magnitude * (torch.rand(_rows(s)).to(wide) + 0.1) for s in shapes]
        found["row_scale"] = [torch.rand(_rows(s)).to(wide) for s in shapes]
    if unsound is not None:
        xs[unsound] = torch.full_like(xs[unsound], torch.nan)
        found["finite"] = [torch.tensor(i != unsound) for i in range(len(shapes))]
    found["grads"] = found["xs"] = xs
    found["exp_avgs"] = found["moments"] = first
    found["exp_avg_sqs"] = second
    if "8bit" in op:
        pairs = [encode(x, True) for x in first]
        found["codes"] = found["codes1"] = [c for c, _ in pairs]
        found["scales"] = found["scales1"] = [s for _, s in pairs]
        pairs = [encode(x, False) for x in second]
        found["codes2"], found["scales2"] = [c for c, _ in pairs], [s for _, s in pairs]
        _layouts(found, shapes)
    return {name: found[name] for name in names(op)}


def _layouts(found: Arguments, shapes: Sequence[tuple[int, ...]], signed: bool = True) -> None:
    cpu = torch.device("cpu")
    found["rows"], found["cols"], found["blocks"] = map(
        list, zip(*map(layout, shapes), strict=True)
    )
    found["signed_map"], found["unsigned_map"] = dynamic_map(True, cpu), dynamic_map(False, cpu)
    found["table"] = dynamic_map(signed, cpu)


def storage(
    op: str,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, ...]] = FLAT,
    signed: bool = True,
    how: str = "rows",
    magnitude: float = 1.0,
) -> Arguments:
    """Of quantise, dequantise and the rounding into bfloat16."""
    xs = [(magnitude * torch.randn(s)).to(dtype) for s in shapes]
    if not signed:
        xs = [x.abs() for x in xs]
    pairs = [encode(x.float(), signed) for x in xs]
    if op == "quantize_blockwise_":  # outputs say when they are not written
        pairs = [(torch.full_like(c, 77), torch.full_like(s, torch.nan)) for c, s in pairs]
    out = torch.bfloat16 if op == "stochastic_round_" else dtype

    def each(*values: int) -> list[int]:
        return [values[i % len(values)] for i in range(len(shapes))]

    found: Arguments = {
        "xs": [strided(x, how) for x in xs],
        "codes": [c for c, _ in pairs],
        "scales": [s for _, s in pairs],
        "outs": [torch.full(s, torch.nan, dtype=out) for s in shapes],
        "seeds": each(3, 0, 2**31 - 1, 5, 12345, 7, 1),
        "offsets": each(0, 17, 2**32 - 1, 1, 2, 3, 4),
        "widths": each(3, 1, 2000, 7, 33, 2**33, 5),
        "row_strides": each(5, 2**32 - 1, 4096, 70, 40, 3, 7),
        "column_strides": each(1, 1, 3, 2, 2**31, 1, 64),
    }
    _layouts(found, shapes, signed)
    return {name: found[name] for name in names(op)}


def matrices(
    op: str,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, ...]] = MATRICES,
    how: str = "rows",
    free: str = "sign",
    unsound: int | None = None,
    magnitude: float = 1.0,
    factors: Sequence[str] = (),
) -> Arguments:
    """Weights, gradients, a basis of a quarter of the rank, and coordinates of half the rows.

    Gradient ``unsound`` is NaN, and so is what is computed from it, and said to be. ``factors``
    names those of :data:`FACTORS` that there are; those of each matrix its own.
    """
    wide = _wide(dtype)
    found: Arguments = {
        "decay": DECAY,
        "lr": LR,
        "scale": SCALE,
        "gain": GAIN,
        "free": free,
        "finite": [],
        "params": [strided(torch.randn(s, dtype=wide).to(dtype), how) for s in shapes],
        "grads": [strided((magnitude * torch.randn(s)).to(dtype), how) for s in shapes],
    }
    found["xs"] = found["grads"]
    for name in ("bases", "updates", "lows", "columns", "indices"):
        found[name] = []
    for *batch, m, n in shapes:
        r = max(1, min(m, n) // 4)
        if op == "coordinate_add_":
            r = (m + 1) // 2
            picks = torch.rand(*batch, m).argsort(-1)[..., :r].sort(-1).values
            found["indices"].append(picks.int())
        basis = torch.randn(*batch, m, r, dtype=wide) / max(1, m) ** 0.5
        found["bases"].append(basis.to(dtype))
        found["updates"].append(torch.randn(*batch, r, n, dtype=wide))
        found["lows"].append(magnitude * torch.randn(*batch, r, n, dtype=wide))
        found["columns"].append(torch.rand(*batch, 1, n, dtype=wide))
    if unsound is not None:
        found["finite"] = [torch.tensor(i != unsound) for i in range(len(shapes))]
        for name in ("grads", "updates", "lows", "columns"):
            found[name][unsound].fill_(torch.nan)
    for name in FACTORS:
        given = [torch.tensor(0.5 + (i + 1) / 7, dtype=wide) for i in range(len(shapes))]
        found[name] = given if name in factors else []
    found["gains"] = found["gains"][::-1]
    return {name: found[name] for name in names(op)}


def coordinate_steps(
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, ...]] = MATRICES,
    how: str = "rows",
    free: str = "sign",
) -> Arguments:
    """Half of the rows by AdamW in mid-run; factors of each matrix its own."""
    a = matrices("coordinate_add_", dtype, shapes=shapes, how=how, free=free)
    count = len(shapes)
    a["exp_avgs"] = [0.1 * x for x in a["updates"]]
    a["exp_avg_sqs"] = [x.square() for x in a["updates"]]
    a["beta1"], a["beta2"] = BETA1, BETA2
    a["eps"] = [1e-3 * (i + 1) for i in range(count)]
    a["steps"] = [LR / (i + 1) for i in range(count)]
    a["free_steps"] = [LR * GAIN / (i + 2) for i in range(count)]
    return {name: a[name] for name in names("coordinate_adamw_")}


def example(op: str) -> Arguments:
    """One call of any op in float32."""
    from tests.ops import ops_cosines, ops_factors  # which are made of what is above

    if op in ops_factors.OPS:
        return ops_factors.arguments(op, torch.float32)
    if op in ELEMENTWISE + BITS8:
        return elementwise(op, torch.float32, by_row="adamw" in op, unsound=4)
    if op in (*APPLIES, "column_norms"):
        return matrices(op, torch.float32, unsound=None if op == "column_norms" else 1)
    if op == "coordinate_adamw_":
        return coordinate_steps(torch.float32)
    if op == "top_rows_":
        return ops_cosines.told(torch.float32)
    if op == "move_rows_":
        return ops_cosines.moves()
    if op in ops_cosines.COSINES:
        return ops_cosines.arguments(op, torch.float32)
    return storage(op, torch.float32)


# ---------------------------------------------------------------- what they become


def expected(op: str, a: Arguments) -> Expected:
    """Every output, computed one tensor at a time in float64."""
    from tests.ops import ops_cosines, ops_factors

    if op in ops_factors.OPS:
        return ops_factors.expected(op, a)
    if op == "top_rows_":
        return ops_cosines.expected_top(a)
    if op == "move_rows_":
        return ops_cosines.expected_moves(a)
    if op in ops_cosines.COSINES:
        return ops_cosines.expected(op, a)
    if op in ELEMENTWISE + BITS8:
        return _directions(op, a)
    if op == "column_norms":
        return {"": [(x.double().square().sum(-2, keepdim=True).sqrt(), None) for x in a["xs"]]}
    if op == "dequantize_blockwise_":
        signed = bool(a["table"][0] < 0)
        pairs = zip(a["codes"], a["scales"], strict=True)
        return {"outs": [(decode(c, s, signed), None) for c, s in pairs]}
    if op == "coordinate_adamw_":
        return _coordinate_steps(a)
    if op == "coordinate_add_":
        return {"params": _where_sound(a, [(x, None) for x in _coordinates(a)])}
    found: list[tuple[Tensor, Tensor | None]] = []
    for i, (w, g, p, n, r) in enumerate(
        zip(*(a[k] for k in ("params", "grads", "bases", "updates", "lows")), strict=True)
    ):
        lr, decay, gain = _numbers(a, i)
        if op == "lift_add_sign_":
            outside = g.double() - p.double() @ r.double()
            slack = {torch.float64: 1e-12, torch.float32: 1e-5}.get(w.dtype, 2**-4)
            size = p.double().abs() @ r.double().abs()
            firm = outside.abs() > slack * (g.double().abs() + size)
            step = SCALE * (p.double() @ n.double()) + gain * outside.sign()
            found.append((decay * w.double() - lr * step, firm))
        else:
            c = a["columns"][i].double()
            low = SCALE * (n.double() - r.double() * c)
            found.append((decay * w.double() - lr * (p.double() @ low + g.double() * c), None))
    return {"params": _where_sound(a, found)}


def _where_sound(
    a: Arguments, found: list[tuple[Tensor, Tensor | None]]
) -> list[tuple[Tensor, Tensor | None]]:
    finite = a["finite"] or [True] * len(found)
    old = [(w.double(), None) for w in a["params"]]
    return [new if ok else kept for ok, new, kept in zip(finite, found, old, strict=True)]


def _numbers(a: Arguments, i: int) -> tuple[float, float, float]:
    """Step size, decay and gain of a matrix."""
    step, decay, gain = (float(a[name][i]) if a.get(name) else 1.0 for name in FACTORS)
    return LR * step, DECAY * decay, GAIN * gain


def _coordinates(a: Arguments) -> list[Tensor]:
    free = {"sign": torch.sign, "sgd": torch.clone, "none": torch.zeros_like}[a["free"]]
    found = []
    lists = zip(a["params"], a["grads"], a["indices"], a["updates"], strict=True)
    for i, (w, g, index, n) in enumerate(lists):
        lr, decay, gain = _numbers(a, i)
        new = decay * w.double() - lr * gain * free(g.double())
        batch = [(new, w, index, n)] if w.dim() == 2 else zip(new, w, index, n, strict=True)
        for new2, w2, k2, n2 in batch:
            for j, row in enumerate(k2.tolist()):
                new2[row] = decay * w2[row].double() - lr * SCALE * n2[j].double()
        found.append(new)
    return found


def _coordinate_steps(a: Arguments) -> Expected:
    free = {"sign": torch.sign, "sgd": torch.clone, "none": torch.zeros_like}[a["free"]]
    found: Expected = {"params": [], "exp_avgs": [], "exp_avg_sqs": []}
    for i, (w, g, index) in enumerate(zip(a["params"], a["grads"], a["indices"], strict=True)):
        picked = torch.zeros(w.shape[:-1], dtype=torch.bool, device=w.device)
        picked.scatter_(-1, index.long(), True)
        shape = a["exp_avgs"][i].shape
        own = g.double()[picked].view(shape)
        m = BETA1 * a["exp_avgs"][i].double() + (1 - BETA1) * own
        v = BETA2 * a["exp_avg_sqs"][i].double() + (1 - BETA2) * own.square()
        new = DECAY * w.double() - a["free_steps"][i] * free(g.double())
        direction = m / (v.sqrt() + a["eps"][i])
        moved = DECAY * w.double()[picked].view(shape) - a["steps"][i] * direction
        new[picked] = moved.flatten(0, -2)
        for name, x in (("params", new), ("exp_avgs", m), ("exp_avg_sqs", v)):
            found[name].append((x, None))
    return found


def _moments(a: Arguments, i: int) -> tuple[Tensor, Tensor | None]:
    codes = a.get("codes1", a.get("codes"))
    if codes is not None:
        m = decode(codes[i], a.get("scales1", a.get("scales"))[i], True)
        return m, decode(a["codes2"][i], a["scales2"][i], False) if "codes2" in a else None
    m = a.get("exp_avgs", a.get("moments"))[i].double()
    return m, a["exp_avg_sqs"][i].double() if "exp_avg_sqs" in a else None


def _directions(op: str, a: Arguments) -> Expected:
    found: Expected = {"outs": [], "first": [], "second": []}
    for i, x in enumerate(a.get("grads", a.get("xs"))):
        g = x.double()
        m, v = _moments(a, i)
        firm = None
        if a["finite"] and not a["finite"][i]:
            out = torch.zeros_like(m)
        elif v is not None:
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            if a["row_eps"]:
                eps, scale = (a[k][i].double()[..., None] for k in ("row_eps", "row_scale"))
                out = scale * m / (v.sqrt() + eps)
            else:
                out = m / (v.sqrt() + a["eps"][i])
        elif op.startswith("lion"):
            look = BETA1 * m + (1 - BETA1) * g
            firm = look.abs() > 1e-5 * (m.abs() + g.abs())
            out, m = look.sign(), BETA2 * m + (1 - BETA2) * g
        else:
            out = m = DECAY * m + 0.5 * g
        found["outs"].append((out, firm))
        found["first"].append((m, None))
        if v is not None:
            found["second"].append((v, None))
    return found
