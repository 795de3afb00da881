"""A small LLaMA on text in a byte-level BPE of 1,024 tokens, whose matrices and bases are measured.

The text is the source of Python's standard library. **Methods are not compared here.** With an
embedding of deviation 0.02 and outputs that are not scaled by depth, AdamW with every matrix frozen
ends 200 steps at 4.267 nats, where its best is 4.235 (seed 100): what is learned is learned by
embedding and head. :mod:`benchmarks.study` has a task on which matrices matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.common import llama
from benchmarks.runs import Settings
from lowrank_optim import lowrank_groups

Groups = list[dict[str, Any]]
LR = 6e-4
"""Peak learning rate of the matrices under GaLoreAdamW; what is dense has ``Settings.dense_lr``."""


def make_groups(model: nn.Module, settings: Settings) -> Groups:
    """The same groups for every method; ``torch.optim`` passes over keys it does not know."""
    groups = lowrank_groups(model, rank=settings.rank, update_proj_gap=settings.gap)
    for group in groups:
        if "rank" not in group:
            group["lr"] = settings.dense_lr
    return groups


def make_model(settings: Settings, vocab_size: int) -> nn.Module:
    """The LLaMA of a run: the same weights for the same seed."""
    from transformers import LlamaForCausalLM

    config = llama(
        settings.hidden,
        settings.mlp,
        settings.layers,
        settings.heads,
        vocab_size=vocab_size,
        context=settings.context,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


def losses(model: nn.Module, window: Tensor) -> Tensor:
    """Nats of each next token of ``window (batch, length + 1)``: ``(batch, length)``."""
    logits = model(input_ids=window[:, :-1]).logits
    return cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, token_bytes: Tensor, batch: int
) -> tuple[float, float]:
    """Nats per token and bits per byte of the held-out ``windows``."""
    model.eval()
    nats = sum(float(losses(model, window).sum()) for window in windows.split(batch))
    model.train()
    targets = windows[:, 1:]
    size = int(token_bytes[targets].sum())
    return nats / targets.numel(), nats / math.log(2) / size


def schedule(optimizer: Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to ``floor``."""
    warmup = max(1, round(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, settings.steps - warmup)
        return settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
