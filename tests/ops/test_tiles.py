"""Inputs of any strides: the same bits as contiguous ones, and no copy larger than a tile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.allocations import allocations
from lowrank_optim.ops import dispatch, native, tiles
from lowrank_optim.ops.schema import FOUND, SCHEMAS
from tests.ops import ops_cases as cases

READY, REASON = native.available("cpu")
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not READY, reason=REASON))]
TILE = 512
# rows of several blocks, rows shorter than a block, rows longer than a tile, and more dimensions
SHAPES = [(5, 700), (130, 30), (2, 1500), (3000,), (2, 3, 400), (4, 5, 6, 7)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    return str(request.param)


def arguments(op: str) -> cases.Arguments:
    if op == "quantize_blockwise_":
        a = cases.elementwise("moment_8bit_", torch.float32, shapes=SHAPES, how="slice")
        found = {**a, "table": a["signed_map"]}
        return {name: found[name] for name in cases.names(op)}
    adamw = "adamw" in op
    return cases.elementwise(op, torch.float32, shapes=SHAPES, how="slice", by_row=adamw, unsound=2)


@pytest.mark.parametrize("how", ["slice", "reversed", "one of each"])
@pytest.mark.parametrize("op", sorted(tiles.FLAT))
def test_strides_do_not_change_a_bit(
    backend: str, op: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, moments, layouts, rows' steps and flags are cut alike."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", TILE)
    first = cases.names(op)[0]
    strided = arguments(op)
    packed = cases.on("cpu", strided)
    packed[first] = [x.contiguous() for x in packed[first]]
    if how == "reversed":  # every dimension runs the other way in memory
        axes = [tuple(reversed(range(x.dim()))) for x in packed[first]]
        pairs = zip(packed[first], axes, strict=True)
        strided[first] = [x.permute(a).contiguous().permute(a) for x, a in pairs]
    if how == "one of each":
        strided[first][::2] = [x.clone() for x in packed[first][::2]]
    assert not all(x.is_contiguous() for x in strided[first])
    cases.call(op, strided)
    cases.call(op, packed)
    for name, values in strided.items():
        if name != first and isinstance(values, list) and isinstance(values[0], Tensor):
            for a, b in zip(values, packed[name], strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("op", sorted(tiles.FLAT))
@pytest.mark.skipif(not READY, reason=REASON)
def test_no_copy_is_larger_than_a_tile(op: str) -> None:
    """The library copied a gradient that was not contiguous at its size (M4 allows a tile)."""
    shapes = [(512, 768)]
    if op == "quantize_blockwise_":
        a = cases.elementwise("moment_8bit_", torch.float32, shapes=shapes, how="columns")
        a = {**a, "table": a["signed_map"]}
        a = {name: a[name] for name in cases.names(op)}
    else:
        a = cases.elementwise(op, torch.float32, shapes=shapes, how="columns")
    assert not a[cases.names(op)[0]][0].is_contiguous()
    found = allocations(lambda: cases.call(op, a))
    assert 0 < found.peak <= 4 * tiles.TILE_ELEMENTS + 4096 < 4 * math.prod(shapes[0])


@pytest.mark.skipif(not READY, reason=REASON)
def test_updates_of_coordinates_are_turned_by_tiles() -> None:
    """W stored by columns, N by rows: N was copied whole, half of W for half of the rows."""
    a = cases.matrices("coordinate_add_", torch.float32, shapes=[(1024, 1536)], how="columns")
    assert a["params"][0].stride(0) == 1 and a["updates"][0].stride(1) == 1
    wanted = cases.expected("coordinate_add_", a)["params"][0][0]
    found = allocations(lambda: cases.call("coordinate_add_", a))
    size = a["updates"][0].numel()
    assert 0 < found.peak <= 4 * native.matrices.TILE_ELEMENTS + 4096 < 4 * size
    assert (a["params"][0] - wanted).abs().max() < 2e-6 * wanted.abs().max()


RETURN_OR_APPLY = (*cases.APPLIES, *FOUND, "cosine_lift_add_", "decay_", "direction_add_", "addmm_")


@pytest.mark.parametrize("op", [o for o in SCHEMAS if o not in RETURN_OR_APPLY])
def test_what_is_written_must_be_contiguous_on_every_backend(backend: str, op: str) -> None:
    """One error: the library copied, Triton refused and the reference failed in ``view``."""
    a = cases.example(op)
    schema = getattr(torch.ops.lowrank_optim, op).default._schema
    arguments = [x for x in schema.arguments if x.name != "params"]  # of any strides
    written = [x.name for x in arguments if x.alias_info and x.alias_info.is_write]
    written += ["xs"] if op == "stochastic_round_" else []
    assert written
    for name in written:
        if not any(x.dim() for x in a[name]):  # flags have no strides
            continue
        loose = [cases.strided(x, "slice") for x in a[name]]
        with pytest.raises(ValueError, match=f"{op}: {name} must be contiguous, got strides"):
            cases.call(op, {**a, name: loose})


@given(st.data())
def test_gather_is_a_flat_slice(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axes = data.draw(st.permutations(range(len(shape))))
    x = torch.arange(math.prod(shape)).reshape(shape).permute(axes)
    start = data.draw(st.integers(0, x.numel()))
    stop = data.draw(st.integers(start, x.numel()))
    out = torch.full((stop - start,), -1)
    tiles.gather_(x, start, stop, out)
    assert torch.equal(out, x.reshape(-1)[start:stop])
