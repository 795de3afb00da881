"""Optimizers with state of every kind, two steps old."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank_optim.optimizer import LowRankOptimizer
from tests import cases, runs

SHAPES = {"a.weight": (12, 8), "c.experts": (2, 6, 10), "d.bias": (7,)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {"proj_type": "full"}),
    ("DCTAdamW", {"proj_type": "full"}),
    *(("DCTAdamW", {"error_feedback": kept}) for kept in ("float32", "bfloat16", "8bit", "4bit")),
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}),
    ("FrugalLion", {"projector": "rows", "state_dtype": "8bit"}),
    ("SSTAdamW", {"factors": "active"}),
    ("SSTAdamW", {"offload_inactive": True, "factor_dtype": "bfloat16"}),
    ("SwitchLoRAAdamW", {"pool_device": "param", "order": "random", "rank": 3}),
    ("GaLoreAdamW", {"state_dtype": "4bit"}),
    ("SwitchLoRAAdamW", {"interval": 4, "freeze_steps": 2}),
]


def trained(name: str, options: dict[str, Any]) -> tuple[list[nn.Parameter], LowRankOptimizer]:
    params = [nn.Parameter(cases.parameter(s, torch.float32).detach()) for s in SHAPES.values()]
    named = list(zip(SHAPES, params, strict=True))
    options = dict(options)
    groups = [{"params": named[:-1], "rank": options.pop("rank", 4)}, {"params": named[-1:]}]
    optimizer = cases.build(name, groups, **options)
    runs.train(params, optimizer, range(2))
    return params, optimizer
