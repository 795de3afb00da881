"""The benchmark of messages: its figures are those that docs/distributed.md lets anyone add up."""

from __future__ import annotations

import pytest

from benchmarks.communication import SIZE, Model, _counted, count, measure, pretended, wire
from benchmarks.meter import Collective
from tests.cases import several_gpus

RANKS = 4


def llama_like(layers: int) -> Model:
    """A wide matrix and a tall one a layer, and a table that is not projected."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (40, 16)}
    for i in range(layers):
        shapes[f"m.layers.{i}.down.weight"] = (16, 48)
        shapes[f"m.layers.{i}.up.weight"] = (48, 16)
    return Model("small", 4, layers, shapes, frozenset(k for k in shapes if "layers" in k))


@several_gpus
@pytest.mark.parametrize("placed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_figures_are_those_that_the_table_gives(placed: bool) -> None:
    """Wide matrices are exchanged where rows are split; bases are whole, moments a part."""
    layers, m, n, r = 3, 16, 48, 4
    model = llama_like(layers)
    found = count("GaLore rsvd", model, RANKS, "placed" if placed else "rows")
    rows = 0 if placed else layers * 2 * m * n // RANKS  # two all-to-alls of what is here
    guard = 2 * len(model.shapes) * 8
    factor = (RANKS - 1) / RANKS
    assert found.sent == factor * (rows * SIZE + 2 * guard)
    assert found.basis == 2 * layers * m * r * SIZE
    assert found.moments == 2 * (2 * layers * r * n + 40 * 16) * SIZE // RANKS
    gathered = 2 * layers * m * n // RANKS * SIZE * factor
    broadcast = 2 * layers * m * r * SIZE
    refresh = found.refreshed - found.sent
    assert refresh == pytest.approx(gathered + broadcast, rel=0.1)  # each message is rounded up
    assert found.messages == (1 if placed else 3)


@several_gpus
@pytest.mark.slow
def test_a_basis_of_every_step_is_counted_in_every_layout() -> None:
    """LDAdam: the matrix to its owner; the basis, and how moments turn, to all."""
    layers, m, n, r = 3, 16, 48, 4
    row = measure(llama_like(layers), RANKS, ("LDAdam",))[1]
    gathered = 2 * layers * m * n // RANKS * SIZE * (RANKS - 1) / RANKS
    broadcast = 2 * layers * (m * r + r * r) * SIZE
    guard = 2 * (RANKS - 1) / RANKS * 2 * (2 * layers + 1) * 8
    assert row.placed == pytest.approx(gathered + broadcast + guard, rel=0.1)
    turned = layers * 2 * m * n // RANKS * SIZE * (RANKS - 1) / RANKS
    assert row.sent - row.placed == pytest.approx(turned)
    assert row.refresh == 0


COORDINATES = {"GaLore rsvd": lambda m, n, r: r * n, "SST active": lambda m, n, r: r * (m + n + 1)}


@several_gpus
@pytest.mark.parametrize(
    "method", ["GaLore rsvd", pytest.param("SST active", marks=pytest.mark.slow)]
)
def test_what_replicas_send(method: str) -> None:
    """Gradients under DDP, coordinates in their place; where bases are due, gradients and bases."""
    layers, m, n, r = 3, 16, 48, 4
    model, numbers = llama_like(layers), 40 * 16
    ring = 2 * (RANKS - 1) / RANKS * SIZE
    gradients = ring * (numbers + 2 * layers * m * n)
    ddp, low = (count(method, model, RANKS, layout) for layout in ("replicas", "subspace"))
    assert ddp.sent == pytest.approx(gradients)
    flags = ring * len(model.shapes)
    factors = 3 if method.startswith("SST") else 1  # of which each has a flag
    kept = ring * (numbers + 2 * layers * COORDINATES[method](m, n, r))
    assert low.sent == pytest.approx(kept + flags + ring * 2 * layers * (factors - 1))
    assert low.refreshed - flags == pytest.approx(ddp.refreshed)
    assert ddp.basis == low.basis
    if factors == 1:
        entries = 2 * layers * m * r * SIZE
        assert ddp.refreshed - ddp.sent == pytest.approx(entries, rel=0.1)
        assert ddp.basis == entries
        assert ddp.moments == 2 * (2 * layers * r * n + numbers) * SIZE


@several_gpus
def test_layers_beyond_the_second_add_what_the_second_does() -> None:
    model = llama_like(3)
    grown = count("DCT-AdamW", model, RANKS, "rows")
    with pretended(RANKS) as mesh:
        whole = _counted("DCT-AdamW", model, mesh, "rows")
    assert (grown.basis, grown.moments, grown.sent) == (whole.basis, whole.moments, whole.sent)


def test_what_leaves_a_rank() -> None:
    """A ring's all-reduce sends all but a part twice; nobody sends to itself."""
    sent = [Collective(kind, 800, kind) for kind in ("all_reduce", "all_to_all", "broadcast")]
    assert [wire([one], 8) for one in sent] == [1400, 700, 800]
