"""A model of two layers in the real ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_optim.integrations.transformers import trainer_optimizer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


def model(seed: int = 0) -> Any:
    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def data(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(32, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
"""Fields that classes without Adam's hyper-parameters refuse."""


def arguments(folder: Path, **more: Any) -> Any:
    own: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, **ADAM,
        "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
        "optim_args": "rank=4, update_proj_gap=2, scale=0.50",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**own, **more})


def bare(folder: Path, **more: Any) -> Any:
    """Arguments of which all that an optimizer reads are at their defaults, but the rank."""
    read = {"learning_rate": 5e-5, "weight_decay": 0.0, "optim_args": "rank=4"}
    fields = transformers.TrainingArguments.__dataclass_fields__
    adam = {name: fields[name].default for name in ADAM}
    return arguments(folder, **{**read, **adam, "max_steps": 2, **more})


def trainer(args: Any, **options: Any) -> Any:
    return transformers.Trainer(
        model=model(),
        args=args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=trainer_optimizer(args, **options),
    )


def assert_equal_models(a: Any, b: Any) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def distance(a: Any, b: Any) -> float:
    """The largest difference of two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)
