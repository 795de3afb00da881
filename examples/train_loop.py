"""A 7B model on a 24 GB card, in a plain training loop.

    python examples/train_loop.py --model huggyllama/llama-7b --data my_texts/
    python examples/train_loop.py --model mistralai/Mistral-7B-v0.1 --rank 512
    python examples/train_loop.py --model llama-7b --lr 5e-3 --scale 0.25   # from random weights

What it needs beside the step's own temporaries, before anything is downloaded:

    lowrank-optim memory --model llama-7b --rank 1024 --budget-gib 24 \
        --only "GaLore 8-bit" --tokens 1024 --checkpointing

Stop it whenever you like: run again, it goes on from its last checkpoint. Weights and losses are
those of a run that was never stopped, to the bit. (On a GPU some kernels add in an order that
changes from run to run; `torch.use_deterministic_algorithms(True)` takes that away, at a price.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shared import checkpoint_layers, load_model, load_tokenizer, options, read_files, windows
from torch.optim.lr_scheduler import LambdaLR

from lowrank_optim import GaLoreAdamW8bit, attach_in_backward, lowrank_groups


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, and return the losses of the steps that this call took."""
    args = options(__doc__).parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # ------------------------------------------------------------ the model
    model = load_model(args.model, args.seed, device)
    # Each layer keeps its input alone, and runs again inside backward.
    checkpoint_layers(model)
    model.train()

    # ------------------------------------------------------------ the data
    tokenizer = load_tokenizer(args.model)
    data = windows(read_files(args.data), tokenizer, args.tokens)
    print(f"{len(data):,} sequences of {args.tokens} tokens")

    # ------------------------------------------------------------ the optimizer
    # Linear layers get 8-bit moments in a subspace of `rank` directions, and all other parameters
    # (embeddings, head, norms) plain 8-bit AdamW.
    groups = lowrank_groups(model, rank=args.rank, no_decay=("bias", "norm"))
    optimizer = GaLoreAdamW8bit(
        groups,
        lr=args.lr,
        scale=args.scale,
        update_proj_gap=args.gap,
        weight_decay=0.0,
        # Updates far smaller than a bfloat16 weight are lost if they are rounded to the nearest.
        stochastic_rounding=True,
    )
    # Without this a 7B does not fit, whatever the optimizer: weights and gradients are 25 GiB. Each
    # gradient is replaced by its coordinates in the subspace as soon as it is complete; those of
    # the micro-batches add up, and step() clips their global norm.
    attach_in_backward(optimizer, mode="project", max_norm=1.0)
    schedule = LambdaLR(optimizer, lambda step: rate(step, args.warmup, args.steps))

    # ------------------------------------------------------------ where it stopped
    torch.manual_seed(args.seed)  # of dropout, where the model has any
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output / "checkpoint.pt"
    first = seen = 0
    if checkpoint.exists():
        first, seen = resume(checkpoint, model, optimizer, schedule)
        print(f"{checkpoint}: goes on after step {first}")

    # ------------------------------------------------------------ training
    losses = []
    for step in range(first + 1, args.steps + 1):
        total = torch.zeros((), device=device)
        for _ in range(args.micro_batches):
            ids = sequence(data, seen, args.seed)[None].to(device)
            loss = model(input_ids=ids, labels=ids).loss / args.micro_batches
            loss.backward()
            total += loss.detach()
            seen += 1
        optimizer.step()
        losses.append(report(step, float(total), schedule.get_last_lr()[0]))
        schedule.step()
        optimizer.zero_grad()
        if step % args.save_every == 0 or step == args.steps:
            save(checkpoint, model, optimizer, schedule, step=step, seen=seen)

    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    return losses


def rate(step: int, warmup: int, steps: int) -> float:
    """Of the learning rate: a rise, then a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def sequence(data: torch.Tensor, seen: int, seed: int) -> torch.Tensor:
    """The next one after `seen`: each epoch has an order of its own, known from its number."""
    epoch, place = divmod(seen, len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))
    return data[order[place]]


def report(step: int, loss: float, lr: float) -> float:
    """One line a step."""
    print(f"step {step:6,}   loss {loss:.4f}   lr {lr:.2e}", flush=True)
    if not math.isfinite(loss):
        raise SystemExit(f"step {step}: the loss is {loss}: the last checkpoint is from before")
    return loss


def save(path: Path, model: Any, optimizer: Any, schedule: Any, **counts: int) -> None:
    """Beside the last one, then in its place: a kill in between leaves that whole."""
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save({**state, "random": random, **counts}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def resume(path: Path, model: Any, optimizer: Any, schedule: Any) -> tuple[int, int]:
    """The steps taken and the sequences seen; all else is as it was when they had been."""
    found = torch.load(path, map_location="cpu", mmap=True)
    for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
        part.load_state_dict(found[name])
    torch.set_rng_state(found["random"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(found["random"]["cuda"])
    return found["step"], found["seen"]


if __name__ == "__main__":
    main()
