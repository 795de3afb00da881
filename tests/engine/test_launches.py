"""What a step of a bucket launches on an accelerator: two products a matrix, the rest a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lowrank_optim import LowRankOptimizer, ops
from lowrank_optim.ops import moving
from lowrank_optim.ops.reference import matrices
from lowrank_optim.residuals import Scaled
from lowrank_optim.residuals.base import OneByOne
from lowrank_optim.subspaces import fixed
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.coordinate import Coordinates
from lowrank_optim.subspaces.fixed import FixedBasis
from lowrank_optim.subspaces.projector import Projector
from tests import cases
from tests.compare import assert_close
from tests.engine.watch import Watch

STEPS = 3
LIFTS = ("lift_add_scaled_", "lift_add_sign_")
"""Products with what else happens to the weights in one kernel: they count as a GEMM."""
TAKES = ("index_select",)
"""A set of rows has no product: taking them from a gradient is in its place. Beside a basis, codes
of 4 bits are looked up so."""


class Row(NamedTuple):
    """A line of the table of docs/kernels.md."""

    name: str
    options: dict[str, Any]
    gemms: float
    """For each matrix."""
    others: int
    """For a bucket, however many matrices it has."""
    most: int
    """What ``others`` must stay within."""
    shape: tuple[int, int] = (48, 160)


DCT: dict[str, Any] = {"transform": "fft"}
EVERY: dict[str, Any] = {"update_proj_gap": 1}
"""A basis is chosen in each step."""
ON_DEVICE: dict[str, Any] = {"lr": torch.tensor(1e-2, dtype=torch.float64)}
ROUNDED: dict[str, Any] = {"stochastic_rounding": True}
"""Of bfloat16 weights."""
ROWS = [
    Row("GaLoreAdamW", {}, 2, 8, 12),
    Row("GaLoreAdamW8bit", {}, 2, 8, 12),
    Row("GaLoreAdamW", {"lr": torch.tensor(1e-2, dtype=torch.float64)}, 2, 12, 12),
    Row("GaLoreAdamW", {"state_dtype": "bfloat16"}, 2, 12, 12),
    Row("GaLoreAdamW", {"state_dtype": "4bit"}, 2, 86, 100),
    Row("GaLoreLion", {}, 2, 8, 12),
    Row("GaLoreAdamW", {"projector": "columns"}, 1, 6, 12),
    Row("FiraAdamW", {}, 2, 10, 20),
    Row("FiraAdamW8bit", {}, 2, 10, 20),
    Row("FiraAdamW", {"alpha_mode": "paper", "scale": 0.5}, 2, 12, 20),
    Row("FiraAdamW", {"scaling": "matrix"}, 2, 14, 20),
    Row("FiraAdamW", {"limiter": None}, 2, 12, 20),
    Row("FrugalAdamW", {"projector": "svd"}, 2, 5, 20),
    Row("FrugalAdamW8bit", {"projector": "svd"}, 2, 5, 20),
    Row("FrugalAdamW", {"projector": "columns"}, 1, 6, 20),
    Row("DCTAdamW", {"transform": "matmul"}, 2, 16, 20),
    Row("DCTAdamW8bit", {"transform": "matmul"}, 2, 16, 20),
    Row("DCTAdamW", DCT, 0, 14, 20),
    Row("DCTAdamW8bit", DCT, 0, 14, 20),
    Row("DCTAdamW", {**DCT, "slot_bias_correction": False}, 0, 12, 20),
    Row("GaLoreAdamW", {"projector": "dct"}, 0, 12, 20),
    Row("GaLoreAdamW", ROUNDED, 2, 11, 12),
    Row("GaLoreAdamW8bit", ROUNDED, 2, 11, 12),
    Row("GaLoreAdamW", {"lr": torch.tensor(1e-2), **ROUNDED}, 2, 13, 20),
    Row("GaLoreAdamW", {"projector": "columns", **ROUNDED}, 1, 8, 12),
    Row("FiraAdamW", ROUNDED, 2, 14, 20),
    Row("FiraAdamW", {**ON_DEVICE, **ROUNDED}, 2, 18, 20),
    Row("FrugalAdamW", {"projector": "svd", **ROUNDED}, 2, 9, 20),
    Row("FrugalAdamW", {"projector": "columns", **ROUNDED}, 1, 9, 20),
    Row("DCTAdamW", {**DCT, **EVERY, **ROUNDED}, 0, 18, 22),
    Row("GaLoreAdamW", {"proj_type": "full"}, 4, 8, 12),
    Row("FiraAdamW", ON_DEVICE, 2, 14, 20),
    Row("FrugalAdamW", {"projector": "svd", **ON_DEVICE}, 2, 9, 20),
    Row("FrugalAdamW", {"projector": "columns", **ON_DEVICE}, 1, 10, 20),
    Row("FrugalAdamW", {"projector": "svd", "free_rule": "sgd"}, 2, 7, 20),
    Row("DCTAdamW", {"transform": "matmul", "error_feedback": "float32"}, 3, 24, 24),
    Row("DCTAdamW", {"transform": "matmul", "error_feedback": "float32", **EVERY}, 3, 26, 30),
    Row("DCTAdamW", {**DCT, "error_feedback": "bfloat16", **EVERY}, 0, 28, 36),
    Row("DCTAdamW8bit", {**DCT, **EVERY}, 0, 16, 20, (48, 260)),  # each row has blocks of its own
    Row("DCTAdamW", {"transform": "matmul", **EVERY}, 2, 18, 20),
    Row("SSTAdamW", {}, 5, 46, 50),
    Row("SSTAdamW", {"factors": "active"}, 3, 26, 30),
    Row("SwitchLoRAAdamW", {"interval": 1 << 20}, 3, 19, 36),
    Row("DCTAdamW", {**DCT, **EVERY}, 0, 16, 20),
]
SWITCHES: dict[str, Any] = {"interval": 8, "freeze_steps": 2}
"""Four vectors of each factor in every step, of 32."""
IDS = ["-".join([row.name, *(f"{k}={v}" for k, v in row.options.items())]) for row in ROWS]


def row_of(name: str, **options: Any) -> Row:
    """The row of a class with these options, and no others."""
    return next(row for row in ROWS if (row.name, row.options) == (name, options))


def bucket(
    row: Row, count: int, dtype: torch.dtype, *, together: bool = True, shape: Any = (48, 160)
) -> tuple[list[LowRankOptimizer], list[Tensor]]:
    """Alike matrices of one optimizer, or of one each, at their first refresh."""
    params = [cases.parameter(shape, dtype) * (n + 1) for n in range(count)]
    params = [p.detach().requires_grad_() for p in params]
    named = [(f"layer{n}", p) for n, p in enumerate(params)]
    options = {"rank": 32, "update_proj_gap": 50, "weight_decay": 0.1, **row.options}
    lists = [named] if together else [[own] for own in named]
    return [cases.build(row.name, own, **options) for own in lists], params


def gradients(count: int, dtype: torch.dtype, shape: Any = (48, 160)) -> list[list[Tensor]]:
    """Of each step."""
    each = [cases.gradients(shape, STEPS, dtype, seed=n) for n in range(count)]
    return [list(own) for own in zip(*each, strict=True)]


def step(
    optimizers: list[LowRankOptimizer], params: list[Tensor], grads: list[Tensor], watch: bool
) -> Watch:
    """One step; on an accelerator with ``watch``."""
    seen = Watch(optimizers[0])
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    for optimizer in optimizers:
        if watch:
            with Watch(optimizer) as seen:
                optimizer.step()
        else:
            optimizer.step()
    return seen


def counted(row: Row, count: int) -> tuple[int, int]:
    """Products, and all other kernels, of a step that factors nothing."""
    dtype = torch.bfloat16 if row.options.items() >= ROUNDED.items() else torch.float32
    made, params = bucket(row, count, dtype, shape=row.shape)
    for n, grads in enumerate(gradients(count, dtype, row.shape)):
        seen = step(made, params, grads, n > 0)
    assert not seen.looks
    based = any("basis" in state for state in made[0].state.values())
    instead = LIFTS if based else (*LIFTS, *TAKES)
    products = sum(seen.gemms.values()) + sum(seen.launches[name] for name in instead)
    return products, sum(seen.launches.values()) - products


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_launches_do_not_grow_with_a_bucket(row: Row) -> None:
    """Exactly those of the table, of 2 matrices and of 4."""
    for count in (2, 4):
        assert counted(row, count) == (row.gemms * count, row.others)
    assert row.others <= row.most


GROWING = [
    (Row("SwitchLoRAAdamW", SWITCHES, 0, 0, 0), 5),  # three products, and candidates of A and B
    (Row("GaLoreAdamW", {"projector": "randk"}, 0, 0, 0), 12),
    (Row("GaLoreAdamW", {"projector": "randk", **ROUNDED}, 0, 0, 0), 15),
]
"""What launches for each matrix too, and how much: it was 151 of ``randk``, most of it indices, and
20 of SwitchLoRA, most of it rows that start again or are frozen."""


@pytest.mark.parametrize(("row", "each"), GROWING, ids=[str(row.options) for row, _ in GROWING])
def test_what_grows_with_a_bucket(row: Row, each: int) -> None:
    """By the same for each matrix."""
    first, second, last = (sum(counted(row, count)) for count in (2, 3, 5))
    assert (second - first, last - second) == (each, 2 * each)


@pytest.mark.parametrize(
    ("where", "name", "row"),
    [
        (Projector, "push_all_", row_of("GaLoreAdamW")),
        (Subspace, "coords_of", row_of("GaLoreAdamW", projector="columns")),
        (Scaled, "after_all", row_of("FiraAdamW")),
    ],
    ids=["push", "coords", "after"],
)
def test_a_matrix_at_a_time_is_seen(
    where: Any, name: str, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: what acts on a bucket is asked for each of its matrices."""
    whole = getattr(where, name)
    if where is Scaled:
        monkeypatch.setattr(where, name, OneByOne.after_all)
        monkeypatch.setattr(where, "after", lambda *own: whole(own[0], [own[1]], [own[2]])[0])
    elif name == "push_all_":

        def one_by_one(self: Any, *lists: Any) -> Iterator[int]:
            for n, own in enumerate(zip(*lists, strict=True)):
                for _ in whole(self, *([x] for x in own)):
                    yield n

        monkeypatch.setattr(where, name, one_by_one)
    else:
        monkeypatch.setattr(Coordinates, name, whole)
    with pytest.raises(AssertionError):
        test_launches_do_not_grow_with_a_bucket(row)


def test_a_choice_at_a_time_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: each matrix chooses its rows alone."""
    monkeypatch.setattr(FixedBasis, "_shares", lambda self, grad: False)
    with pytest.raises(AssertionError):
        test_launches_do_not_grow_with_a_bucket(ROWS[-1])


EQUAL = [
    (i, row)
    for i, row in zip(IDS, ROWS, strict=True)
    if "8bit" not in row.name and not row.options.get("stochastic_rounding")
]
EQUAL += [(str(row.options), row) for row, _ in GROWING if "projector" in row.options]
EQUAL = [own for own in EQUAL if not own[1].options.get("stochastic_rounding")]


@pytest.mark.parametrize(
    "lost", [pytest.param(None, marks=pytest.mark.slow), 1], ids=["finite", "lost"]
)
@pytest.mark.parametrize("row", [row for _, row in EQUAL], ids=[i for i, _ in EQUAL])
def test_a_bucket_is_its_matrices(row: Row, lost: int | None) -> None:
    """Bit for bit those of buckets of one, of a CPU too, which is within rounding; in float64.

    A gradient that is not finite leaves its own weights and moments as they were, and no others.
    """

    def seen(p: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
        # where a basis is due in each step a device is not asked whether the last one came about
        always = "update_proj_gap" in row.options or row.name == "SwitchLoRAAdamW"
        told = ("refresh_step", "postponed") if always else ()
        return [p, *(x for key, x in state.items() if key not in told)]

    count, shape, dtype = 3, (6, 20), torch.float64
    row = row._replace(options={**row.options, "rank": 4})
    found = []
    for together, watch in ((True, True), (False, True), (True, False), (False, False)):
        made, params = bucket(row, count, dtype, together=together, shape=shape)
        states = [made[n % len(made)].state for n in range(count)]
        for n, grads in enumerate(gradients(count, dtype, shape)):
            before = [seen(p, states[i][p]) for i, p in enumerate(params)]
            before = [[x.detach().clone() for x in own] for own in before]
            if n == STEPS - 1 and lost is not None:
                grads[lost][2, 3] = torch.nan
            step(made, params, grads, watch and n > 0)
        after = [seen(p, states[i][p]) for i, p in enumerate(params)]
        if lost is not None:
            for n, (new, old) in enumerate(zip(after, before, strict=True)):
                stays = [torch.equal(x, y) for x, y in zip(new, old, strict=True)]
                assert stays.count(False) == 1 if n == lost else not stays[0]  # its step counts
        found.append(after)
    for own in zip(*found, strict=True):
        for whole, alone, cpu, cpu_alone in zip(*own, strict=True):
            assert torch.equal(whole, alone) and torch.equal(cpu, cpu_alone)
            assert_close(whole, cpu)


@pytest.mark.parametrize(("state_dtype", "decay_on"), [("float32", "factors"), ("4bit", "weight")])
def test_vectors_of_a_bucket_are_switched_as_of_each(state_dtype: str, decay_on: str) -> None:
    """Bit for bit weights, factors, pools and moments of buckets of one; near those of a CPU."""
    options = {"rank": 4, "interval": 4, "freeze_steps": 2, "decay_on": decay_on}
    row = Row("SwitchLoRAAdamW", {**options, "state_dtype": state_dtype}, 3, 0, 0)
    count, shape, dtype, found = 3, (12, 20), torch.float32, []
    each = [cases.gradients(shape, 5, dtype, seed=n) for n in range(count)]
    for together, forced in ((True, True), (False, True), (True, False)):
        made, params = bucket(row, count, dtype, together=together, shape=shape)
        with pytest.MonkeyPatch.context() as patch:
            cases.branching(patch, lambda tensor, forced=forced: forced)  # type: ignore[misc]
            for grads in zip(*each, strict=True):
                step(made, params, list(grads), False)
        states = [made[n % len(made)].state[p] for n, p in enumerate(params)]
        assert all(bool(state["host.frozen"].any(-1).all()) for state in states)
        found.append([x for p, own in zip(params, states, strict=True) for x in (p, *own.values())])
    for whole, alone, cpu in zip(*found, strict=True):
        assert torch.equal(whole, alone)
        if state_dtype == "float32":  # a code may differ by a rounding
            assert_close(whole.double(), cpu.double(), torch.float32)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "stochastic_rounding" in row.options], ids=lambda row: row.name
)
def test_weights_are_rounded_as_each_would_be(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit those of buckets of one, of tiles of two, and of a matrix by itself.

    A CPU adds in another order: of its weights few are rounded otherwise, none by more than a unit.
    """
    count, shape, found = 3, (6, 20), []
    row = row._replace(options={**row.options, "rank": 4})
    for together, watch, tile in (
        (True, True, 1 << 24), (False, True, 1 << 24), (True, True, 240), (True, True, 100),
        (True, False, 1 << 24),
    ):  # fmt: skip
        monkeypatch.setattr(ops.tiles, "ACCELERATOR_TILE_ELEMENTS", tile)
        made, params = bucket(row, count, torch.bfloat16, together=together, shape=shape)
        for n, grads in enumerate(gradients(count, torch.bfloat16, shape)):
            before = params[1].detach().clone()
            if n == STEPS - 1:
                grads[1][2, 3] = torch.nan
            step(made, params, grads, watch and n > 0)
        assert torch.equal(params[1], before)
        found.append(torch.stack([p.detach() for p in params]))
    whole, alone, pairs, *others = found
    assert torch.equal(whole, alone) and torch.equal(whole, pairs)
    for own in others:  # of matrices that are larger than a tile, and of a CPU
        assert (whole != own).double().mean() < 0.05
        assert ((whole.double() - own.double()).abs() <= own.double().abs() / 128 + 1e-12).all()


@pytest.mark.parametrize("most", [matrices.MOVED_ELEMENTS, 100])
def test_rows_of_several_move_at_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of each: codes with a zero of their own, experts that share indices, any number."""
    monkeypatch.setattr(matrices, "MOVED_ELEMENTS", most)
    for count, batch in ((1, ()), (3, ()), (3, (3,))):
        sources = [torch.tensor(own).int() for own in ([0, 2, -1, 3], [-1, 0, 1, 2], [0, 1, 2, 3])]
        sources = sources[:count]
        lists = [[torch.randn(*batch, 4, 5) for _ in sources] for _ in range(2)]
        lists.append([torch.randint(256, (*batch, 4, 5)).to(torch.uint8) for _ in sources])
        wanted = [[x.clone() for x in own] for own in lists]
        for own, fill in zip(wanted, (0, 0, 127), strict=True):
            for x, source in zip(own, sources, strict=True):
                old = x.clone()
                for row, come in enumerate(source.tolist()):
                    x[..., row, :] = old[..., come, :] if come >= 0 else fill
        moving.move_rows_all_(lists, sources, [0, 0, 127])
        for own, want in zip(lists, wanted, strict=True):
            assert all(map(torch.equal, own, want))


def test_a_bucket_that_fails_puts_back_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of matrices whose weights have moved is the new one, of the others the old one."""
    row = Row("FiraAdamW", {"rank": 4}, 2, 10, 20)
    made, params = bucket(row, 3, torch.float64, shape=(6, 20))
    first, second, _ = gradients(3, torch.float64, (6, 20))
    step(made, params, first, False)
    honest, calls = ops.lift_add_scaled_, []

    def lift(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:  # of the second bucket, after both have been rehearsed
            raise MemoryError("no memory")
        honest(*args)

    monkeypatch.setattr(ops, "lift_add_scaled_", lift)
    monkeypatch.setattr("lowrank_optim.engine.bucket.CHUNK_BYTES", {True: 1})  # one matrix a bucket
    before = [p.detach().clone() for p in params]
    norms = [made[0].state[p]["residual_norm"].clone() for p in params]
    with pytest.raises(MemoryError):
        step(made, params, second, True)
    for n, (p, old, norm) in enumerate(zip(params, before, norms, strict=True)):
        state = made[0].state[p]
        assert torch.equal(p, old) == (n > 0) == torch.equal(state["residual_norm"], norm)
        assert state["step"] == (1 if n else 2)


def test_coordinates_beyond_float16_are_steps_after_a_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products with float16 are float32, as the scores are that say whether they are finite."""
    monkeypatch.setattr(fixed, "SPECTRUM_ELEMENTS", 0)  # so that coordinates are a product
    row = Row("DCTAdamW", {"transform": "matmul", **EVERY}, 3, 0, 0)
    made, params = bucket(row, 2, torch.float16)
    grads = gradients(2, torch.float16)
    step(made, params, grads[0], False)
    before = [p.detach().clone() for p in params]
    grads[1][0] = torch.full_like(grads[1][0], 5e4)
    step(made, params, grads[1], True)
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert float(made[0].state[params[0]]["low.exp_avg"].abs().max()) > 0.1 * 65504
    for p in params:
        assert all(bool(x.isfinite().all()) for x in (p, *made[0].state[p].values()))


def dense(shape: tuple[int, ...], watch: bool) -> tuple[Tensor, Watch]:
    """Three steps of an embedding in bfloat16, whose moments are float32: not as torch steps."""
    param = cases.parameter(shape, torch.bfloat16)
    optimizer = cases.build("GaLoreAdamW", [{"params": [param], "rank": None}], weight_decay=0.1)
    for n, grad in enumerate(cases.gradients(shape, STEPS, torch.bfloat16)):
        seen = step([optimizer], [param], [grad], watch and n > 0)
    return param.detach(), seen


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"maximize": True}], ids=str)
def test_small_dense_parameters_are_stepped_together(options: dict[str, Any]) -> None:
    """Weights of norms: of a LLaMA-7B the 65 of them were 1,040 of a step's 1,804 launches."""
    counts = []
    for count in (1, 2, 65):
        params = [cases.parameter((40,), torch.bfloat16) for _ in range(count)]
        optimizer = cases.build("GaLoreAdamW", [{"params": params, "rank": None}], **options)
        for n, grad in enumerate(cases.gradients((40,), 2, torch.bfloat16)):
            seen = step([optimizer], params, [grad] * count, n > 0)
        counts.append(sum(seen.launches.values()))
    # 65 gradients are one more than the table of a kernel of torch holds, which turns them around
    assert counts[1] == counts[2] - bool(options.get("maximize")) <= counts[0] <= 12, counts


def test_a_dense_parameter_is_stepped_in_tiles_of_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an embedding of a 7B model 500 tiles of a CPU were stepped, each 8 launches; now 8 of 3.

    Tiles do not show in the weights.
    """
    tiles = ops.tiles
    rows, width = 9, 40
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", width)
    found = []
    for size in (rows * width, 4 * width):  # one tile, and three
        monkeypatch.setattr(tiles, "ACCELERATOR_TILE_ELEMENTS", size)
        found.append(dense((rows, width), True))
    cpu, _ = dense((rows, width), False)
    assert all(torch.equal(param, cpu) for param, _ in found)
    each, once = 3, 6  # its norm, AdamW, and what moves the weights; the flag and the decay
    assert [sum(seen.launches.values()) for _, seen in found] == [once + each, once + 3 * each]
