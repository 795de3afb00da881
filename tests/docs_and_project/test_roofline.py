"""The model of a step: what is counted is what hand arithmetic says, and an added pass is seen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks import kernels, roofline
from benchmarks.counting import Launches, pretended_accelerator
from benchmarks.op_costs import MATRIX, SCALAR, Kernel, floor, package_kernels
from benchmarks.roofline import Counted, Device, count, seconds
from lowrank_optim.engine import project
from lowrank_optim.ops import dispatch
from lowrank_optim.ops.passing import named
from lowrank_optim.ops.schema import ON_DEVICE, SCHEMAS

DOCS = Path(__file__).parents[2] / "docs"
M, N, R, W = 64, 160, 8, 2


def totals(seen: Counted, *ops: str) -> tuple[float, float]:
    """Bytes and launches of some ops."""
    own = [(n, k) for n, k in seen.kernels if k.op in ops]
    return sum(n * k.bytes for n, k in own), sum(n * k.launches for n, k in own)


def by_hand() -> dict[str, tuple[int, int, int]]:
    """Bytes, launches and flops of each op of a GaLore step of one matrix: bfloat16, moments not.

    ``P^T G``; the norm of its coordinates; AdamW on them, out in bfloat16; and ``d W - s P N``,
    whose factors are on the device, as a flag there decides whether the weights decay.
    """
    low, matrix, basis = R * N, M * N, M * R
    return {
        "mm": (W * (matrix + basis + low), 1, 2 * M * N * R),
        "adamw_direction_": (W * low + 16 * low + W * low + 1, 1, 10 * low),
        "addmm_": (W * (2 * matrix + basis + low) + 2 * 4, 1, 2 * M * N * R),
        "_foreach_norm": (W * low + W, 2, 0),
    }


@pytest.mark.parametrize("forced", ["native", "reference"])
def test_what_serves_the_host_decides_nothing(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what it has compiled: what is counted are Triton's kernels."""
    plain = count("DCT, gap 1", [(M, N)], [(N,)], R)
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    assert count("DCT, gap 1", [(M, N)], [(N,)], R) == plain


def test_one_galore_matrix_by_hand() -> None:
    """Nothing else touches the matrix or its coordinates."""
    found = count("GaLore", [(M, N)], [], R)
    for op, (moved, launches, flops) in by_hand().items():
        assert totals(found, op) == (moved, launches), op
        assert sum(k.flops for _, k in found.kernels if k.op == op) == flops, op
    assert found.flops == 4 * M * N * R
    assert {k.unit for _, k in found.kernels if k.op in ("mm", "addmm_")} == {MATRIX}
    others = [k for _, k in found.kernels if k.op not in by_hand()]
    assert all(k.bytes <= 16 for k in others), others
    # the basis is kept as the weights are
    assert found.least == W * (3 * M * N + M * R) + 2 * 8 * R * N


def test_where_products_read_no_factors_the_decay_is_a_pass() -> None:
    """As on MI300X: weights read and written once more, one launch for the bucket."""
    found = count("GaLore", [(M, N)] * 3, [], R)
    ops = [[k for _, k in own if k.op == "decay_"] for own in (found.kernels, found.elsewhere)]
    assert [(k.bytes, k.launches) for own in ops for k in own] == [(3 * (2 * W * M * N + 1), 1)]
    both = found.kernels, found.elsewhere
    here, there = ([k.bytes for _, k in own if k.op == "addmm_"] for own in both)
    assert sum(here) - 4 * 4 == sum(there)  # three decays, and one step size
    assert len(here) == 1 and len(there) == 3
    mi300 = roofline.DEVICES[-1]
    assert not mi300.factors and all(d.factors for d in roofline.DEVICES[:-1])
    large = count("GaLore", [(4096, 11008)], [], 1024)
    assert large.present(mi300) > 1.1 * large.present(mi300._replace(factors=True))


def test_one_matrix_of_cosines_by_hand() -> None:
    """The transforms of the gradient and back are of reals: torch makes no copy of a spectrum.

    What a refresh moves is kept before, indices, ages and moments: read once and written once.
    """
    found = count("DCT, gap 1", [(M, N)], [], R)
    low, matrix = R * N, M * N
    kept = 4 * R + 4 * R + 8 * low
    for op, (moved, launches) in {
        "fft_r2c": (2 * 8 * matrix, 2),
        "cosine_fold": ((W + 4) * matrix + W * low + 4 * matrix, 2),
        "cosine_add": ((4 + 2 * W) * matrix, 1),
        "_foreach_copy_": (2 * kept, 1),
    }.items():
        assert totals(found, op) == (moved, launches), op
    assert not [k for _, k in found.kernels if k.op.startswith(("fft_c2r", "copy of"))]


def test_one_matrix_of_vectors_by_hand() -> None:
    """What a step may switch is kept before, and no more: a vector of each factor at this interval.

    Moments start again with the counterpart, and all ages are kept. Factors are stepped where they
    lie: read once and written once, beside their directions and what the weights move by.
    """
    found = count("SwitchLoRA", [(M, N)], [], R)
    kept = 4 * (M + N) + 2 * 4 * (M + N) + 2 * 4 * R
    assert totals(found, "_foreach_copy_") == (2 * kept, 1)
    assert totals(found, "step_rows_") == ((4 + 4 + 4 + 2 * W) * R * (M + N), 2)
    assert totals(count("SST active", [(M, N)], [], R), "_foreach_copy_") == (2 * 4 * R, 1)


def test_adamw_is_what_it_must_move() -> None:
    """Four tensors read and three written, in as many launches as torch's tables of blocks take."""
    found = count("AdamW fused", [(M, N)] * 3, [], R)
    assert totals(found, "_fused_adamw_") == (3 * (7 * W * M * N + 4), 1)
    assert found.least == 3 * 7 * W * M * N
    large = count("AdamW fused", [(4096, 11008)], [], R)
    assert totals(large, "_fused_adamw_")[1] == -(-4096 * 11008 // 65536 // 320) == 3


def test_an_added_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the gradient, somewhere in a step, is its bytes twice and one launch."""
    before = count("GaLore", [(M, N)], [], R)
    begun = project.begun

    def slower(item: Any, state: Any, grad: Tensor, *others: Any) -> Any:
        return begun(item, state, grad.clone(), *others)

    monkeypatch.setattr(project, "begun", slower)
    after = count("GaLore", [(M, N)], [], R)
    assert after.bytes - before.bytes == 2 * W * M * N
    assert after.launches - before.launches == 1 and after.least == before.least


FAST = ("GaLore", "FRUGAL columns")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in roofline.METHODS
    ],
)
def test_no_step_moves_less_than_it_must(name: str) -> None:
    """And none is faster than its bound, on any device."""
    found = count(name, [(M, N), (N, M)], [(N,)], R)
    assert found.bytes >= found.least > 0 and found.launches > 0
    assert all(found.present(d) >= found.bound(d) for d in roofline.DEVICES)


@pytest.mark.parametrize(
    "name", ["GaLore", "GaLore 8-bit", "Fira", "FRUGAL basis", "FRUGAL columns"]
)
def test_a_step_for_a_graph_moves_what_a_plain_one_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step sizes that are on the device are read by the kernels that add: no pass is added.

    Matrices of a tile, and larger ones, were added to zeros or in torch's own operations: Fira
    moved twice the bytes, FRUGAL seven to ten times.
    """
    shapes = [(4096, 4096)] * 2 + [(4096, 11008)] * 2
    plain = count(name, shapes, [], 1024)
    method, options = roofline.METHODS[name]
    monkeypatch.setitem(roofline.METHODS, name, (method, {**options, "capturable": True}))
    graph = count(name, shapes, [], 1024)
    assert graph.bytes <= 1.1 * plain.bytes
    assert graph.launches <= plain.launches + 8


def test_layers_are_extrapolated() -> None:
    """Of a model of equal layers: what the sum of all of them would be counted as."""
    few, more, all_of_it = (count("GaLore", [(M, N)] * n, [], R) for n in (1, 2, 4))
    beyond = few.times(1 - 3) + more.times(3)
    assert beyond.least == pytest.approx(all_of_it.least)
    assert beyond.bytes == pytest.approx(all_of_it.bytes, rel=1e-3)
    assert beyond.flops == pytest.approx(all_of_it.flops)


def test_a_kernel_takes_its_longest_part() -> None:
    card = Device("card", bandwidth=1e9, matrix=1e12, scalar=1e10, source="")
    assert seconds(Kernel("a", 1, 10**9), card) == 1.0
    assert seconds(Kernel("a", 1, 0, 10**12, MATRIX), card) == 1.0
    assert seconds(Kernel("a", 1, 0, 10**10, SCALAR), card) == 1.0
    assert seconds(Kernel("a", 100, 1), card) == pytest.approx(100 * roofline.LAUNCH)
    kernels = ((2.0, Kernel("mm", 1, 10**9, 10**12, MATRIX)),)
    seen = Counted("x", 3e9, kernels, kernels)
    assert (seen.present(card), seen.bound(card)) == (2.0, 3.0)


# ------------------------------------------------------------------------------ ops


def test_lists_gathers_and_views() -> None:
    """Operands once, expanded dimensions once; what is only written is not read."""
    with pretended_accelerator():
        x, y = torch.empty(100, 8), torch.empty(100, 8)
        index = torch.empty(5, dtype=torch.int64)
        with Launches() as seen:
            x.mul(x)  # the same operand: read once
            x.mul(torch.empty(1, 8).expand(100, 8))
            x.copy_(y)
            x.zero_()
            x.index_select(0, index)
            x.mT.view(8, 100)
            torch._foreach_mul_([x, y], 2.0)
            y.add_(1)
            torch.mm(x, x.mT, out=torch.empty(100, 100))  # which is written, and not read
    sizes = [(k.op, k.bytes, k.launches) for k in seen.kernels]
    assert sizes == [
        ("mul", 6400, 1), ("mul", 6432, 1), ("copy_", 6400, 1), ("zero_", 3200, 1),
        ("index_select", 2 * 160 + 40, 1), ("_foreach_mul_", 12800, 1), ("add_", 6400, 1),
        ("mm", 6400 + 40000, 1),
    ]  # fmt: skip


def test_counters_are_of_the_host() -> None:
    """They have data, count, and launch nothing; ``add_`` of the optimizer's are such."""
    real = torch.zeros(())
    with pretended_accelerator(), Launches() as seen, unset_fake_temporarily():
        real += 1
    assert not seen.kernels and real == 1


def formula(text: str, sizes: dict[str, float]) -> float:
    """``3 w mn - w rn + 4 rn``, ``16 n / 256``, ``2.5 mn log2 m`` as numbers."""
    total, sign = 0.0, 1
    for part in re.split(r" ([+-]) ", text):
        if part in "+-":
            sign = 1 if part == "+" else -1
            continue
        part = re.sub(r"log2 (\w)", lambda x: str(torch.tensor(sizes[x[1]]).log2().item()), part)
        top, _, below = part.partition(" / ")
        value = 1 / float(below or 1)
        for factor in top.split():
            if re.fullmatch(r"[\d.]+", factor):
                value *= float(factor)
            else:
                for letter in factor:
                    value *= sizes[letter]
        total += sign * value
    return total


def documented() -> dict[str, tuple[str, str]]:
    """Ops of the table of docs/kernels.md: formulas of bytes and of flops."""
    text = (DOCS / "kernels.md").read_text(encoding="utf-8")
    table = text.split("## Equations and floors")[1].split("###")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            ops, *_, moved, flops = (x.strip() for x in line.strip("|").split("|"))
            for op in re.findall(r"`(\w+)`", ops):
                words = r" \+ \w+ search(es)?|one search| comparisons| \(.*|two exponentials.*"
                found[op] = moved, re.sub(words, "", flops)
    return found


def test_every_op_has_a_documented_floor() -> None:
    assert documented().keys() == SCHEMAS.keys()


OPTIONAL = ("row_eps", "row_scale", "finite", "usable", "plan", "factors", "across")


def example(op: str, m: int, n: int, r: int) -> dict[str, Any]:
    """Arguments of one matrix without data, in float32."""
    elements = op not in ("column_norms", "top_rows_", "decay_") and not op.startswith(
        ("lift", "coordinate", "cosine")
    )
    of_xs = {
        "column_norms": (m, n),
        **dict.fromkeys(("move_rows_", "row_dots_", "turn_rows_", "step_rows_"), (r, n)),
    }
    of_rows = ("cosine_project_", "cosine_top_project_", "turn_rows_", "step_rows_")
    of_outs = dict.fromkeys(of_rows, (r, n))
    of_outs |= {"row_dots_": (r,)}
    one = (1, n) if op == "residual_factors_" else (n,)
    flat = op == "direction_add_"
    shapes: dict[str, Any] = {
        "params": (n,) if flat else (m, n), "grads": one if elements else (m, n), "bases": (m, r),
        "updates": (n,) if flat else (r, n),
        "lows": one if elements else (r, n), "columns": (1, n), "norms": (),
        "lefts": (m, r), "rights": (r, n),
        "directions": (1, n) if op == "residual_factors_" else (r, n), "ys": (r, n),
        "ages": (r,), "counts": (r,), "eps_rows": (r,), "scale_rows": (r,),
        "exp_avgs": (n,) if elements else (r, n), "exp_avg_sqs": (n,) if elements else (r, n),
        "xs": of_xs.get(op, (n,)), "moments": (n,), "scores": (m,),
        "outs": of_outs.get(op, one), "lengths": (2, r), "moves": (2 * r, n),
    }  # fmt: skip
    given: dict[str, Any] = {}
    for argument in getattr(torch.ops.lowrank_optim, op).default._schema.arguments:
        name, plain = argument.name, argument.name.rstrip("12")
        if plain == "codes":
            given[name] = [torch.empty(n, dtype=torch.uint8)]
        elif plain == "scales":
            given[name] = [torch.empty(n // 256)]
        elif name in ("indices", "sources"):
            given[name] = [torch.empty(r, dtype=torch.int32)]
        elif name in (*OPTIONAL, *ON_DEVICE):
            given[name] = []
        elif name in ("table", "signed_map", "unsigned_map"):
            given[name] = torch.empty(256)
        elif name in shapes:
            given[name] = [torch.empty(shapes[name])]
        else:
            given[name] = {"free": "sign", "basis": "dct2"}.get(name, 0)
    if op == "cosine_top_project_":
        given |= {k: [torch.empty((), dtype=torch.bool)] for k in ("finite", "usable")}
    if op == "stochastic_round_":
        given["outs"] = [given["outs"][0].bfloat16()]
    return given


@pytest.mark.parametrize("op", SCHEMAS)
def test_floors_are_those_of_the_table(op: str) -> None:
    """Up to flags, maps, indices and rows of factors, which the table leaves out."""
    m, n, r = 1024, 1 << 20, 256
    with pretended_accelerator():
        given = example(op, m, n, r)
        found = floor(op, given)
    sizes = {"m": m, "n": n, "r": r, "w": 4}
    moved, flops = documented()[op]
    assert found.bytes == pytest.approx(formula(moved, sizes), rel=2e-3)
    wanted = 0.0 if flops == "0" or not flops else formula(flops, sizes)
    assert found.flops == pytest.approx(wanted, rel=1e-6)


def test_cosines_move_what_the_documentation_adds_up() -> None:
    """20 + 8 r / m bytes an element of float32 for scores and coefficients; 36 of two transforms.

    Two are made of what is too large to be kept.
    """
    m, n, r = 1024, 4096, 256
    with pretended_accelerator():
        found, large = (
            package_kernels("cosine_top_project_", example("cosine_top_project_", m, columns, r))
            for columns in (n, 1 << 20)
        )
        lifted = package_kernels("cosine_lift_add_", example("cosine_lift_add_", m, n, r))
    # a program of the scores adds up 128 columns, and its sums are written, read and added up
    top = 4 * m + 12 * r + 2  # what the choice reads and writes
    assert sum(k.bytes for k in found) == (20 + 8 * r / m + 8 / 128) * m * n + 4 * m + top
    assert sum(k.bytes for k in large) == (36 + 8 * r / m + 8 / 128) * m * (1 << 20) + 4 * m + top
    assert {k.launches for k in found} == {1}  # one tile
    around = sum(k.bytes for k in lifted if k.op in ("cosine_fold", "cosine_add"))
    assert around == (4 * r / m + 4 + 4 + 2 * 4) * m * n


def test_arguments_of_the_benchmark_are_those_of_the_ops() -> None:
    """They lagged behind a schema, and the benchmark failed."""
    for op, arguments in kernels.elementwise(4096).items():
        call = getattr(torch.ops.lowrank_optim, op)
        call(*arguments)
        assert floor(op, named(call.default, arguments, {})).bytes == kernels.moved(op, arguments)


def rows_of(page: str, start: str) -> list[Sequence[str]]:
    """Cells of the first table after a line of a page."""
    lines = (DOCS / page).read_text(encoding="utf-8").split(start)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_documented_table_has_every_method_and_device() -> None:
    """And says of AdamW what arithmetic does: 14 bytes of each of its weights."""
    hidden, mlp, layers = 4096, 11008, 32
    weights = layers * (4 * hidden**2 + 3 * hidden * mlp) + 2 * 32000 * hidden
    weights += (2 * layers + 1) * hidden
    table = rows_of("performance.md", "LLaMA-7B, rank 1024, bfloat16 weights, one step")
    assert [row[0] for row in table] == list(roofline.METHODS)
    assert float(table[0][1]) == pytest.approx(14 * weights / 2**30, rel=1e-3)
    times = rows_of("performance.md", "milliseconds by the model")
    assert [row[0] for row in times] == list(roofline.METHODS)
    assert len(times[0]) == 1 + len(roofline.DEVICES)
    for cell, card in zip(times[0][1:], roofline.DEVICES, strict=True):
        bound = 1e3 * 14 * weights / card.bandwidth
        assert float(cell.split(" / ")[0]) == pytest.approx(bound, rel=2e-3)


@pytest.mark.slow
def test_the_documented_table_is_what_the_command_prints() -> None:
    found = roofline.measure("llama-7b")
    assert rows_of("performance.md", "LLaMA-7B, rank 1024, bfloat16 weights, one step") == [
        list(row) for row in roofline.counts(found)
    ]
    assert rows_of("performance.md", "milliseconds by the model") == [
        list(row) for row in roofline.times(found)
    ]
