"""A run that saves every third step and may be told where a rank kills itself: test_faults.py.

python -m torch.distributed.run --nproc-per-node N -m tests.sharded.restarts FOLDER DIES_AT
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.sharded.ranks import World
from tests.sharded.training import Case, Trained

STEPS, EVERY = 11, 3
OPTIONS = {"stagger": True, "on_refresh": "project", "update_proj_gap": EVERY}
CASE = Case("GaLoreAdamW", OPTIONS, only=("wide", "tall"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def last(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: only those have such names."""
    found = sorted(folder.glob("step-??????"))
    return found[-1] if found else None


def state_of(trained: Trained) -> dict[str, Any]:
    assert trained.model is not None
    return {
        "model": get_model_state_dict(trained.model),
        "optimizer": get_optimizer_state_dict(trained.model, trained.optimizer),
    }


def save(trained: Trained, folder: Path, step: int) -> None:
    """Into a folder of its own, which gets its name once all ranks have written."""
    partial = folder / f"partial-{step:06d}"
    dcp.save(state_of(trained), checkpoint_id=partial)
    if dist.get_rank() == 0:
        os.replace(partial, folder / f"step-{step:06d}")


def resume(trained: Trained, folder: Path) -> int:
    """Load the newest checkpoint; the steps that it has taken."""
    found, model = last(folder), trained.model
    if found is None:
        return 0
    assert model is not None
    state = state_of(trained)
    dcp.load(state, checkpoint_id=found)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, trained.optimizer, state["optimizer"])
    return int(found.name.split("-")[1])


def train(
    world: World, folder: Path, dies_at: int = -1, case: Case = CASE
) -> dict[str, torch.Tensor]:
    """From the newest checkpoint to the end; whole weights.

    The last rank kills itself in the middle of step ``dies_at``, once in the life of a folder.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(case, world)
    died = folder / "died"
    for step in range(resume(trained, folder), STEPS):
        trained.backward(step)
        if step == dies_at and not died.exists():
            dist.barrier()  # nobody looks for the mark once it is there
            if world.rank == world.size - 1:
                died.touch()
                die()
        trained.optimizer.step()
        if step % EVERY == EVERY - 1:
            save(trained, folder, step + 1)
    return {name: p.detach().full_tensor() for name, p in trained.named.items()}  # type: ignore[attr-defined]


def main(folder: Path, dies_at: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    weights = train(World(dist.get_rank(), dist.get_world_size()), folder, dies_at)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
