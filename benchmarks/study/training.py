"""One run: trained, measured and kept in a file of its own, so that no run is made twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.bytes_task import Text, evaluate, load_text, make_model
from benchmarks.common import environment
from benchmarks.study.recipes import METHODS, Case
from benchmarks.study.sizes import Size
from lowrank_optim import __version__, memory

CPU = torch.device("cpu")
TASK = 1
"""Raise it with any change to the task or to a recipe: kept runs are of one task."""
Record = dict[str, Any]
Watch = Callable[[int, float], None]
"""Called after every step, with its number and its loss."""


def ignore(step: int, loss: float) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Trial:
    """What names a run."""

    size: Size
    case: Case
    lr: float
    seed: int

    def key(self) -> str:
        """The same for the same settings, task and version of the package."""
        named = {**asdict(self), "task": TASK, "version": __version__}
        del named["case"]["name"]
        text = json.dumps(named, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


TIMED_STEPS = 6


@cache
def text(device: torch.device = CPU, root: Path | None = None) -> Text:
    """The standard library, or the copy of it in ``root``, read once."""
    return load_text(root).to(device)


@cache
def machine(device: torch.device = CPU, compiled: bool = False) -> Record:
    """As the command began: a commit made while it runs is not what runs."""
    found = environment()
    if compiled:
        found["compiled"] = True
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


@dataclass(frozen=True)
class Place:
    """Where runs are made, and of which text: neither names a run."""

    device: torch.device = CPU
    stdlib: Path | None = None
    read_every: int = 1
    """Steps between two looks at the losses, for which a look makes an accelerator wait."""
    compiled: bool = False
    """The model by ``torch.compile``: the same equations in fewer passes, with other rounding."""


HERE = Place()


def rate(step: int, size: Size) -> float:
    """Linear warm-up, then a cosine down to ``floor``: the factor of step 0, 1, ..."""
    warmup = max(1, round(size.warmup * size.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, size.steps - warmup)
    return size.floor + (1 - size.floor) * 0.5 * (1 + math.cos(math.pi * done))


def state_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """By storage: what the optimizer holds on the device, and adapters beside the weights."""
    adapters = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    return memory.report(optimizer).total - memory.host_bytes(optimizer) + adapters


def train(trial: Trial, watch: Watch = ignore, place: Place = HERE) -> Record:
    """The run, as it is kept. A loss that is not finite ends it, and counts as infinite."""
    size, shape = trial.size, trial.size.shape
    model = make_model(shape, trial.seed).to(place.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        made = METHODS[trial.case.method].make(model, trial.lr, size, **trial.case.options)
        return _steps(trial, model, made.optimizer, made.after, watch, place)


def _steps(
    trial: Trial,
    model: nn.Module,
    optimizer: Optimizer,
    after: Callable[[int], None],
    watch: Watch,
    place: Place,
) -> Record:
    size, shape = trial.size, trial.size.shape
    words = text(place.device, place.stdlib)
    held = words.validation(size.windows, shape)
    unread: list[Tensor] = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, size))
    params = [*model.parameters()]  # whose turn it is to have gradients may change
    held_most = 0
    train_loss: list[float] = []
    if place.compiled:
        model = compiled(model, words.validation(shape.batch, shape))
    validation = [(0, evaluate(model, held))]  # type: ignore[arg-type]
    wall, spent = [0.0], [0.0]
    for step, window in enumerate(words.batches(size.steps, shape, trial.seed), start=1):
        begun, cpu = time.perf_counter(), time.process_time()
        loss = model(window)
        loss.backward()
        nn.utils.clip_grad_norm_(params, size.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        after(step)
        unread.append(loss.detach())
        looked = step % size.validate_every == 0 or step == size.steps
        if looked or step % place.read_every == 0:
            train_loss += torch.stack(unread).tolist()
            unread.clear()
        wall.append(wall[-1] + time.perf_counter() - begun)
        spent.append(spent[-1] + time.process_time() - cpu)
        if step % 10 == 1:  # layers that take turns have none of it at the end of one
            held_most = max(held_most, state_bytes(model, optimizer))
        if unread:
            continue
        watch(step, train_loss[-1])
        broken = not math.isfinite(sum(train_loss))
        if broken or looked:
            validation.append((step, evaluate(model, held)))  # type: ignore[arg-type]
        if broken:
            break
    final = validation[-1][1]
    finite = len(train_loss) == size.steps and math.isfinite(final)
    return {
        "key": trial.key(),
        "trial": asdict(trial),
        "task": TASK,
        "version": __version__,
        "environment": machine(place.device, place.compiled),
        "text": words.digest,
        "final_loss": final if finite else math.inf,
        "train_loss": train_loss,
        "validation": validation,
        "wall_seconds": [wall[step] for step, _ in validation],
        "cpu_seconds": [spent[step] for step, _ in validation],
        "state_bytes": max(held_most, state_bytes(model, optimizer)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def compiled(model: nn.Module, window: Tensor) -> nn.Module:
    """The model, compiled before the clock starts; no gradient of it is left."""
    made = torch.compile(model, dynamic=False)
    made(window).backward()
    model.zero_grad()
    return made  # type: ignore[return-value]


def timing(size: Size, case: Case) -> Trial:
    """A few steps at a small rate, whose CPU seconds are what counts."""
    return Trial(replace(size, steps=TIMED_STEPS, windows=1), case, 1e-4, 0)


def seconds_a_step(size: Size, case: Case, out: Path) -> float:
    """Of CPU, measured once and kept."""
    return float(run(timing(size, case), out)["cpu_seconds"][-1]) / TIMED_STEPS


def kept(trial: Trial, out: Path) -> Record | None:
    """The record of the run, if it was made."""
    path = out / f"{trial.key()}.json"
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    return record


def run(trial: Trial, out: Path, watch: Watch = ignore, place: Place = HERE) -> Record:
    """The record of the run: read if it was made, else made and written whole or not at all."""
    found = kept(trial, out)
    if found is not None:
        return found
    record = train(trial, watch, place)
    keep(record, out)
    return record


def keep(record: Record, out: Path) -> None:
    """Write a run, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{record['key']}.json"
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record))
    os.replace(part, path)
