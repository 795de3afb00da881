"""Arguments of the ops on the rows of factors, and what they become in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.ops_cases import Arguments, Expected, names

OPS = ("row_dots_", "turn_rows_", "step_rows_")
ROWS = [(1, 1), (4, 33), (5, 700), (2, 3, 14), (0, 5), (3, 2100)]
"""The last is longer than what a program has at once."""
LR, DECAY = 0.125, 0.75


def arguments(
    op: str,
    dtype: torch.dtype,
    *,
    lengths: bool = True,
    across: bool = False,
    moves: torch.dtype | None = torch.bfloat16,
    narrow: torch.dtype | None = None,
    ahead: bool = True,
    on_device: bool = False,
) -> Arguments:
    """Unit rows, every other of which does not move; of ``across`` the squares are others' too."""
    wide = torch.promote_types(dtype, torch.float32)
    xs = [torch.nn.functional.normalize(torch.randn(s, dtype=wide), dim=-1) for s in ROWS]
    directions = [torch.randn(s, dtype=wide).to(narrow or wide) for s in ROWS]
    for d in directions:
        d[..., 1::2, :] = 0
    found: Arguments = {
        "xs": directions if op == "row_dots_" else xs,
        "ys": xs,
        "directions": directions,
        "lengths": [torch.randn(2, *s[:-1], dtype=wide) for s in ROWS] if lengths else [],
        "across": [_across(s) for s in ROWS] if across else [],
        "outs": [torch.full_like(x, torch.nan) for x in xs],
        "moves": [x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), torch.nan) for x in xs],
        "lr": LR,
        "decay": DECAY,
        "ahead": ahead,
        "decays": [torch.rand((), dtype=wide) for _ in ROWS] if on_device else [],
    }
    found["moves"] = [] if moves is None else [x.to(moves) for x in found["moves"]]
    if op == "row_dots_":
        found["outs"] = [x[..., 0] for x in found["outs"]]
        found["outs"] = [x.contiguous() for x in found["outs"]]
    return {name: found[name] for name in names(op)}


def _across(shape: tuple[int, ...]) -> Tensor:
    squares = 1 + torch.rand(shape[:-1], dtype=torch.float64)
    return torch.stack([squares, (torch.rand(shape[:-1]) < 0.5).double()])


def expected(op: str, a: Arguments) -> Expected:
    """One row at a time."""
    found: Expected = {"outs": [], "moves": []}
    if op == "row_dots_":
        pairs = zip(a["xs"], a["ys"], strict=True)
        return {"outs": [((x.double() * y.double()).sum(-1), None) for x, y in pairs]}
    for n, (x, d) in enumerate(zip(a["xs"], a["directions"], strict=True)):
        size = x.shape[-1]
        old = x.double().reshape(-1, size)
        if op == "step_rows_":
            decay = DECAY * (a["decays"][n].double() if a["decays"] else 1.0)
            new = decay * old - LR * d.double().reshape(-1, size)
            found["outs"].append((new.view(x.shape), None))
            both = (
                part.reshape(x.shape)
                for part in ((new, new - old) if a["ahead"] else (new - old, old))
            )
            found["moves"] += [(torch.cat([*both], -2), None)] * bool(a["moves"])
            continue
        new, moved = old - LR * d.double().reshape(-1, size), old.clone()
        for i, row in enumerate(new):
            length, moves = row.norm(), bool((row != old[i]).any())
            if a["across"]:
                square, flag = a["across"][n].reshape(2, -1)[:, i]
                length, moves = square.sqrt(), bool(flag)
            if moves:
                moved[i] = row / length
        one, two = moved - old, old
        if a["lengths"]:
            after, before = a["lengths"][n].double().reshape(2, -1, 1)
            one, two = after * moved, after * moved - before * old
        found["outs"].append((moved.view(x.shape), None))
        if a["moves"]:
            both = (part.reshape(x.shape) for part in (one, two))
            found["moves"].append((torch.cat([*both], -2), None))
    return found
