"""How a parameter lies in memory is nothing to its numbers: steps to the bit as of one by rows.

In Triton's interpreter a CPU is taken for an accelerator; elsewhere for a host, and then for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import ops
from lowrank_optim.ops.stacked import in_lines
from tests import cases
from tests.compare import assert_close
from tests.ops.interpreted import INTERPRETED
from tests.ops.ops_cases import strided

LAST = torch.channels_last
DENSE: dict[str, Any] = {"rank": None}
FORMS: dict[str, tuple[tuple[int, ...], dict[str, Any], torch.dtype]] = {
    "a bias": ((10,), {}, torch.float32),
    "dense": ((3, 5, 7), DENSE, torch.bfloat16),
    "channels last": ((3, 5, 2, 4), DENSE, torch.float32),
    "a matrix": ((6, 9), {}, torch.float32),
    "a tall matrix": ((40, 12), {}, torch.float32),
    "a tall matrix that does not decay": ((40, 12), {"weight_decay": 0.0}, torch.float32),
    "a matrix that does not decay": ((6, 9), {"weight_decay": 0.0}, torch.float32),
    "experts": ((2, 6, 9), {}, torch.float32),
    "by its sign": ((6, 9), {"stochastic_rounding": True}, torch.bfloat16),
}
RULES = ("GaLoreAdamW", "GaLoreAdafactor", "GaLoreSGD", "GaLoreLion", "GaLoreAdamW8bit")
"""What a class adds to them is of matrices, and nothing to a bias."""


def slow_but(name: str, form: str) -> Any:
    """Of each rule a bias, and every form of one of them, in the default run."""
    first = name == RULES[0] or (name in RULES and form == "a bias")
    return pytest.param(name, form, marks=() if first else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:.*(does not use|has no effect)")
@pytest.mark.parametrize(
    ("name", "form"), [slow_but(name, form) for name in cases.method_names() for form in FORMS]
)
def test_layouts_step_alike(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was another kernel, or another product, that rounded otherwise."""
    if INTERPRETED:
        monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "triton")
    for accelerated in (True,) if INTERPRETED else (False, True):
        cases.branching(monkeypatch, lambda _, own=accelerated: own)  # type: ignore[misc]
        compare(name, form, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*(does not use|has no effect)")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RULES)
def test_layouts_step_alike_on_a_gpu(name: str, form: str) -> None:
    compare(name, form, "cuda")


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (4, 1), (1, 4), (2, 1, 1), (1, 1, 1), (2, 0, 3)])
def test_lifts_into_one_entry_or_none(shape: tuple[int, ...]) -> None:
    """Of these any strides are rows and columns, and there is nothing to copy."""
    w = strided(torch.randn(shape, dtype=torch.float64), "slice")
    p, n = (torch.randn(*shape[:-2], *x).double() for x in ((shape[-2], 2), (2, shape[-1])))
    want = 0.5 * w - 2.0 * (p @ n)
    ops.lift_add_(w, p, n, None, 0.5, -2.0, None)
    assert_close(w, want)


def compare(name: str, form: str, device: str) -> None:
    shape, options, dtype = FORMS[form]
    options = {"weight_decay": 0.1, "update_proj_gap": 2, **options}
    if name == "GaLoreAdafactor":
        options["scale_parameter"] = True
    other = form if form == "channels last" else "slice"
    found = [run(name, shape, dtype, how, options, device) for how in ("rows", other)]
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def run(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    how: str,
    options: dict[str, Any],
    device: str,
) -> list[Tensor]:
    """Weights and state of two parameters, whose gradients lie as autograd leaves them."""

    def laid(x: Tensor) -> Tensor:
        return strided(x, how) if how != "channels last" else x.to(memory_format=LAST)

    starts = [cases.parameter(shape, dtype, seed=n).detach().to(device) for n in range(2)]
    params = [nn.Parameter(laid(x)) for x in starts]
    group = {"params": params, **{k: x for k, x in options.items() if k == "rank"}}
    given = {k: x for k, x in options.items() if k != "rank"}
    optimizer = cases.build(name, [group], **given)
    for row in cases.gradients((2, *shape), 3, dtype):
        row = row.to(device)
        optimizer.zero_grad()
        sum((p * g).sum() for p, g in zip(params, row, strict=True)).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert all(p.is_contiguous() == (how == "rows") for p in params)
    return [x for p in params for x in (p.detach(), *optimizer.state[p].values())]


def test_lines_are_found_by_places() -> None:
    """In lines: entries follow each other by rows, or by columns, whatever strides say of sides."""
    memory, found = torch.zeros(64), set()
    sides = (0, 1, 2, 3)
    for (m, n), (down, across) in product(product(sides, sides), product(range(5), repeat=2)):
        places = [[i * down + j * across for j in range(n)] for i in range(m)]
        by_rows = [place for row in places for place in row]
        by_columns = [row[j] for j in range(n) for row in places]
        lines = [*range(m * n)] in (by_rows, by_columns)
        for flip in (False, True):
            w = memory.as_strided((m, n), (down, across))
            assert in_lines(w.mT if flip else w) == lines, (m, n, down, across)
        found.add(lines)
    assert found == {True, False}
