"""LLaMAs on the device, built there from random numbers."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import llama
from benchmarks.gpu.settings import Settings


def config(settings: Settings, shape: tuple[int, int, int, int]) -> Any:
    """Of ``transformers``, with the vocabulary and context of the settings."""
    return llama(*shape, vocab_size=settings.vocab, context=max(2048, settings.tokens))


def build(settings: Settings, shape: tuple[int, int, int, int], device: torch.device) -> Any:
    """A model with checkpointed layers."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(settings, shape), dtype=settings.dtype)
    model.gradient_checkpointing_enable()
    return model.train()
