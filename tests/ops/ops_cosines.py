"""Arguments for the cosine ops, and what they become by the matrix of scipy in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from lowrank_optim.ops.cosine import CosineTransform
from tests.ops.ops_cases import BETA1, BETA2, DECAY, LR, Arguments, Expected, names, strided

COSINES = [
    "cosine_scores", "cosine_project_", "cosine_top_project_", "cosine_lift_add_", "cosine_adamw_",
]  # fmt: skip
WIDTHS = (1, 16, 33, 150)
"""One column; half a tile; a tile and a tail of one; more than one strip, and a tail."""


def rows(n: int, basis: str) -> Tensor:
    """The basis, a vector a row."""
    c = torch.from_numpy(scipy.fft.dct(np.eye(n), norm="ortho", axis=0))
    return c if basis == "dct2" else c.mT


def arguments(
    op: str,
    dtype: torch.dtype,
    *,
    n: int = 12,
    widths: Sequence[int] = WIDTHS,
    how: str = "rows",
    basis: str = "dct2",
    ranking: str = "l2",
    by_row: bool = True,
    moved: bool = True,
    unsound: int | None = None,
) -> Arguments:
    """Matrices of one length; half of the coefficients, some of them new, in mid-run."""
    wide = torch.promote_types(dtype, torch.float32)
    picked = (n + 1) // 2

    def drawn() -> Tensor:
        return torch.randperm(n)[:picked].sort().values.int()

    def low(width: int) -> Tensor:
        return torch.randn(picked, width, dtype=wide)

    plan = CosineTransform.make(n, basis, wide, torch.device("cpu")).plan
    found: Arguments = {"plan": plan, "basis": basis, "ranking": ranking, "decay": DECAY}
    found |= {"beta1": BETA1, "beta2": BETA2, "row_eps": [], "row_scale": [], "sources": []}
    found["params"] = [strided(torch.randn(n, w).to(dtype), how) for w in widths]
    found["grads"] = [strided(torch.randn(n, w).to(dtype), how) for w in widths]
    found["indices"], old = [drawn() for _ in widths], [drawn() for _ in widths]
    if moved:
        for new, before in zip(found["indices"], old, strict=True):
            at = {k: i for i, k in enumerate(before.tolist())}
            found["sources"].append(torch.tensor([at.get(k, -1) for k in new.tolist()]).int())
    found["outs"] = [torch.full_like(low(w), torch.nan) for w in widths]
    found["updates"] = [low(w) for w in widths]
    found["exp_avgs"] = [0.1 * low(w) for w in widths]
    found["exp_avg_sqs"] = [low(w).square() for w in widths]
    found["eps"] = [1e-3 * (i + 1) for i in range(len(widths))]
    found["steps"] = [LR / (i + 1) for i in range(len(widths))]
    found["finite"] = []
    if op == "cosine_top_project_":
        found["sources"] = [torch.full_like(x, 77) for x in found["indices"]]
        found["finite"], found["usable"] = (
            [torch.tensor(i % 2 > 0) for i in range(len(widths))] for _ in range(2)
        )
        if unsound is not None:
            found["grads"][unsound][n // 2, 0] = torch.nan
    elif unsound is not None:
        found["finite"] = [torch.tensor(i != unsound) for i in range(len(widths))]
        found["updates"][unsound].fill_(torch.nan)
    if by_row:
        found["row_eps"] = [torch.rand(picked).to(wide) + 0.1 for _ in widths]
        found["row_scale"] = [torch.rand(picked).to(wide) for _ in widths]
    return {name: found[name] for name in names(op)}


def expected(op: str, a: Arguments) -> Expected:
    """Every output, one matrix at a time in float64."""
    found: Expected = {}

    def say(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append((x, None))

    for i, x in enumerate(a.get("grads", a.get("params"))):
        q = rows(x.shape[0], a["basis"]).to(x.device)
        if op == "cosine_scores":
            s = (q @ x.double()).abs()
            say("", s.sum(1) if a["ranking"] == "l1" else s.square().sum(1))
            continue
        if op == "cosine_top_project_":
            s = (q @ x.double()).abs()
            scores = s.sum(1) if a["ranking"] == "l1" else s.square().sum(1)
            told = {"scores": [scores], "indices": [a["indices"][i]], "finite": [None]}
            own = expected_top(told)
            for name, (value, *_) in own.items():
                found.setdefault(name, []).append(value)
            say("outs", q[own["indices"][0][0].long()] @ x.double())
            continue
        q = q[a["indices"][i].long()]
        if op == "cosine_project_":
            say("outs", q @ x.double())
        elif op == "cosine_lift_add_":
            lifted = q.mT @ a["updates"][i].double()
            ok = not a["finite"] or bool(a["finite"][i])
            new = DECAY * x.double() - a["steps"][i] * lifted
            say("params", new if ok else x.double())
        else:
            m, v = (_moved(a[k][i].double(), a, i) for k in ("exp_avgs", "exp_avg_sqs"))
            g = q @ x.double()
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            eps = a["row_eps"][i].double()[:, None] if a["row_eps"] else a["eps"][i]
            scale = a["row_scale"][i].double()[:, None] if a["row_scale"] else 1.0
            lifted = q.mT @ (scale * m / (v.sqrt() + eps))
            say("params", DECAY * a["params"][i].double() - a["steps"][i] * lifted)
            say("exp_avgs", m)
            say("exp_avg_sqs", v)
    return found


def _moved(x: Tensor, a: Arguments, i: int) -> Tensor:
    if not a["sources"]:
        return x
    old = [*x.unbind(0), torch.zeros_like(x[0])]
    return torch.stack([old[k] for k in a["sources"][i].tolist()])


def top(dtype: torch.dtype) -> Arguments:
    """Scores with ties, and old indices."""
    scores = [torch.randint(0, 4, (m,)).to(dtype) for m in (1, 9, 64, 100)]
    old = [torch.randperm(m)[: (m + 1) // 3].sort().values.int() for m in (1, 9, 64, 100)]
    sources = [torch.full_like(x, 77) for x in old]
    return {"scores": scores, "indices": old, "sources": sources, "finite": [], "usable": []}


def told(dtype: torch.dtype) -> Arguments:
    """Of several lengths with scores that say nothing: none at all, too many, and no numbers."""
    a: Arguments = {"finite": [], "usable": []}
    for m in (9, 64, 100):
        own = torch.randint(1, 9, (m,)).to(dtype)
        bad = [own.clone() for _ in range(3)]
        bad[0][m // 2], bad[1][1] = torch.inf, torch.nan
        bad[2][:4] = torch.finfo(dtype).max / 2
        a.setdefault("scores", []).extend([own, torch.zeros_like(own), *bad])
    for x in a["scores"]:
        old = torch.randperm(x.numel())[: x.numel() // 3].sort().values.int()
        a.setdefault("indices", []).append(old)
        a.setdefault("sources", []).append(torch.full_like(old, 77))
        a["finite"].append(torch.tensor(float(x[0]) > 100))  # what is written is not what was there
        a["usable"].append(torch.tensor(False))
    return {name: a[name] for name in names("top_rows_")}


def moves() -> Arguments:
    """Rows of every form that a state keeps; places that are taken, exchanged, or nowhere."""
    a: Arguments = {"xs": [], "sources": [], "fills": []}
    forms: list[tuple[int, torch.dtype, int]] = [
        (1, torch.float32, 0), (33, torch.float32, 0), (300, torch.float64, 0), (7, torch.uint8, 0),
        (256, torch.uint8, 127), (7, torch.bfloat16, 0), (8, torch.bfloat16, 0),
        (0, torch.int32, 0),
    ]  # fmt: skip
    for r in (1, 5, 12):
        for width, dtype, fill in forms[1:] + forms[:1]:
            source = torch.randperm(r).int()
            source[torch.rand(r) < 0.3] = -1
            if width > 40:  # as of sets of indices
                source = torch.cat([source[source < 0], source[source >= 0].sort().values])
            a["xs"].append(torch.randint(0, 256, (r, width)).to(dtype))
            a["sources"].append(source)
            a["fills"].append(fill)
    return a


def expected_moves(a: Arguments) -> Expected:
    """Row by row."""
    found: Expected = {"xs": []}
    for x, source, fill in zip(a["xs"], a["sources"], a["fills"], strict=True):
        nowhere = torch.full_like(x[:1], fill)
        rows = [x[k : k + 1] if k >= 0 else nowhere for k in source.tolist()]
        found["xs"].append((torch.cat(rows).double(), None))
    return found


def expected_top(a: Arguments) -> Expected:
    """By sorting pairs."""
    found: Expected = {"indices": [], "sources": [], "finite": [], "usable": []}
    for score, old in zip(a["scores"], a["indices"], strict=True):
        total = float(score.sum())  # in the format of the scores: it may overflow
        for name, said in (("finite", total < math.inf), ("usable", 0 < total < math.inf)):
            found[name] += [(torch.tensor(float(said)).double(), None)] * bool(a["finite"])
        if a["finite"] and not 0 < total < math.inf:
            found["indices"].append((old.double(), None))
            found["sources"].append((torch.arange(old.numel()).double().to(old.device), None))
            continue
        order = sorted(range(score.numel()), key=lambda k: (-float(score[k]), k))
        new = sorted(order[: old.numel()])
        place = {k: i for i, k in enumerate(old.tolist())}
        for name, values in (("indices", new), ("sources", [place.get(k, -1) for k in new])):
            found[name].append((torch.tensor(values).double().to(score.device), None))
    return found
