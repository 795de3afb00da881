"""Digests of short runs of every class: a change that must not change numbers is held to them.

    python -m tests.trajectories record before.json    # on the old code
    python -m tests.trajectories compare before.json   # on the new, on the same machine

Digests are of bits, which another CPU or another BLAS may have otherwise, so none is kept here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer, attach_in_backward, methods
from lowrank_optim.nn import convert
from tests import cases

STEPS = 8
SHAPES = [(12, 40), (64, 256), (9,), (3, 8, 24), (24, 24), (6, 4, 3, 3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"on_refresh": "project", "stagger": True},
    {"on_refresh": "reset", "proj_type": "full", "maximize": True},
    {"state_dtype": "8bit"},
    {"state_dtype": "bfloat16", "stochastic_rounding": True, "proj_type": "reverse_std"},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "FiraAdamW": [{"alpha_mode": "paper"}, {"scaling": "matrix", "limiter": None}],
    "FrugalAdamW": [{"free_rule": "sgd"}, {"block_order": "mirror"}, {"free_rule": "none"}],
    "DCTAdamW": [{"error_feedback": k} for k in ("float32", "bfloat16", "8bit", "4bit")]
    + [{"transform": "fft", "update_proj_gap": 1}, {"slot_bias_correction": False}],
    "SSTAdamW": [{"factors": "active"}, {"negative": "flip", "sampling": "mixed"}],
    "SwitchLoRAAdamW": [{"interval": 4, "freeze_steps": 2}, {"restart_every": 3}],
    "GaLoreAdafactor": [{"beta1": None, "scale_parameter": True}],
}


INSIDE = ("GaLoreAdamW", "DCTAdamW", "GaLoreLion", "FiraAdamW", "FrugalAdamW", "SSTAdamW")
MODULES = {"SSTAdamW": "sst", "SwitchLoRAAdamW": "switchlora"}


def runs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Class, projector and options."""
    for name, projector in cases.pairs():
        for options in [*OPTIONS, *OWN.get(name, [])]:
            yield name, projector, options
    for name in ("GaLoreSGD", "GaLoreLion", "GaLoreAdafactor"):
        yield name, "dct", {}
    for name in cases.method_names():
        if (name, "svd") not in cases.pairs():
            for options in [*OPTIONS[:1], *OPTIONS[3:4], *OWN.get(name, [])]:
                yield name, "svd", options


def digest(tensors: Iterator[Tensor]) -> str:
    """Of the bits of tensors, in their order."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(str((tuple(x.shape), x.dtype)).encode())
        found.update(
            x.detach().contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        )
    return found.hexdigest()[:16]


def everything(optimizer: LowRankOptimizer) -> Iterator[Tensor]:
    """Parameters, then their states, by key."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p.reshape(-1)
            for _, value in sorted(optimizer.state.get(p, {}).items()):
                yield value.reshape(-1)


def weights(optimizer: LowRankOptimizer) -> Iterator[Tensor]:
    """Parameters alone."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p.reshape(-1)


def trained(
    name: str,
    projector: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: str = "cpu",
    gradients: Callable[..., list[Tensor]] = cases.gradients,
) -> LowRankOptimizer:
    """The optimizer after a run that is saved and loaded in the middle."""
    made = []
    for _ in range(2):
        params = [nn.Parameter(cases.parameter(shape, dtype).to(device)) for shape in SHAPES]
        rank = 0.5 if projector == "block" else 4
        made.append(cases.build(name, params, **{"projector": projector, "rank": rank, **options}))
    first, second = made
    grads = [gradients(shape, STEPS, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    for optimizer, steps in ((first, range(STEPS // 2)), (second, range(STEPS // 2, STEPS))):
        params = optimizer.param_groups[0]["params"]
        if optimizer is second:
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            buffer.seek(0)
            second.load_state_dict(torch.load(buffer))
            for mine, theirs in zip(params, first.param_groups[0]["params"], strict=True):
                mine.data.copy_(theirs.data)
        for step in steps:
            for p, own in zip(params, grads, strict=True):
                p.grad = own[step].clone().to(device)
            optimizer.step()
    return second


def network() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 24))


def inside_backward(name: str, mode: Any, device: str = "cpu") -> LowRankOptimizer:
    """A small network, micro-batches and all."""
    torch.manual_seed(0)
    net = network().to(device)
    optimizer = cases.build(name, net.named_parameters())
    attach_in_backward(optimizer, mode, accumulation_steps=2)
    for _ in range(STEPS):
        for _ in range(2):
            net(torch.randn(5, 24).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def in_modules(name: str, kind: str, device: str = "cpu") -> LowRankOptimizer:
    """A network whose linear layers are factors."""
    torch.manual_seed(0)
    net = network().to(device)
    optimizer: LowRankOptimizer = getattr(methods, name)(convert(net, kind, rank=4), lr=1e-2)
    for _ in range(STEPS):
        net(torch.randn(5, 24).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def digests() -> dict[str, str]:
    """Of all runs; a refusal is its message."""
    torch.set_num_threads(1)
    found = {}
    for name, projector, options in runs():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name} {projector} {options} {dtype}"
            try:
                found[key] = digest(everything(trained(name, projector, options, dtype)))
            except (ValueError, RuntimeError) as error:
                found[key] = str(error)
    for name in INSIDE:
        for mode in ("project", "step"):
            try:
                found[f"{name} {mode}"] = digest(everything(inside_backward(name, mode)))
            except ValueError as error:
                found[f"{name} {mode}"] = str(error)
    for name, kind in MODULES.items():
        found[f"{kind} modules"] = digest(weights(in_modules(name, kind)))
    return found


def main() -> None:
    """Record or compare."""
    (what, path) = sys.argv[1:]
    backend = os.environ.get("LOWRANK_OPTIM_BACKEND", "")
    found = digests()
    if what == "record":
        Path(path).write_text(json.dumps(found, indent=1))
        print(f"{len(found)} runs recorded {backend}")
        return
    known = json.loads(Path(path).read_text())
    differ = [key for key in sorted({*known, *found}) if known.get(key) != found.get(key)]
    for key in differ[:20]:
        print(f"{key}: {known.get(key)} before, {found.get(key)} now")
    print(f"{len(found)} runs, {len(differ)} differ {backend}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
