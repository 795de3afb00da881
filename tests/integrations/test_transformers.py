"""Inside the real ``transformers.Trainer``: what it is told is what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_optim import GaLoreAdamW, lowrank_groups, methods
from tests.compare import assert_close
from tests.integrations.trainers import (
    arguments,
    assert_equal_models,
    bare,
    data,
    model,
    trainer,
    transformers,
)


def test_groups_and_hyper_parameters_are_those_of_the_arguments(tmp_path: Path) -> None:
    """Weight-decay groups are the ones that Trainer makes for AdamW, name by name."""
    args = arguments(tmp_path)
    run = trainer(args)
    optimizer = run.create_optimizer()
    decayed = set(run.get_decay_parameter_names(run.model))
    seen = set()
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-6)
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
            linear = "proj" in name and "bias" not in name
            assert (group["rank"] == 4) == linear, name
            if linear:
                assert (group["update_proj_gap"], group["scale"]) == (2, 0.5)
            seen.add(name)
    assert seen == {n for n, _ in run.model.named_parameters()}


def test_training_is_the_loop_written_out(tmp_path: Path) -> None:
    """Accumulation, clipping and the scheduler of a Trainer run are those of a plain loop."""
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    run = trainer(args)
    run.train()
    mine = model()
    undecayed = ("bias", "norm")
    groups = lowrank_groups(mine, rank=4, no_decay=undecayed)
    optimizer = GaLoreAdamW(
        groups, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, scale=0.5, update_proj_gap=2
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 4)
    loader = iter(trainer(args).get_train_dataloader())
    mine.train()
    transformers.set_seed(args.seed)
    for _ in range(4):
        pieces = [next(loader) for _ in range(2)]
        count = sum((piece["labels"][:, 1:] != -100).sum() for piece in pieces)
        for piece in pieces:
            mine(**piece, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for x, y in zip(run.model.parameters(), mine.parameters(), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("mode", [None, "project", "step"])
def test_interrupted_runs_resume(tmp_path: Path, mode: Any) -> None:
    """A checkpoint in the middle, read by Trainer with weights_only, layer-wise modes too."""
    more = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trainer(arguments(tmp_path, **more), in_backward=mode)
    whole.train()
    resumed = trainer(arguments(tmp_path, **more), in_backward=mode)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_models(whole.model, resumed.model)


UNLIKE = ("FrugalAdamW", "GaLoreAdafactor", "GaLoreSGD", "LisaAdamW", "SSTAdamW", "SwitchLoRAAdamW")
"""Classes that take other arguments than GaLoreAdamW, or other rates."""


def test_layer_wise_is_the_ordinary_run(tmp_path: Path) -> None:
    """Without clipping nothing differs, to the bit, with accumulation too."""
    more = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    runs = [trainer(arguments(tmp_path, **more), in_backward=m) for m in (None, "step")]
    for run in runs:
        run.train()
    assert_equal_models(runs[0].model, runs[1].model)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in UNLIKE[::2] else pytest.mark.slow)
        for n in methods.__all__
        if n != "GaLoreAdamW"
    ],
)
def test_other_methods_learn_at_the_given_rate(tmp_path: Path, name: str) -> None:
    """At learning rate 0 and no decay nothing moves; at another the loss falls."""
    method, more = getattr(methods, name), {"optim_args": "rank=4, update_proj_gap=2"}
    if name.startswith("Frugal"):
        more = {"optim_args": ""}  # blocks, and the density of the class
    if name.startswith("SwitchLoRA"):
        more = {"optim_args": "rank=4, interval=4, freeze_steps=1"}
    if name.startswith("SST"):
        more = {"optim_args": "rank=4, steps_per_iteration=4, warmup_steps=1"}
    still = trainer(bare(tmp_path, learning_rate=0.0, max_steps=3, **more), method=method)
    still.train()
    assert_equal_models(still.model, model())
    low = [g["rank"] for g in still.optimizer.param_groups if g["rank"] is not None]
    assert set(low) == ({0.25} if name.startswith("Frugal") else {4})
    rate = 3e-3 if "SGD" not in name else 0.1
    args = bare(tmp_path, max_steps=12, learning_rate=rate, weight_decay=0.1, **more)
    moving = trainer(args, method=method)
    batch = {k: torch.stack([row[k] for row in data()]) for k in ("input_ids", "labels")}
    losses = []
    for train in (moving.train, lambda: None):
        with torch.no_grad():
            losses.append(float(moving.model(**batch).loss))
        train()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("targets", "projected"),
    [
        ("all_linear", 14),
        (["q_proj", "k_proj"], 4),
        (r"layers\.1\..*(mlp)", 3),
    ],
)
def test_target_modules(tmp_path: Path, targets: Any, projected: int) -> None:
    """As ``optim_target_modules`` of the arguments, or given directly."""
    for args, options in (
        (arguments(tmp_path, optim_target_modules=targets), {}),
        (arguments(tmp_path), {"target_modules": targets}),
    ):
        optimizer = trainer(args, **options).create_optimizer()
        matrices = [g for g in optimizer.param_groups if g["rank"] is not None]
        assert sum(p.dim() == 2 for g in matrices for p in g["params"]) == projected


def test_a_misspelt_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="update_gab"):
        trainer(arguments(tmp_path), update_gab=3).create_optimizer()
