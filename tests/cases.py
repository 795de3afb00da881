"""Registries as data: what is registered is tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import PROJECTORS, LowRankOptimizer, methods
from lowrank_optim.memory.world import sends_without_data
from lowrank_optim.ops import devices
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.tensors.matrix import PROJ_TYPES

__all__ = ["METHOD_ARGS", "PROJ_TYPES", "RULES", "SHAPES", "build", "gradients"]

SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (6, 11),
    "tall": (13, 7),  # odd on both sides: no kernel sees a multiple of its tile
    "square": (8, 8),
    "small": (3, 9),  # its smaller side is below the rank: clamped
    "experts": (3, 6, 10),
    "conv": (6, 4, 3, 3),
}
RANK = 4

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-8},
    "lion": {"betas": (0.8, 0.95)},
    "sgd": {"momentum": 0.9},
    "adafactor": {"beta1": 0.9},
}
"""Rule of each class and hyper-parameters at which its moments matter within a few steps."""

several_gpus = pytest.mark.skipif(
    not sends_without_data(), reason="collectives of torch 2.6 take no tensors without data"
)
"""Of estimates, and counts, of one of several GPUs."""

WHOLE_LAYERS = ("LisaAdamW", "LisaAdamW8bit", "BAdamW", "BAdamW8bit")
"""Classes whose layers take turns, vectors with the matrices, whatever the projector."""

ALL: dict[str, Any] = {"active_layers": 1000, "outside": "turns", "on_refresh": "keep"}
"""Layers that are always active, so that every tensor moves; turns have tests of their own."""

METHOD_ARGS: dict[str, dict[str, Any]] = {
    **{name: {**ALL} for name in WHOLE_LAYERS},
    "DCTAdamW": {"projector": "dct"},
    "DCTAdamW8bit": {"projector": "dct"},
    # its own step size would make ``lr`` meaningless
    "GaLoreAdafactor": {"relative_step": False, "scale_parameter": False},
    "FrugalSGD": {"momentum": 0.9},
    "GaLoreSGD": {"momentum": 0.9},
    # what is drawn depends on a parameter's place among the others
    "SSTAdamW": {"steps_per_iteration": 3, "warmup_steps": 1, "sampling": "sequential"},
    "SSTAdamW8bit": {"steps_per_iteration": 3, "warmup_steps": 1, "sampling": "sequential"},
    # the decay of a drop-in; that of the factors has tests of its own
    "SwitchLoRAAdamW": {"decay_on": "weight"},
    "SwitchLoRAAdamW8bit": {"decay_on": "weight"},
}
"""What a class needs beyond ``lr`` for the general contract; most need nothing."""


DECAYS_FACTORS = ("SSTAdamW", "SSTAdamW8bit")
"""Classes whose decay acts on factors: on W it differs by ``lr wd dW`` (oracles of their own)."""


def method_names() -> list[str]:
    """Every optimizer class that ``lowrank_optim.methods`` exports."""
    return list(methods.__all__)


def distinct_names() -> list[str]:
    """Those that differ where matrices are too small for codes: one class of 8 bits for all.

    Each of the others is then the class without them, under another name. Codes have tests of their
    own, in ``tests/stores``.
    """
    return [name for name in method_names() if not name.endswith("8bit") or name == NARROW]


NARROW = "GaLoreAdamW8bit"


def projecting_names() -> list[str]:
    """Those whose subspace is a projector, so that what is known of bases must hold."""
    own = LowRankOptimizer.subspace
    return [name for name in method_names() if getattr(methods, name).subspace is own]


def projector_names() -> list[str]:
    """Every registered projector, as of now."""
    return list(PROJECTORS)


def basis_names() -> list[str]:
    """Projectors on the columns of an orthonormal P."""
    return [name for name, cls in PROJECTORS.items() if issubclass(cls, Projector)]


SINGLE = ("randk", "block")
"""Projectors whose coordinates are entries by themselves: no row of them is a direction."""

CROSSED = ("GaLoreAdamW", "FiraAdamW", "FrugalAdamW", "DCTAdamW")
"""One method of each residual, which meet every projector."""


def pairs() -> list[tuple[str, str]]:
    """Every projecting method on a basis and on a set of indices; one of each on every projector.

    What a rule does to coordinates does not depend on where they are from, nor the other way.
    """
    return [
        (name, projector)
        for name in projecting_names()
        for projector in projector_names()
        if name in CROSSED or projector in ("svd", "columns")
    ]


OWN = {"FrugalAdamW": "block", "DCTAdamW": "dct"}
"""What these project on by default, where that is neither "svd" nor "columns"."""


def is_beyond(name: str, projector: str | None) -> bool:
    """Whether a pair repeats what two others measure: every method, and every projector, has one.

    Each residual meets each projector in ``tests/engine/test_product.py``, and each kind of state.
    A rule is the same on indices as on a basis, and a class of 8 bits is another's with the moments
    of large matrices in codes.
    """
    if name in CROSSED[1:]:
        return projector not in ("svd", "columns", OWN.get(name))
    return name not in CROSSED and projector == "columns"


def params(rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Rows that begin with a method and a projector; those that are beyond are slow."""
    return [
        pytest.param(*row, marks=pytest.mark.slow if is_beyond(row[0], row[1]) else ())
        for row in rows
    ]


def in_turn(
    pairs: Iterable[tuple[str, str]], values: Sequence[Hashable]
) -> list[tuple[str, str, Any]]:
    """Each pair with one of ``values``, so that every name and every projector meets all of them.

    For what depends on method and value, or on projector and value, but not on all three.
    """
    met: Counter[tuple[str, Hashable]] = Counter()
    rows: list[tuple[str, str, Any]] = []

    def add(name: str, projector: str, value: Hashable) -> None:
        met.update([(name, value), (projector, value)])
        rows.append((name, projector, value))

    pairs = list(pairs)
    for name, projector in pairs:
        add(name, projector, min(values, key=lambda v: (met[name, v], met[projector, v])))
    for name, projector in pairs:
        for value in values:
            if not (met[name, value] and met[projector, value]):
                add(name, projector, value)
    return rows


def rank_for(projector: str | None, rank: Any) -> Any:
    """Blocks take a density: that of a lone tensor must round to 1, and of several some idle."""
    return 0.6 if projector == "block" and isinstance(rank, int) else rank


def build(name: str, params: Any, **options: Any) -> LowRankOptimizer:
    """The method ``name``, deterministic in exact arithmetic: SVD, published cadence."""
    own = {"lr": 1e-2, "rank": RANK, "update_proj_gap": 3, "projector": "svd", "stagger": False}
    chosen = {**own, **METHOD_ARGS.get(name, {}), **options}
    chosen["rank"] = rank_for(chosen["projector"], chosen["rank"])
    if not isinstance(params, Tensor):
        params = [_ranked(entry, chosen["projector"]) for entry in params]
    optimizer: LowRankOptimizer = getattr(methods, name)(params, **chosen)
    return optimizer


def _ranked(entry: Any, projector: str) -> Any:
    if isinstance(entry, dict) and "rank" in entry:
        return {**entry, "rank": rank_for(entry.get("projector", projector), entry["rank"])}
    return entry


def gradients(
    shape: Sequence[int], count: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Gradients with a common part and a decaying spectrum, so that a subspace means something."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    weights = 0.7 ** torch.arange(shape[-1] if shape else 1, dtype=torch.float64)
    out = []
    for _ in range(count):
        noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        x = common + 0.5 * noise
        out.append((x * weights if shape else x).to(dtype))
    return out


def matrices(x: Tensor) -> list[Tensor]:
    """A matrix, or each of the experts."""
    return list(x) if x.dim() == 3 else [x]


def parameter(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A parameter of standard normal entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    return torch.nn.Parameter(x)


def run(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> None:
    """Step once for each entry of ``grads``, which holds one gradient per parameter."""
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def train(
    name: str, start: Tensor, grads: Sequence[Tensor], **options: Any
) -> tuple[Tensor, LowRankOptimizer]:
    """A copy of ``start`` after the gradients, and its optimizer."""
    param = torch.nn.Parameter(start.detach().clone())
    optimizer = build(name, [{"params": [param], "rank": options.pop("rank", RANK)}], **options)
    run(optimizer, [param], [[g] for g in grads])
    return param.detach(), optimizer


def branching(patch: pytest.MonkeyPatch, on_accelerator: Callable[[Tensor], bool]) -> None:
    """Let the package take the CPU for a device that hosts may not wait for, or for a host."""
    forced = on_accelerator(torch.empty(0))
    patch.setattr(devices, "HOSTS", frozenset() if forced else frozenset({"cpu"}))
