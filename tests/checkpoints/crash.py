"""A run that saves after every step, and may be told where to kill itself: see test_crash.py.

python -m tests.checkpoints.crash FOLDER MODE [run|save AT]
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_optim import GaLoreAdamW8bit, attach_in_backward

STEPS, PIECES = 9, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(folder: Path, what: Any, torn: bool) -> None:
    """To a temporary name, then renamed: a name that exists is a checkpoint that is whole."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    data = buffer.getvalue()
    partial = folder / "last.pt.partial"
    with partial.open("wb") as file:
        file.write(data[: len(data) // 2])
        if torn:
            file.flush()
            die()
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / "last.pt")


def main(folder: Path, mode: str, where: str = "", at: int = -1) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 96))
    optimizer = GaLoreAdamW8bit(model.parameters(), lr=1e-2, rank=48, update_proj_gap=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    if mode != "plain":
        attach_in_backward(optimizer, mode, accumulation_steps=PIECES)  # type: ignore[arg-type]
    start = 0
    if (folder / "last.pt").exists():
        start, *states = torch.load(folder / "last.pt", weights_only=True)
        for holder, state in zip((model, optimizer, scheduler), states, strict=True):
            holder.load_state_dict(state)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        for piece in torch.randn(PIECES, 8, 96, generator=generator):
            loss = (model(piece) - piece.flip(-1)).square().mean() / PIECES
            if where == "run" and step == at:
                model[0].weight.register_post_accumulate_grad_hook(lambda _: die())
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        states = [x.state_dict() for x in (model, optimizer, scheduler)]
        save(folder, [step + 1, *states], where == "save" and step == at)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:4], *map(int, sys.argv[4:5]))
