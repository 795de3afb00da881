"""transformers' Trainer with FSDP2, which shards the model under the optimizer that it has made."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_optim
from tests.sharded.accelerated import fsdp
from tests.sharded.ranks import Ranks, World

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="its FSDP2 takes a mesh of whatever accelerator there is"
)

Worlds = Callable[[int], Ranks]
STEPS, SAVED = 6, 3


def run(method: str, options: dict[str, Any], folder: str, size: int, **more: Any) -> Any:
    """A Trainer that has the same batches on any number of processes."""
    from tests.integrations.trainers import arguments, data, model, transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    own = {"max_steps": STEPS, "per_device_train_batch_size": 4 // size, **more}
    args = arguments(Path(folder), optim_args="update_proj_gap=2", **own)
    made = lowrank_optim.integrations.transformers.trainer_optimizer(
        args, getattr(lowrank_optim, method), **options
    )
    return transformers.Trainer(
        model=model().double(),
        args=args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=made,
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def sharded(
    world: World, method: str, options: dict[str, Any], folder: str, kind: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights of a run, and of one that went on from its checkpoint; names in the optimizer."""
    with fsdp():
        config = {"version": 2, "state_dict_type": kind}
        config["transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
        more = {"fsdp": True, "fsdp_config": config, "save_strategy": "steps", "save_steps": SAVED}
        first = run(method, options, folder, world.size, **more)
        first.train()
        assert all(hasattr(p, "placements") for p in first.model.parameters())
        optimizer = first.optimizer
        names = [n for group in optimizer.param_groups for n in group["param_names"]]
        again = run(method, options, folder, world.size, **more)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}")
        return weights(first.model), weights(again.model), names


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "galore": ("GaLoreAdamW", {"rank": 4, "projector": "svd"}, "SHARDED_STATE_DICT"),
    "frugal": ("FrugalAdamW", {"rank": 0.25}, "FULL_STATE_DICT"),
}


@pytest.mark.slow  # test_accelerate.py has what shards, clips, saves and reads, for the Trainer too
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_one_process_and_resumes(name: str, ranks: Worlds, tmp_path: Path) -> None:
    method, options, kind = CASES[name]
    one = run(method, options, str(tmp_path / "one"), 1)
    one.train()
    expected = weights(one.model)
    args = {"method": method, "options": options, "kind": kind, "folder": str(tmp_path / "two")}
    for first, again, names in ranks(2).run(name, sharded, **args).checked():
        assert sorted(names) == sorted(expected)
        for key, x in expected.items():
            assert float((first[key] - x).abs().max()) < 1e-10, key
            assert torch.equal(again[key], first[key]), key
