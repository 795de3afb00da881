"""``lowrank-optim check``: short runs of every optimizer on a device, beside plain torch.

What a user's own device, driver and versions compute is held to the reference there, with nothing
but the installed package.
"""

from __future__ import annotations

import inspect
import io
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

import click
import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import methods
from lowrank_optim.backward import attach_in_backward
from lowrank_optim.cli.check_inputs import GAP, RANK, SHAPES, SIZE, STEPS, gradients, weights
from lowrank_optim.cli.errors import Refused, nearest
from lowrank_optim.ops import reference
from lowrank_optim.ops.__main__ import main as say_backends
from lowrank_optim.ops.devices import as_accelerators
from lowrank_optim.ops.dispatch import VARIABLE, serving
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.subspaces import PROJECTORS

EPS = 1e-2
"""A fifth of a usual coordinate: Adam makes a short step of one near zero, not one of its sign."""
ROUNDING, SIGNS, NARROW = 1e-3, 2e-2, 5e-2
"""What two ways of a weight may differ by, as a share of one: in float32; where signs of what is
near zero are taken; where another order of a sum may be the next code, or the next bfloat16."""
Mode = Literal["project", "step"]
ISSUES = "https://github.com/lowrank-optim/lowrank-optim/issues"


@dataclass(frozen=True)
class Case:
    """A run: a class, and what it is given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    """Of weights and gradients."""
    in_backward: Mode | None = None

    def __str__(self) -> str:
        told = [self.name, *(f"{key}={value!r}" for key, value in self.options.items())]
        if self.in_backward is not None:
            told.append(f"in backward: {self.in_backward}")
        if self.dtype != torch.float32:
            told.append(f"{str(self.dtype).removeprefix('torch.')} weights")
        return ", ".join(told)

    @property
    def allowed(self) -> float:
        """The largest difference that is rounding."""
        if any(x in str(self) for x in ("8bit", "4bit", "bfloat16")):
            return NARROW
        return SIGNS if self.name.startswith("Frugal") or "Lion" in self.name else ROUNDING


BESIDE = (
    *(Case("GaLoreAdamW", {"projector": name}) for name in PROJECTORS),
    Case("GaLoreAdamW", {"state_dtype": "bfloat16"}),
    Case("GaLoreAdamW", {"state_dtype": "4bit"}),
    Case("GaLoreAdamW", {"state_device": "cpu"}),
    Case("GaLoreAdamW", {"stochastic_rounding": True}, torch.bfloat16),
    Case("GaLoreAdamW", in_backward="project"),
    Case("GaLoreAdamW", in_backward="step"),
    Case("GaLoreSGD", {"momentum": 0.9}),
    Case("GaLoreSGD", {"momentum": 0.9, "state_dtype": "8bit"}),
    Case("GaLoreLion", {"state_dtype": "8bit"}),
    Case("FrugalAdamW", {"projector": "rsvd"}),
    Case("FrugalAdamW", {"projector": "columns"}),
    Case("DCTAdamW", {"update_proj_gap": 1}),
)
"""Runs of what classes do not do by default: every op is in one (``tests/cli/test_check.py``)."""


def cases(names: Sequence[str], device: torch.device) -> list[Case]:
    """All runs of classes: each as it is, and with bfloat16 weights, and those beside."""
    found = [Case(name) for name in names]
    found += [Case(name, dtype=torch.bfloat16) for name in names if not name.endswith("8bit")]
    found += [case for case in BESIDE if case.name in names]
    if device.type == "cuda" and "GaLoreAdamW" in names:
        found.append(Case("GaLoreAdamW", {"capturable": True}))
    return found


def steps_of(make: Callable[[], LowRankOptimizer], params: Sequence[nn.Parameter]) -> None:
    """Steps on gradients that are given."""
    grads = [gradients(shape, seed) for seed, shape in enumerate(SHAPES)]
    optimizer = make()
    for step in range(STEPS):
        if step == GAP + 1:
            kept = io.BytesIO()
            torch.save(optimizer.state_dict(), kept)
            kept.seek(0)
            optimizer = make()
            optimizer.load_state_dict(torch.load(kept, weights_only=True))
        for p, own in zip(params, grads, strict=True):
            p.grad = own[step].to(p)
        optimizer.step()


def steps_inside(
    mode: Mode, make: Callable[[], LowRankOptimizer], params: Sequence[nn.Parameter]
) -> None:
    """Steps inside backward, each of two micro-batches that add up to the gradients given."""
    grads = [gradients(shape, seed) for seed, shape in enumerate(SHAPES)]
    optimizer = make()
    attach_in_backward(optimizer, mode, accumulation_steps=2)
    for step in range(STEPS):
        for share in (0.25, 0.75):
            sums = [(p * own[step].to(p)).sum() for p, own in zip(params, grads, strict=True)]
            torch.autograd.backward([share * x for x in sums])
        optimizer.step()
        optimizer.zero_grad()


def ways(case: Case, device: torch.device) -> list[Tensor]:
    """How far each weight went in a run on a device."""
    starts = [x.to(device, case.dtype) for x in weights()]
    params = [nn.Parameter(x.clone()) for x in starts]
    kind = getattr(methods, case.name)
    options: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "rank": RANK,
        "update_proj_gap": GAP,
    }
    known = inspect.signature(kind).parameters
    if "eps" in known and isinstance(known["eps"].default, float):
        options["eps"] = EPS
    if "scale_parameter" in known:  # steps are in shares of a weight's size
        options["lr"] /= SIZE
    options |= case.options
    if device.type == "cpu":  # steps that count on the device are those that the host counts
        options.pop("capturable", None)

    def make() -> LowRankOptimizer:
        return kind(params, **options)  # type: ignore[no-any-return]

    if case.in_backward is None:
        steps_of(make, params)
    else:
        steps_inside(case.in_backward, make, params)
    return [(p.detach() - x).cpu().double() for p, x in zip(params, starts, strict=True)]


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Within, the reference serves every op, and a CPU searches as ``device`` does."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        with as_accelerators() if device.type != "cpu" else nullcontext():
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def difference(case: Case, device: torch.device) -> float:
    """Between a run on a device and one of plain torch on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what these settings are not made for
        with plain_torch(device):
            expected = ways(case, torch.device("cpu"))
        found = ways(case, device)
    return furthest(found, expected)


def furthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of all weights, as a share of how far the weight went.

    One that is not finite is NaN or Inf.
    """
    pairs = zip(found, expected, strict=True)
    shares = [float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs]
    return max(shares, key=lambda share: (math.isnan(share), share))


def device_of(asked: str | None) -> torch.device:
    """The device to check.

    Raises:
        Refused: torch has no such device here, or its runs would be compared with themselves.
    """
    text = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"--device {text}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu" and serving(torch.float32, "cpu") is reference:
        raise Refused(
            "plain torch serves the CPU here, which is what runs are compared with: "
            "`python -m lowrank_optim.ops` says why no kernels do"
        )
    return device


def say_machine(device: torch.device) -> None:
    """Versions, the device, and what serves it: what a report of a fault needs."""
    click.echo(f"lowrank_optim {lowrank_optim.__version__}, torch {torch.__version__}", nl=False)
    click.echo(f", Python {platform.python_version()}, {platform.platform()}")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        click.echo(f"{device}: {card.name}, capability {card.major}.{card.minor}, {runtime}")
    say_backends()
    click.echo()


def verdict(case: Case, device: torch.device) -> tuple[bool, str]:
    """Whether a run is that of plain torch, and the figure or the error."""
    try:
        found = difference(case, device)
    except Exception as error:  # of a kernel, a compiler or a driver: the row says which
        return False, f"{type(error).__name__}: {shorten(str(error), 200)}"
    return found <= case.allowed, f"{found:.1e}"


@click.command()
@click.option("--device", help="What to check.  [default: cuda, or cpu where there is none]")
@click.option("--optimizer", "names", multiple=True, help="Of the classes; repeatable.")
@click.pass_context
def check(ctx: click.Context, device: str | None, names: tuple[str, ...]) -> None:
    """Run every optimizer for some steps on a device, and compare with plain torch on the CPU.

    Kernels are compiled, loaded and called as in training. The exit status is 1 if a run differs by
    more than rounding, or raises.
    """
    for name in names:
        if name not in methods.__all__:
            known = nearest(name, methods.__all__)
            raise Refused(f"--optimizer {name!r} is no class of lowrank_optim.methods{known}")
    place = device_of(device)
    say_machine(place)
    runs = cases(names or methods.__all__, place)
    width = max(len(str(case)) for case in runs)
    click.echo(f"{'run':<{width}}  allowed  difference")
    wrong = 0
    for case in runs:
        right, told = verdict(case, place)
        wrong += not right
        line = f"{case!s:<{width}}  {case.allowed:<7.0e}  {told}"
        click.echo(line if right else click.style(f"{line}  WRONG", fg="red"))
    if not wrong:
        click.echo(f"All {len(runs)} runs on {place} are those of plain torch.")
        return
    click.echo(
        f"{wrong} of {len(runs)} runs on {place} are not those of plain torch. Please report all "
        f"of this at {ISSUES}. {VARIABLE}=reference in the environment does without our kernels."
    )
    ctx.exit(1)
