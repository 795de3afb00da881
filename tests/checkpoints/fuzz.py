"""Checkpoints changed at random, loaded and stepped from: see test_fuzz.py.

python -m tests.checkpoints.fuzz EXAMPLES [SEED]
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim.ops import quant
from lowrank_optim.optimizer import LowRankOptimizer
from tests import cases, runs
from tests.checkpoints.trained import VARIANTS, trained

KINDS: list[tuple[str, dict[str, Any]]] = [
    *(("FrugalAdamW", {"projector": name}) for name in cases.projector_names()),
    ("DCTAdamW", {}),
    ("FiraAdamW8bit", {}),
    ("GaLoreAdafactor", {}),
    ("SSTAdamW", {}),
    ("SwitchLoRAAdamW", {}),
    *VARIANTS,
]
STRUCTURE = ("params", "param_names", "rank", "targets", "projector", "proj_type", "method")
STRUCTURE += ("state_dtype", "on_refresh", "seed", "factor_starts", "form", "indices")
"""Group keys that say what state there is; hyper-parameters have tests of their own."""
NUMBERS = st.sampled_from(
    [-1, 0, 1, 3, 7, 10**6, 2**31 - 1, -(2**31), 2**40, 2**62, 0.5, -2.0, 1e30, 1e300, math.nan,
     math.inf, -math.inf]
)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8,
     torch.int8, torch.bool, torch.complex64]
)  # fmt: skip


def changed(x: Tensor, data: Any) -> Any:
    """One entry, changed in one way."""
    if x.is_meta:
        return x
    how = data.draw(st.sampled_from(["value", "value", "value", "dtype", "shape", "order", "junk"]))
    if how == "junk":
        return data.draw(JUNK | st.builds(torch.empty, st.integers(0, 3), device=st.just("meta")))
    if how == "dtype":
        return x.to(data.draw(DTYPES))
    if how == "shape":
        turn = data.draw(st.sampled_from(["short", "flat", "more", "sparse", "expanded"]))
        if turn == "sparse":
            return x.to_sparse() if x.dim() else x
        if turn == "expanded":
            return x.reshape(-1)[:1].expand(x.numel()).view(x.shape) if x.dim() else x
        return {"short": x.reshape(-1)[1:], "flat": x.reshape(-1), "more": x.unsqueeze(0)}[turn]
    if how == "order" and x.dim():
        return x.flip(-1)
    new = x.clone()
    if new.numel():
        at = data.draw(st.integers(0, new.numel() - 1))
        number = data.draw(NUMBERS)
        if new.is_floating_point():
            new.view(-1)[at] = torch.tensor(number, dtype=torch.float64)
        elif math.isfinite(number) and not (new.is_complex() or new.dtype == torch.bool):
            info = torch.iinfo(new.dtype)
            new.view(-1)[at] = max(info.min, min(info.max, int(number)))
    return new


def mutated(good: dict[str, Any], data: Any) -> Any:
    """A copy of a state dict with one to three things changed."""
    bad = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(
            st.sampled_from(["entry"] * 8 + ["drop", "extra", "state", "group", "top"])
        )
        i = data.draw(st.sampled_from(sorted(good["state"])))
        entry = bad["state"].get(i) if isinstance(bad["state"], dict) else None
        if what == "top":
            key = data.draw(st.sampled_from(["state", "param_groups"]))
            bad[key] = data.draw(JUNK)
            break
        if what == "group":
            group = data.draw(st.sampled_from(bad["param_groups"]))
            key = data.draw(st.sampled_from([k for k in STRUCTURE if k in group]))
            group[key] = data.draw(JUNK)
        elif what == "state":
            bad["state"][data.draw(st.sampled_from([i, 99, "x"]))] = data.draw(JUNK)
        elif isinstance(entry, dict) and entry:
            key = data.draw(st.sampled_from(sorted(entry)))
            if what == "drop":
                del entry[key]
            elif what == "extra":
                entry[data.draw(st.text(max_size=5))] = data.draw(JUNK)
            elif isinstance(entry[key], Tensor) and entry[key].layout == torch.strided:
                entry[key] = changed(entry[key], data)
    return bad


def load(optimizer: LowRankOptimizer, bad: Any) -> bool:
    """Whether it was loaded; if not, the error says why and nothing has changed."""
    before, groups = runs.entries(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    try:
        optimizer.load_state_dict(bad)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 15, repr(error)
        runs.assert_same_state(runs.entries(optimizer), before)
        assert optimizer.state_dict()["param_groups"] == groups
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        return False
    return True


def damaged(examples: int, number: int = 0) -> tuple[int, int]:
    """How many changed checkpoints were refused, and how many were loaded and stepped from."""
    logging.disable()  # of gradients that a wild moment has made infinite
    made = [trained(*kind) for kind in KINDS]
    good = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in made]
    weights = [runs.copies(params) for params, _ in made]
    counts = {True: 0, False: 0}

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(KINDS) - 1), st.data())
    def run(n: int, data: Any) -> None:
        params, optimizer = made[n]
        taken = load(optimizer, mutated(good[n], data))
        counts[taken] += 1
        if taken:  # what was let in is stepped from
            runs.train(params, optimizer, [2, 3])
            optimizer.load_state_dict(good[n])
            for param, start in zip(params, weights[n], strict=True):
                param.data.copy_(start)

    run()
    return counts[False], counts[True]


def main(examples: int, number: int = 0) -> None:
    torch.set_num_threads(1)
    quant.MIN_SIZE = 40
    refused, taken = damaged(examples, number)
    print(f"{refused} refused, {taken} loaded")
    assert refused > taken > 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
