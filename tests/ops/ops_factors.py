"""Arguments of the ops on a bucket's small numbers, and what they become in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops import ops_turns
from tests.ops.ops_cases import BETA1, BETA2, DECAY, LR, Arguments, Expected, names, strided

OPS = (
    "decay_",
    "direction_add_",
    "addmm_",
    "count_",
    "row_steps_",
    "residual_factors_",
    *ops_turns.OPS,
)
SHAPES = [(), (1,), (17, 33), (3, 700), (2, 9, 14), (0, 5)]
COLUMNS = [(1, 1), (1, 33), (1, 2500), (3, 1, 14)]
PRODUCTS = [(1, 1, 1), (17, 33, 5), (70, 35, 8), (6, 1, 2), (1, 9, 3), (0, 5, 2), (3, 4, 2)]
"""Rows and columns of W, and the rank."""
TINY, LIMITER = 1e-8, 1.01


def arguments(
    op: str,
    dtype: torch.dtype,
    *,
    how: str = "rows",
    unsound: int | None = None,
    factors: bool = True,
    share: float = 0.4375,
) -> Arguments:
    """Weights; ages from 0 to thousands; norms of columns where G has more than its coordinates."""
    if op in ops_turns.OPS:
        return ops_turns.arguments(op, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if op == "addmm_":
        return _products(dtype, how)
    shapes = COLUMNS if op == "residual_factors_" else SHAPES
    lows = [torch.rand(s, dtype=wide) for s in COLUMNS]
    ages = [torch.randint(0, 4, s).float() ** 7 for s in SHAPES]
    found: Arguments = {
        "params": [strided(torch.randn(s, dtype=wide).to(dtype), how) for s in SHAPES],
        "updates": [torch.randn(s, dtype=wide) for s in SHAPES],
        "lr": LR,
        "steps": [torch.rand((), dtype=wide) for _ in range(len(SHAPES) * factors)],
        "decays": [torch.rand((), dtype=wide) for _ in range(len(SHAPES) * factors)],
        "decay": DECAY,
        "factors": [torch.tensor(0.5 + i / 8, dtype=wide) for i in range(len(SHAPES) * factors)],
        "ages": ages,
        "counts": ages,
        "eps_rows": [torch.full_like(x, torch.nan, dtype=wide) for x in ages],
        "scale_rows": [torch.full_like(x, torch.nan, dtype=wide) for x in ages],
        "beta1": BETA1,
        "beta2": BETA2,
        "eps": 1e-3,
        "lows": lows,
        "directions": [torch.rand(s, dtype=wide) for s in COLUMNS],
        "grads": [x + torch.rand_like(x) for x in lows],
        # none yet; one that limits nothing; one that limits much; a batch of each
        "norms": [torch.tensor(x, dtype=wide) for x in (0.0, 1e3, 0.1, [0.0, 0.1, 1e3])],
        "outs": [torch.full(s, torch.nan, dtype=wide) for s in COLUMNS],
        "tiny": TINY,
        "share": share,
        "noise": 1e-6,
        "limiter": LIMITER,
        "finite": [],
    }
    if unsound is not None:
        found["finite"] = [torch.tensor(i != unsound) for i in range(len(shapes))]
        found["grads"][min(unsound, len(COLUMNS) - 1)].fill_(torch.nan)
    return {name: found[name] for name in names(op)}


def _products(dtype: torch.dtype, how: str) -> Arguments:
    """Weights and operands stored each in its way; factors of neither sign alone, and one of 1."""
    wide = torch.promote_types(dtype, torch.float32)
    found: Arguments = {k: [] for k in names("addmm_")}
    for i, (m, n, r) in enumerate(PRODUCTS):
        for key, shape in (("params", (m, n)), ("lefts", (m, r)), ("rights", (r, n))):
            # ways that differ within a call, and from list to list
            own = how if key == "params" else ("rows", "columns", "slice")[(i + len(key)) % 3]
            found[key].append(strided(torch.randn(shape, dtype=wide).to(dtype), own))
        found["steps"].append(torch.tensor((-1.0) ** i * (0.5 + i / 8), dtype=wide))
        found["decays"].append(torch.tensor(1 - i / 8, dtype=wide))
    return found


def expected(op: str, a: Arguments) -> Expected:
    """One number at a time."""
    if op in ops_turns.OPS:
        return ops_turns.expected(op, a)
    if op == "decay_":
        finite = a["finite"] or [True] * len(a["params"])
        factors = a["factors"] or [1.0] * len(a["params"])
        weights = zip(a["params"], factors, finite, strict=True)
        new = [w.double() * (DECAY * float(f) if ok else 1.0) for w, f, ok in weights]
        return {"params": [(x, None) for x in new]}
    if op == "direction_add_":
        ones = [1.0] * len(SHAPES)
        given = a["params"], a["updates"], a["decays"] or ones, a["steps"] or ones
        return {
            "params": [
                (DECAY * float(d) * w.double() - LR * float(s) * x.double(), None)
                for w, x, d, s in zip(*given, strict=True)
            ]
        }
    if op == "addmm_":
        lists = [a[k] for k in ("params", "lefts", "rights", "steps", "decays")]
        return {
            "params": [
                (d.double() * w.double() + s.double() * (p.double() @ n.double()), None)
                for w, p, n, s, d in zip(*lists, strict=True)
            ]
        }
    if op == "count_":
        more = [int(ok) for ok in a["finite"] or [True] * len(a["counts"])]
        counts = zip(a["counts"], more, strict=True)
        return {"counts": [(x.double() + one, None) for x, one in counts]}
    if op == "row_steps_":
        steps: Expected = {"eps_rows": [], "scale_rows": []}
        for age in a["ages"]:
            root = (1 - BETA2 ** age.double().clamp(min=1)).sqrt()
            steps["eps_rows"].append((1e-3 * root, None))
            scale = root / (1 - BETA1 ** age.double().clamp(min=1)) * (age > 0)
            steps["scale_rows"].append((scale, None))
        return steps
    found: Expected = {"norms": [], "outs": []}
    for i, (low, direction, grad, norm) in enumerate(
        zip(a["lows"], a["directions"], a["grads"], a["norms"], strict=True)
    ):
        kept, outs = norm.double().reshape(-1).clone(), []
        every = (x.double().reshape(kept.numel(), -1) for x in (low, direction, grad))
        for b, (r, n, g) in enumerate(zip(*every, strict=True)):
            out, new = _limited(n / (r + TINY), g, r, float(kept[b]), a["share"])
            outs.append(out)
            if not a["finite"] or a["finite"][i]:
                kept[b] = new
        found["norms"].append((kept.reshape(norm.shape), None))
        found["outs"].append((torch.stack(outs).reshape(low.shape), None))
    return found


def _limited(
    factor: Tensor, grad: Tensor, low: Tensor, before: float, share: float
) -> tuple[Tensor, float]:
    whole = float((factor * grad).square().sum())
    left = whole - share * float((factor * low).square().sum())
    norm = 0.0 if left <= 1e-6 * whole else left**0.5
    limit = 1.0
    if before > 0 and norm > LIMITER * (before + TINY):
        limit = LIMITER * (before + TINY) / norm
    return factor * limit, norm * limit
