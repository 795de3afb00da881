"""``docs/guides/checkpoints.md`` names every entry of every state."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests import cases, runs

DOCS = Path(__file__).parents[2] / "docs" / "guides" / "checkpoints.md"
MOMENTS = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "momentum_buffer"}
VARIANTS = [
    ("FrugalAdamW", {"projector": "rsvd"}),
    ("DCTAdamW", {"error_feedback": "4bit"}),
    ("DCTAdamW", {"proj_type": "full"}),
    ("GaLoreAdamW", {"proj_type": "full"}),
    ("SSTAdamW", {"factors": "active"}),
    ("SSTAdamW", {"offload_inactive": True}),
    ("SwitchLoRAAdamW", {"pool_device": "param"}),
]


def keys(name: str, **options: object) -> set[str]:
    """State entries of two matrices and a vector after a step."""
    params = [torch.nn.Parameter(torch.ones(size)) for size in ((24, 40), (24, 40), (7,))]
    rank = options.pop("rank", 4)
    groups = [{"params": params[:2], "rank": rank}, {"params": params[2:]}]
    optimizer = cases.build(name, groups, **options)
    runs.train(params, optimizer, range(1))
    return {key for entry in runs.entries(optimizer) for key in entry}


def test_every_entry_of_every_state_is_named() -> None:
    table = DOCS.read_text().split("## What is in it")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w.]+)`", table))
    found = {key for name in cases.method_names() for key in keys(name)}
    found |= {key for name, options in VARIANTS for key in keys(name, **options)}
    for projector in cases.projector_names():
        found |= keys("FrugalAdamW", projector=projector, rank=0.5)
    for key in sorted(found):
        coord, _, last = key.rpartition(".")
        if last.removesuffix("_scale") in MOMENTS:
            assert last.removesuffix("_scale") in named, key
            assert f"{coord}." in table, key
        elif key not in named:
            assert coord == "host" and "`host.` before the name" in table and last in named, key
