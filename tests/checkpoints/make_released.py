"""Checkpoints of the installed version, kept for all later ones to load.

Run where the version that is released is installed, once a release::

    python tests/checkpoints/make_released.py

It writes ``tests/checkpoints/released/<version>/checkpoints.pt.xz``, beside this script: what
``torch.save`` makes of all cases by name, compressed. Each has all that is needed to go on: class,
arguments, weights, ``state_dict()``, a gradient of each parameter for three more steps, and the
weights that the version ends with. Nothing but torch and the public names of the package is
imported, so that any version can run it.
"""

from __future__ import annotations

import copy
import io
import lzma
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import methods
from lowrank_optim.nn import convert

RELEASED = Path(__file__).parent / "released"
FILE = "checkpoints.pt.xz"
GAP, ON, AFTER, MORE = 3, 3, 4, 3
"""A refresh comes at every third step: the next one is one in turn, or was one."""
UNIT = 32.0
"""Gradients are whole numbers of its inverse, which are a byte each in a file."""

SMALL = {"shapes": [(6, 11), (13, 7), (5,)], "rank": 3}
LARGE = {"shapes": [(8, 600), (5,)], "rank": 7, "dtype": "bfloat16"}
"""Coordinates of 4,200 entries, as moments of fewer than 4,096 have no codes; in half the bytes."""

OWN: dict[str, dict[str, Any]] = {
    "GaLoreAdafactor": {"relative_step": False, "scale_parameter": False, "beta1": 0.9},
    "GaLoreSGD": {"momentum": 0.9},
    "FrugalSGD": {"momentum": 0.9},
    "SSTAdamW": {"steps_per_iteration": GAP, "warmup_steps": 1},
    "SSTAdamW8bit": {"steps_per_iteration": GAP, "warmup_steps": 1},
    "SwitchLoRAAdamW": {"interval": 4, "freeze_steps": 2},
    "SwitchLoRAAdamW8bit": {"interval": 4, "freeze_steps": 2},
    "DCTAdamW": {"projector": "dct"},
    "DCTAdamW8bit": {"projector": "dct"},
    "FrugalAdamW": {"projector": "block", "density": 0.5},
    # what a basis leaves out of this gradient is rounding, and so are its signs
    "FrugalAdamW8bit": {"projector": "columns", "density": 0.9},
}
DEFAULT = {"projector": "svd", "update_proj_gap": GAP, "stagger": False}
"""What a class is made with, beside a rate and a decay: of its own, or of all that project."""

Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: list[Case] = [
    *(("GaLoreAdamW", {"projector": p}, {}) for p in lowrank_optim.PROJECTORS if p != "block"),
    *(("GaLoreAdamW", {"on_refresh": x}, {}) for x in ("project", "reset")),
    ("GaLoreAdamW", {"proj_type": "full"}, {}),
    *(("GaLoreAdamW", {"stagger": True}, {"named": named}) for named in (False, True)),
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ("GaLoreAdamW", {"stochastic_rounding": True}, {"dtype": "bfloat16"}),
    ("GaLoreAdamW8bit", {"on_refresh": "project"}, {"dtype": "float32"}),
    ("GaLoreAdamW", {"maximize": True}, {"shapes": [(3, 6, 10), (4, 3, 2, 2), ()]}),
    ("FiraAdamW", {"alpha_mode": "paper", "scaling": "matrix"}, {}),
    ("FrugalLion", {"projector": "columns"}, {}),
    ("FrugalAdamW", {"projector": "randk"}, {}),
    *(("DCTAdamW", {"error_feedback": x}, {}) for x in ("float32", "bfloat16", "8bit", "4bit")),
    ("SSTAdamW", {"factors": "active", "sampling": "sequential"}, {}),
    ("SSTAdamW", {"offload_inactive": True, "factor_dtype": "bfloat16"}, {}),
    ("SSTAdamW", {}, {"form": "sst"}),
    ("SwitchLoRAAdamW", {"pool_device": "param", "order": "random"}, {}),
    ("SwitchLoRAAdamW", {}, {"form": "switchlora"}),
]
"""A class, its arguments, and what it trains; beside every class with what it needs."""


def cases() -> dict[str, Case]:
    """By name."""
    every: list[Case] = [(name, {}, {}) for name in methods.__all__]
    found = {}
    for name, options, trained in [*every, *CASES]:
        words = [str(x).replace("_", "-") for pair in options.items() for x in pair]
        words += [str(x) for key, x in trained.items() if key in ("form", "dtype")]
        words += ["named"] if trained.get("named") else []
        found["-".join([name, *words])] = (name, options, trained)
    return found


def model_of(saved: dict[str, Any]) -> nn.Module:
    """The parameters of a file, or layers of factors of its form; weights are to be loaded."""
    if saved["form"] is not None:
        return nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 6))
    dtype = getattr(torch, saved["dtype"])
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in saved["shapes"]]
    return nn.ParameterList([nn.Parameter(x.to(dtype)) for x in params])


def optimizer_of(saved: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """As the file says; of a form, ``model`` is converted in place."""
    cls, rank = getattr(lowrank_optim, saved["class"]), saved["rank"]
    if saved["form"] is not None:
        return cls(convert(model, saved["form"], rank=rank), **saved["options"])
    params: list[Any] = list(model.named_parameters() if saved["named"] else model.parameters())
    groups = [{"params": params[:-1], "rank": rank}, {"params": params[-1:]}]
    return cls(groups, **saved["options"])


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All of them, in the order of their numbers in a state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer, row: list[Tensor]) -> None:
    """One step with gradients as a file has them."""
    for param, grad in zip(params_of(optimizer), row, strict=True):
        param.grad = (grad.double() / UNIT).to(param.dtype)
    optimizer.step()


def machine() -> str:
    """What the bits of a product and of a decomposition depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {_processor()}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Decompositions of LAPACK differ in their last bits from one number of threads to another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return named[0] if named else platform.processor()


def _gradient(param: Tensor, seed: int) -> Tensor:
    """A common part, noise of another seed, and rows that become smaller: singular values part."""
    common = torch.randn(param.shape, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    x = common + 0.5 * noise
    if x.dim() > 1:
        falling = 0.8 ** torch.arange(x.shape[-2], dtype=x.dtype)
        x = x * falling.unsqueeze(-1)
    return (x * UNIT).round().clamp(-127, 127).to(torch.int8)


def made(place: int, name: str, options: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """A run of the version: what it is at its checkpoint, and its weights three steps later."""
    own = OWN.get(name, {})
    projects = not name.startswith(("SST", "SwitchLoRA"))
    known = {"lr": 1e-2, "weight_decay": 0.1, **(DEFAULT if projects else {}), **own, **options}
    saved: dict[str, Any] = {
        "machine": machine(),
        "class": name,
        "options": known,
        "steps": (ON, AFTER)[place % 2],
        "form": None,
        "named": False,
        "dtype": "float32",
        **(LARGE if name.endswith("8bit") else SMALL),
        **trained,
    }
    if "density" in known:
        saved["rank"] = known["density"]
    torch.manual_seed(1)
    model = model_of(saved)
    optimizer = optimizer_of(saved, model)
    rows = [
        [_gradient(p, 10 * n + i) for i, p in enumerate(params_of(optimizer))]
        for n in range(saved["steps"] + MORE)
    ]
    for row in rows[:-MORE]:
        step(optimizer, row)
    # further steps write these tensors
    saved |= copy.deepcopy({"weights": model.state_dict(), "state": optimizer.state_dict()})
    for row in rows[-MORE:]:
        step(optimizer, row)
    return {**saved, "gradients": rows[-MORE:], "ends": dict(model.state_dict())}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases of a version, by the reader of torch that runs nothing."""
    data = lzma.decompress((folder / FILE).read_bytes())
    found: dict[str, dict[str, Any]] = torch.load(io.BytesIO(data), weights_only=True)
    return found


def main() -> None:
    """Write the folder of the version that is installed."""
    folder = RELEASED / lowrank_optim.__version__
    folder.mkdir(parents=True)
    with one_thread():
        found = {name: made(place, *case) for place, (name, case) in enumerate(cases().items())}
    buffer = io.BytesIO()
    torch.save(found, buffer)
    data = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    (folder / FILE).write_bytes(data)
    print(f"{folder / FILE}: {len(found)} cases, {len(data) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
