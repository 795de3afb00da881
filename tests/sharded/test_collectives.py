"""What a step sends, and that no rank ever holds what it should not: counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lowrank_optim
from lowrank_optim.subspaces import pooled
from tests.sharded.meter import (
    Collective,
    Meter,
    New,
    allowed,
    assert_collectives,
    assert_small,
)
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, Trained, here, placement

Worlds = Callable[[int], Ranks]

# ------------------------------------------------------------------ the meter itself


def sharded(world: World, shape: tuple[int, ...] = (64, 48), place: int = 0) -> DTensor:
    mesh = init_device_mesh("cpu", (world.size,))
    x = torch.arange(float(shape[0] * shape[1]), dtype=torch.float64).reshape(shape).sin()
    return here(x, mesh, [Shard(place)])


WHOLE: dict[str, Callable[[DTensor], Any]] = {
    "gathers": lambda x: x.full_tensor(),
    "decomposes": lambda x: torch.linalg.svd(x, full_matrices=False),
    "replicates": lambda x: x.redistribute(placements=[Replicate()]),
    "adds": lambda x: x + torch.ones_like(x).redistribute(placements=[Replicate()]),
    "allocates": lambda x: x.to_local().new_zeros(x.shape),
    "has a state of the global shape": lambda x: torch.zeros(x.shape, dtype=x.dtype),
}
"""What puts a whole matrix on every rank."""


def watched(world: World, how: str) -> Any:
    x = sharded(world)
    limit = x.to_local().numel() * 8
    with Meter() as before:
        x.to_local() * 2
        x.to_local().add_(1)
        x * 2
    assert_small(before, limit)
    assert_collectives(before, {})
    with Meter() as after:
        WHOLE[how](x)
    with pytest.raises(AssertionError, match="storages above"):
        assert_small(after, limit)
    if after.collectives:
        with pytest.raises(AssertionError, match="collectives"):
            assert_collectives(after, {})
    return after.counts, after.largest


@pytest.mark.parametrize("how", WHOLE)
def test_a_whole_matrix_is_caught(how: str, ranks: Worlds) -> None:
    silent = how in ("allocates", "has a state of the global shape")
    for counts, largest in ranks(2).run(how, watched, how=how).checked():
        assert largest >= 64 * 48 * 8
        assert bool(counts) != silent


def each_kind(world: World) -> Any:
    """Every collective once: what was seen, and whether gloo has all_to_all of lists here."""
    x = torch.ones(12, dtype=torch.float64)
    out = torch.empty(12 * world.size, dtype=torch.float64)
    group = dist.group.WORLD
    lists = [torch.empty_like(x) for _ in range(world.size)]
    pieces = list(torch.ones(12, dtype=torch.float64).chunk(world.size))
    has_lists = True
    with Meter() as meter:
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.all_gather(lists, x)
        dist.all_gather_into_tensor(out, x)
        dist.gather(x, lists if world.rank == 0 else None, 0)
        dist.scatter(x, lists if world.rank == 0 else None, 0)
        dist.all_to_all_single(torch.empty_like(x), x)
        try:
            dist.all_to_all([torch.empty_like(p) for p in pieces], pieces)
        except RuntimeError as error:
            if "does not support alltoall" not in str(error) or torch.__version__ >= "2.13":
                raise
            has_lists = False
        dist.reduce(x, 0)
        dist.barrier()
        functional.all_reduce(x, "sum", group).sum()
        functional.all_gather_tensor(x, 0, group).sum()
        functional.all_to_all_single(x, None, None, group).sum()
        functional.broadcast(x, 0, group).sum()
        functional.reduce_scatter_tensor(x, "sum", 0, group).sum()
        if world.rank == 0:
            dist.send(x, 1)
        elif world.rank == 1:
            dist.recv(x, 0)
    return [(c.kind, c.bytes) for c in meter.collectives], has_lists


def test_every_collective_is_seen_once(ranks: Worlds) -> None:
    for rank, (seen, has_lists) in enumerate(ranks(2).run("each kind", each_kind).checked()):
        kinds = "all_reduce broadcast all_gather all_gather gather scatter all_to_all"
        kinds += " all_to_all" if has_lists else ""
        kinds += " reduce all_reduce all_gather all_to_all broadcast reduce_scatter"
        expected = [(kind, 96) for kind in kinds.split()]
        expected += [("send" if rank == 0 else "recv", 96)]
        got = [x for x in seen if x[0] != "scatter"]
        assert got == [x for x in expected if x[0] != "scatter"]
        assert [x[0] for x in seen] == [x[0] for x in expected]


# ------------------------------------------------------------------ what a step sends

SIZE = 4
M, N, R = 8, 96, 2
"""Of the matrix of these cases: projected side, free side, rank."""
ITEM = 8
"""Bytes of a float64."""
GUARD = 2 * ITEM
"""Of one parameter: the sum of squares of its gradient, and whether it is there."""
SHARD = M * N // SIZE * ITEM
STEPS = 3
DUE = (0, 2)
"""Steps at which bases are due: every two steps."""

Table = dict[str, tuple[int, int]]


def plus(*tables: Table) -> Table:
    """Their sum."""
    out: Table = {}
    for table in tables:
        for kind, (count, size) in table.items():
            before = out.get(kind, (0, 0))
            out[kind] = before[0] + count, before[1] + size
    return out


NOTHING: Table = {}
TURNED: Table = {"all_to_all": (2, 2 * SHARD)}
"""Rows to columns, and the update back."""
SCORES: Table = {"all_reduce": (1, M * ITEM)}
FINE = 8
"""Whether the owner found a basis."""
BASIS: Table = {"broadcast": (1, M * R * ITEM + FINE)}
OWNER: Table = plus({"all_to_all": (1, SHARD)}, BASIS)
"""Shards to the owner, the basis to all."""
RIGHT = N // SIZE * R * ITEM
BOTH_OWNER: Table = plus({"all_to_all": (2, SHARD + RIGHT)}, BASIS)
"""The right basis is split as columns are: its old pieces go to the owner, and new ones come back,
which the owner sends."""
SMALL: Table = {"all_reduce": (1, R * R * ITEM)}
TWO_SCALARS: Table = {"all_reduce": (1, 2 * ITEM)}

MEANS: Table = {"all_reduce": (2, R * ITEM + ITEM)}
"""Sums of the squares of each row; the norm of the direction."""
WEIGHTS: Table = {"all_reduce": (0, ITEM)}
"""The sum of the squares of the weights travels with the guard."""
FIXED: dict[str, Any] = {"scale_parameter": False}
FACTORS: Table = {"all_reduce": (2, (M * R + R) * ITEM + 2 * R * ITEM)}
"""Coordinates of u and s; then of each v its length, and whether it moved."""
COUNTER = 8
"""The iteration, with what aligns it."""
FOUND: Table = {"broadcast": (1, FINE + (M * R + R) * ITEM + COUNTER)}
FACTORED: Table = plus({"all_to_all": (2, SHARD)}, FOUND)
"""The weight to its owner, u and s to all; v goes back, which the owner sends."""
ONE_FACTOR: Table = {"all_reduce": (1, M * R * ITEM)}
BALANCED: Table = plus({"all_to_all": (2, N // SIZE * R * ITEM)}, BASIS)
"""The split factor to the owner and back, and the other to all."""
SST = {"factors": "active", "steps_per_iteration": 2}
SWITCH = {"interval": 4, "freeze_steps": 1}

SENT: dict[str, tuple[str, dict[str, Any], Table, Table]] = {
    "svd": ("GaLoreAdamW", {"projector": "svd"}, NOTHING, OWNER),
    "rsvd": ("GaLoreLion", {"projector": "rsvd"}, NOTHING, OWNER),
    "random": ("GaLoreAdamW", {"projector": "random"}, NOTHING, BASIS),
    "dct": ("GaLoreAdamW", {"projector": "dct"}, NOTHING, SCORES),
    "hadamard": ("GaLoreAdamW", {"projector": "hadamard"}, NOTHING, SCORES),
    "columns": ("FrugalAdamW", {"projector": "columns", "density": 0.25}, NOTHING, NOTHING),
    "rows": ("FrugalSGD", {"projector": "rows", "density": 0.25}, NOTHING, NOTHING),
    "block": ("FrugalAdamW", {"density": 1.0}, NOTHING, NOTHING),
    "fira": ("FiraAdamW", {"projector": "svd"}, TWO_SCALARS, OWNER),
    "two sides": ("GaLoreAdamW", {"projector": "svd", "proj_type": "full"}, SMALL, BOTH_OWNER),
    "memory": ("DCTAdamW", {"error_feedback": "float32", "update_proj_gap": 2}, NOTHING, SCORES),
    "adafactor": ("GaLoreAdafactor", {"projector": "svd", **FIXED}, MEANS, OWNER),
    "adafactor two sides": (
        "GaLoreAdafactor",
        {"projector": "svd", "proj_type": "full", **FIXED},
        SMALL,
        BOTH_OWNER,
    ),
    "adafactor scaled": (
        "GaLoreAdafactor",
        {"projector": "svd"},
        plus(MEANS, WEIGHTS),
        OWNER,
    ),
    "frugal svd": ("FrugalAdamW", {"projector": "svd", "density": 0.25}, NOTHING, OWNER),
    "sst": ("SSTAdamW", SST, FACTORS, FACTORED),
    "switchlora": ("SwitchLoRAAdamW", SWITCH, ONE_FACTOR, NOTHING),
    "restarts": ("SwitchLoRAAdamW", {**SWITCH, "restart_every": 2}, ONE_FACTOR, BALANCED),
}
"""Class, options, what every step sends beside the guard, and what a refresh adds."""

TURNS = {"columns": (1,), "block": ()}
"""Dimensions whose split is of the projected side, where that is not the shorter."""


def measured(
    world: World,
    cls: str,
    options: dict[str, Any],
    place: int | str,
    alike: int,
    shape: tuple[int, int] = (M, N),
) -> Any:
    """Each step's collectives and storages, of some equal matrices.

    On all ranks in a row, or on a square of them where ``place`` has a letter for each dimension.
    """
    places = [placement(letter) for letter in str(place)]
    mesh = init_device_mesh("cpu", (world.size,) if len(places) == 1 else (world.size // 2, 2))
    generator = torch.Generator().manual_seed(4)

    def draw() -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return here(x, mesh, places)

    named = [(f"layer{i}.weight", nn.Parameter(draw())) for i in range(alike)]
    own = {"lr": 1e-2, "stagger": False, **options}
    if not cls.startswith(("SST", "Switch", "LDAdam")):
        own["update_proj_gap"] = 2
    pooled.DRAWN = 2  # of the candidates, whose pool is no larger than the weight here
    if "density" not in own:
        own.setdefault("rank", R)
    optimizer = getattr(lowrank_optim, cls)(named, **own)
    out = []
    for _ in range(STEPS):
        for _, param in named:
            param.grad = draw()
        with Meter() as meter:
            optimizer.step()
        out.append((meter.collectives, meter.news, allowed(optimizer)))
    return out


def metered(collectives: list[Collective], news: list[New]) -> Meter:
    meter = Meter()
    meter.collectives, meter.news = collectives, news
    return meter


BY_COLUMNS = (
    "svd", "columns", "fira", "memory", "adafactor", "sst", "switchlora", "restarts"
)  # fmt: skip
ALIKE = ("rsvd", "hadamard", "rows", "frugal svd", "adafactor scaled", "switchlora")
"""They send what others do."""
SPLIT = [
    pytest.param(
        name, place, id=f"{name}-{place}",
        marks=pytest.mark.slow if name in ALIKE
        or (name in BY_COLUMNS and BY_COLUMNS.index(name) % 2 != place) else (),
    )
    for name in SENT
    for place in (0, 1)
    if not place or name in BY_COLUMNS
]  # fmt: skip
FROM_OWNER = ("two sides", "adafactor two sides", "sst", "restarts")
"""Where something that is split goes back from the owner."""


@pytest.mark.parametrize(("name", "place"), SPLIT)
def test_a_step_sends_exactly_this(name: str, place: int, ranks: Worlds) -> None:
    """And no rank makes anything above its share, but for the one that finds a basis."""
    cls, options, each, due = SENT[name]
    every = plus({"all_reduce": (1, GUARD)}, each)
    if place in TURNS.get(options.get("projector", "block" if "Frugal" in cls else ""), (0,)):
        every = plus(every, TURNED)
    args = {"cls": cls, "options": options, "place": place, "alike": 1}
    steps = list(zip(*ranks(SIZE).run(name, measured, **args).checked(), strict=True))
    for step, seen in enumerate(steps):
        is_due = step in DUE and not (name == "restarts" and not step)
        expected = plus(every, due) if is_due else every
        above = 0
        for rank, (collectives, news, limit) in enumerate(seen):
            meter = metered(collectives, news)
            back = N * R * ITEM if is_due and name in FROM_OWNER and not rank else 0
            assert_collectives(meter, plus(expected, {"all_to_all": (0, back)}))
            right = N * R * ITEM if "two sides" in name else 0  # the old one, beside the matrix
            assert_small(meter, M * N * ITEM + right)
            # both bases' parts travel with the shard in one message
            above += meter.largest > limit + (RIGHT if "two sides" in name else 0)
        owners = 1 if is_due and "broadcast" in due and name != "random" else 0
        most = [(metered(c, n).largest, limit) for c, n, limit in seen]
        assert above <= owners, f"{above} ranks made more than their share in step {step}: {most}"


ROTATION: Table = {"broadcast": (0, R * R * ITEM)}
"""How moments turn, with the basis that they turn to."""


@pytest.mark.parametrize("place", [0, 1])
def test_a_basis_that_follows_is_found_by_an_owner_at_every_step(place: int, ranks: Worlds) -> None:
    """LDAdam: a shard of the gradient with its momentum to the owner, the basis to all."""
    args = {"cls": "LDAdamW", "options": {}, "place": place, "alike": 1}
    steps = list(zip(*ranks(SIZE).run("following", measured, **args).checked(), strict=True))
    every = plus({"all_reduce": (1, GUARD)}, OWNER, NOTHING if place else TURNED)
    for step, seen in enumerate(steps):
        expected = plus(every, ROTATION) if step else every
        above = 0
        for collectives, news, limit in seen:
            meter = metered(collectives, news)
            assert_collectives(meter, expected)
            assert_small(meter, M * N * ITEM)
            above += meter.largest > limit
        assert above <= 1, "the owner alone has a whole matrix"


def test_copies_get_a_basis_and_moments_and_no_memory(ranks: Worlds) -> None:
    """A refresh writes no errors, which are M x N numbers and alike on all ranks anyway."""
    args = {"cls": "LDAdamW", "options": {}, "place": "r", "alike": 1}
    found = (M * R + 2 * R * N) * ITEM
    counters = 3 * FINE  # with whether it was found, each with what aligns it
    for steps in ranks(SIZE).run("copies", measured, **args).checked():
        for collectives, news, _ in steps:
            sent = metered(collectives, news).bytes
            assert found <= sent["broadcast"] <= found + counters


def test_alike_matrices_share_their_collectives(ranks: Worlds) -> None:
    """Three in a bucket: as many collectives as one, three times the bytes."""
    options = {"projector": "svd", "proj_type": "left"}
    args = {"cls": "FiraAdamW", "options": options, "place": 0, "alike": 3}
    for steps in ranks(SIZE).run("alike", measured, **args).checked():
        collectives, news, _ = steps[1]
        each = plus({"all_reduce": (1, GUARD)}, TWO_SCALARS, TURNED)
        expected = {kind: (count, 3 * size) for kind, (count, size) in each.items()}
        assert_collectives(metered(collectives, news), expected)


def test_dense_adafactor_sends_two_messages_for_all(ranks: Worlds) -> None:
    """Of several parameters by rows: means, then norms, and the guard before them."""
    args = {"how": "fsdp", "cls": "GaLoreAdafactor", "options": {"rank": None, **FIXED}}
    for steps in ranks(2).run("dense", whole_model, **args).checked():
        for counts, _, _ in steps:
            assert counts == {"all_reduce": 3}


WITHIN = 6 + 12 + 18
"""Of 1,000 columns ranks store 250 each and step 256, 256, 256 and 232: what lies elsewhere."""


@pytest.mark.parametrize(
    ("columns", "place", "moved"), [(2048, 1, 0), (1000, 1, WITHIN), (2048, 0, 2048)]
)
def test_moments_in_8_bits_send_edges_within_blocks(
    columns: int, place: int, moved: int, ranks: Worlds
) -> None:
    """Nothing where a rank stores whole blocks; else the columns of edges, there and back."""
    options, shape = {"projector": "dct", "rank": 10}, (20, columns)
    args = {"cls": "GaLoreAdamW8bit", "options": options, "place": place, "alike": 1}
    steps = ranks(SIZE).run("8 bits", measured, shape=shape, **args).checked()
    for step in range(STEPS):
        meters = [metered(*own[step][:2]) for own in steps]
        due = {"all_reduce": 1 + (step in DUE)}
        turned = {"all_to_all": 2} if moved else {}
        assert all(meter.counts == {**due, **turned} for meter in meters)
        sent = sum(meter.bytes.get("all_to_all", 0) for meter in meters)
        assert sent == 2 * moved * 20 * ITEM


def whole_model(world: World, how: str, cls: str, options: dict[str, Any]) -> Any:
    only = ("wide", "tall", "large", "square")
    trained = Trained(Case(cls, {"stagger": False, **options}, how, only), world)
    out = []
    for step in range(STEPS):
        trained.backward(step)
        with Meter() as meter:
            trained.optimizer.step()
        out.append((meter.counts, meter.bytes, len(trained.named)))
    return out


PLACED = {
    "galore": ("GaLoreAdamW", {"projector": "svd"}),
    "frugal": ("FrugalSGD", {"projector": "rsvd", "on_refresh": "keep", "density": 0.3}),
    "larger side": ("GaLoreAdamW", {"projector": "svd", "proj_type": "reverse_std"}),
}


@pytest.mark.parametrize("name", PLACED)
def test_as_placed_by_the_package_only_the_guard_is_sent(name: str, ranks: Worlds) -> None:
    cls, options = PLACED[name]
    args = {"how": "fsdp placed", "cls": cls, "options": options}
    for steps in ranks(2).run(name, whole_model, **args).checked():
        for step, (counts, sizes, params) in enumerate(steps):
            if step not in DUE:
                assert (counts, sizes) == ({"all_reduce": 1}, {"all_reduce": params * GUARD})


def test_by_rows_what_is_wide_turns(ranks: Worlds) -> None:
    """Of wide, tall, large and square the first alone is projected on the side that is split."""
    args = {"how": "fsdp", "cls": "GaLoreAdamW", "options": {"projector": "svd"}}
    for steps in ranks(3).run("by rows", whole_model, **args).checked():
        assert steps[1][0] == {"all_reduce": 1, "all_to_all": 2}
