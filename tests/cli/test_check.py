"""`lowrank-optim check`: what is right passes, and an op that is wrong is seen, whichever it is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim import methods
from lowrank_optim.cli import check
from lowrank_optim.cli.main import main
from lowrank_optim.ops import dispatch, native, reference, schema
from lowrank_optim.ops.devices import as_accelerators
from tests.cases import WHOLE_LAYERS

Op = Callable[..., Any]
CPU = torch.device("cpu")
MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "host": nullcontext,
    "accelerator": as_accelerators,
}
"""How a CPU searches: as a host does, or as an accelerator, with the ops of one."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def checked() -> bool:
    """Whether this is the run that is checked, and not the one it is compared with."""
    return os.environ.get(dispatch.VARIABLE) != "reference"


def spoiled(x: Tensor, before: Tensor) -> None:
    """A change that is a tenth too large, or codes and indices that belong to others."""
    if x.is_floating_point():
        x.copy_(before + 1.1 * (x - before))
    elif x.dtype != torch.bool:
        x.copy_(x.roll(1, -1) if x.dim() else x + 1)


def replace(name: str, by: Callable[[str, Op], Op], patch: pytest.MonkeyPatch) -> None:
    """An op of every backend by another."""
    for module in (native, reference):
        patch.setattr(module, name, by(name, getattr(module, name)))


def broken(name: str, op: Op) -> Op:
    """The op with what it writes, or returns, wrong in the run that is checked."""
    arguments = getattr(torch.ops.lowrank_optim, name).default._schema.arguments
    written = [n for n, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def call(*args: Any) -> Any:
        if not checked():
            return op(*args)
        outs = [x for n in written for x in args[n]]
        before = [x.clone() for x in outs]
        found = op(*args)
        for x, old in zip(outs, before, strict=True):
            spoiled(x, old)
        return None if found is None else [1.1 * x.roll(1, -1) for x in found]

    return call


@functools.cache
def callers() -> dict[str, list[tuple[str, check.Case]]]:
    """Of each op the runs that call it, and how the CPU searches in them."""
    found: dict[str, list[tuple[str, check.Case]]] = defaultdict(list)
    seen: set[str] = set()

    def heard(name: str, op: Op) -> Op:
        def call(*args: Any) -> Any:
            seen.add(name)
            return op(*args)

        return call

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in schema.SCHEMAS:
            replace(name, heard, patch)
        for mode, within in MODES.items():
            for case in check.cases(methods.__all__, CPU):
                seen.clear()
                with within():
                    check.ways(case, CPU)
                for name in seen:
                    found[name].append((mode, case))
    return found


def test_what_is_right_passes() -> None:
    said = run("--device", "cpu", "--optimizer", "GaLoreAdamW8bit", "--optimizer", "FrugalSGD")
    assert said.exit_code == 0, said.output
    assert "cpu, float32: native" in said.output
    assert said.output.endswith("All 3 runs on cpu are those of plain torch.\n")


def test_an_op_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    replace("adamw_direction_8bit_", broken, monkeypatch)
    said = run("--optimizer", "GaLoreAdamW8bit")
    assert said.exit_code == 1
    assert "WRONG" in said.output and "1 of 1 runs on cpu are not" in said.output
    assert check.ISSUES in said.output


def test_an_op_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(native, "adamw_direction_8bit_", fails)
    said = run("--optimizer", "GaLoreAdamW8bit")
    assert said.exit_code == 1
    assert "RuntimeError: no kernel image is available  WRONG" in said.output


def test_weights_that_are_not_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compares with NaN: the first, finite, weight must not hide it."""
    ways = check.ways

    def last(case: check.Case, device: torch.device) -> list[Tensor]:
        *others, x = ways(case, device)
        return [*others, x * float("nan") if checked() else x]

    monkeypatch.setattr(check, "ways", last)
    said = run("--optimizer", "FrugalSGD")
    assert said.exit_code == 1 and "nan  WRONG" in said.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer", "GaloreAdamW"], "did you mean GaLoreAdamW?"),
        (["--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: Torch not compiled with CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA"),
        ),
    ],
)
def test_what_cannot_be_checked_is_one_line(arguments: list[str], words: str) -> None:
    said = run(*arguments)
    assert said.exit_code == 2 and words in said.output and said.output.count("\n") == 1


def test_nothing_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    said = run("--device", "cpu")
    assert said.exit_code == 2 and "plain torch serves the CPU here" in said.output
    assert os.environ[dispatch.VARIABLE] == "reference"


@pytest.mark.slow
def test_every_op_is_in_a_run() -> None:
    assert sorted(callers()) == sorted(schema.SCHEMAS)


@pytest.mark.slow
@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_any_op_that_is_wrong_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = callers()[name]
    replace(name, broken, monkeypatch)
    for mode, case in runs:
        with MODES[mode]():
            right, _ = check.verdict(case, CPU)
        if not right:
            return
    pytest.fail(f"none of {len(runs)} runs shows it")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", check.cases(methods.__all__, CPU), ids=str)
def test_a_run_is_that_of_plain_torch(case: check.Case, mode: str) -> None:
    """With room: another device rounds otherwise."""
    with MODES[mode]():
        assert check.difference(case, CPU) <= case.allowed / 2
        moved = [bool(x.any()) for x in check.ways(case, CPU)]
    assert any(moved) if case.name in WHOLE_LAYERS else all(moved)


class Rounding(TorchDispatchMode):
    """Products and factorisations of another device: those of a matrix that is nearly the same.

    A stable routine gives the exact result for ``A + E`` with E in the order of the rounding of A,
    but which E depends on the device. So does the order of a sum.
    """

    WITHIN = ("mm", "bmm", "addmm", "baddbmm", "_linalg_svd", "_linalg_eigh", "linalg_qr")
    SIZE = 8 * torch.finfo(torch.float32).eps

    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.WITHIN:
            args = [self.nearly(x) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))

    def nearly(self, x: Tensor) -> Tensor:
        """``x`` and noise of ``SIZE`` of its norm, of a symmetric matrix symmetric."""
        if x.dtype != torch.float32 or x.dim() < 2:
            return x
        noise = torch.randn(x.shape, generator=self.draws) / sum(x.shape[-2:]) ** 0.5
        if x.shape[-1] == x.shape[-2] and torch.allclose(x, x.mT):
            noise = (noise + noise.mT) / 2
        return x + self.SIZE * torch.linalg.matrix_norm(x, 2)[..., None, None] * noise


@pytest.mark.slow
@pytest.mark.parametrize("case", check.cases(methods.__all__, CPU), ids=str)
def test_a_device_that_rounds_otherwise_passes(case: check.Case) -> None:
    """No run hangs on an order of singular values, a sign or a code that rounding decides."""
    with warnings.catch_warnings(), check.plain_torch(torch.device("cuda")):
        warnings.simplefilter("ignore")
        expected = check.ways(case, CPU)
        with Rounding():
            found = check.ways(case, CPU)
    assert check.furthest(found, expected) <= case.allowed / 2


@pytest.mark.slow
def test_kernels_of_triton_pass() -> None:
    told = {"TRITON_INTERPRET": "1", dispatch.VARIABLE: "triton"}
    names = ("GaLoreAdamW8bit", "FiraAdamW8bit", "FrugalAdamW8bit", "DCTAdamW8bit", "SSTAdamW8bit")
    command = [sys.executable, "-m", "lowrank_optim", "check", "--device", "cpu"]
    command += [word for name in names for word in ("--optimizer", name)]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu, float32: triton" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu() -> None:
    said = run("--device", "cuda")
    assert said.exit_code == 0, said.output
