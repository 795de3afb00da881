"""What no sharded step can do is refused on every rank alike, before anything changes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import lowrank_optim
from lowrank_optim.nn import convert
from lowrank_optim.sharding.parts import local
from lowrank_optim.sharding.regions import lies_in_intervals
from tests.sharded.models import left_out, shards_whole_numbers
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]

SST: dict[str, Any] = {"steps_per_iteration": 3, "warmup_steps": 1}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "randk": ("FrugalAdamW", {"projector": "randk", "density": 0.3}, "randk"),
    "sst": ("SSTAdamW", {**SST, "rank": 2}, "Pass factors='active'"),
    "fira block": ("FiraAdamW", {"projector": "block", "rank": 0.5}, "block"),
    "adafactor block": ("GaLoreAdafactor", {"projector": "block", "rank": 0.5}, "Adafactor"),
}
"""Class, options, and what the message must name."""


def outcome(world: World, cls: str, options: dict[str, Any], how: str) -> Any:
    """The first error of making, and stepping, an optimizer; and whether anything moved."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(8, 12))
    if how == "turned":
        fully_shard(layer, mesh=DeviceMesh("cpu", torch.arange(world.size).flip(0)))
    elif how == "fsdp":
        fully_shard(layer, mesh=init_device_mesh("cpu", (world.size,)))
    elif how == "kernel":
        mesh = init_device_mesh("cpu", (world.size,))
        kernel = torch.randn(6, 3, 4, 4).to(torch.bfloat16)
        layer.weight = nn.Parameter(distribute_tensor(kernel, mesh, [Shard(2)]))
    before = layer.weight.detach().to_local().clone()
    try:
        named: Any = layer.named_parameters()
        if options.get("rank", 0) is None:  # a key of groups
            named = [{"params": list(named), "rank": None}]
            options = {key: x for key, x in options.items() if key != "rank"}
        optimizer = getattr(lowrank_optim, cls)(named, lr=0.1, **options)
        for _ in range(2):
            layer.weight.grad = torch.randn_like(layer.weight)
            optimizer.step()
    except Exception as error:
        same = torch.equal(layer.weight.detach().to_local(), before)
        return type(error).__name__, str(error), same
    return "none", "", False


def spread(world: World, x: torch.Tensor, places: Any) -> DTensor:
    mesh = init_device_mesh("cpu", (world.size // 2, 2))
    return distribute_tensor(x, mesh, places)


def check(values: list[Any], *words: str) -> None:
    assert len(set(values)) == 1, "the ranks say different things"
    kind, text, same = values[0]
    assert kind == "NotImplementedError", (kind, text)
    assert "weight" in text, f"which weight: {text}"
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    assert same, "the weight has changed"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, ranks: Worlds) -> None:
    cls, options, word = REFUSED[name]
    values = ranks(2).run(name, outcome, cls=cls, options=options, how="fsdp").checked()
    check(values, word)


@pytest.mark.parametrize("options", [{"rank": 2, "projector": "dct"}, {"rank": None}], ids=str)
def test_ranks_that_do_not_ascend(options: dict[str, Any], ranks: Worlds) -> None:
    """FSDP2 gives rank 0 the first rows, and ``get_coordinate`` says that it has the last."""
    args = {"cls": "GaLoreAdamW", "options": options, "how": "turned"}
    values = ranks(2).run("turned", outcome, **args).checked()
    check(values, "ranks [1, 0]", "[0, 1]", "ascend")


NARROW: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "coordinates": ((4, 40, 200), "GaLoreAdamW8bit", {"rank": 20}),
    "one factor": ((4, 40, 300), "SSTAdamW8bit", {**SST, "rank": 26, "factors": "active"}),
    "means of rows": ((64, 72, 80), "GaLoreAdafactor", {"rank": 64, "state_dtype": "8bit"}),
}
"""Shape, class and options of moments narrower than a block, and large enough for 8 bits."""


def narrow_experts(world: World, what: str) -> Any:
    """Experts whose moments are narrower than a block, in 8 bits and split by their number."""
    warnings.simplefilter("ignore")
    shape, cls, options = NARROW[what]
    mesh = init_device_mesh("cpu", (world.size,))
    param = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
    before = param.detach().to_local().clone()
    try:
        optimizer = getattr(lowrank_optim, cls)([("weight", param)], lr=0.1, **options)
        param.grad = torch.randn_like(param)
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), torch.equal(param.detach().to_local(), before)
    return "none", "", False


@pytest.mark.parametrize("name", NARROW)
def test_experts_in_8_bits_that_are_narrower_than_a_block(name: str, ranks: Worlds) -> None:
    said = ranks(2).run("narrow experts", narrow_experts, what=name).checked()
    check(said, "256 columns", "Split the rows", "bfloat16")


def both_split(world: World) -> Any:
    """Experts of which ranks have some, and of those some rows."""
    warnings.simplefilter("ignore")
    x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1))
    param = nn.Parameter(spread(world, x, [Shard(0), Shard(1)]))
    before = param.detach().to_local().clone()
    try:
        optimizer = lowrank_optim.GaLoreAdamW([("weight", param)], rank=2)
        param.grad = torch.randn_like(param)
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), torch.equal(param.detach().to_local(), before)
    return "none", "", False


def test_experts_whose_matrices_are_split_too(ranks: Worlds) -> None:
    check(ranks(4).run("both split", both_split).checked(), "both")


def test_blocks_whose_inner_dimensions_are_split_do_not_round(ranks: Worlds) -> None:
    options = {"projector": "block", "density": 1.0, "stochastic_rounding": True}
    args = {"cls": "FrugalAdamW", "options": options, "how": "kernel"}
    check(ranks(2).run("kernel", outcome, **args).checked(), "stochastic_rounding", "Shard(0)")


def modules(world: World, method: str, cls: str, kind: str) -> Any:
    """Layers of factors that fully_shard has split, of which one factor lies in another way."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = nn.Sequential(nn.Linear(12, 8))
    groups = convert(model, method, rank=2)
    mesh = init_device_mesh("cpu", (world.size,))
    fully_shard(model, mesh=mesh, **left_out(model))
    for group in groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]
    low = groups[0]["params"]
    own = low[1].detach().full_tensor()
    low[1] = nn.Parameter(own if kind == "plain" else DTensor.from_local(own, mesh, [Partial()]))
    before = [local(p).clone() for p in model.parameters()]
    try:
        optimizer = getattr(lowrank_optim, cls)(groups, lr=0.1)
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    except Exception as error:
        now = [local(p) for p in model.parameters()]
        same = all(torch.equal(x, y) for x, y in zip(before, now, strict=True))
        return type(error).__name__, str(error), same
    return "none", "", False


@pytest.mark.parametrize(
    ("method", "cls", "kind", "word"),
    [
        pytest.param(
            "sst", "SSTAdamW", "plain", "DTensors of one mesh", marks=shards_whole_numbers
        ),
        ("switchlora", "SwitchLoRAAdamW", "partial", "one interval"),
    ],
)
def test_layers_of_factors(method: str, cls: str, kind: str, word: str, ranks: Worlds) -> None:
    values = ranks(2).run(method, modules, method=method, cls=cls, kind=kind).checked()
    assert len(set(values)) == 1, values
    raised, text, same = values[0]
    assert raised == "NotImplementedError" and word in text and same, values[0]
    assert "Train the weights themselves" in text


def test_intervals() -> None:
    """Of 7 rows FSDP2 over tensor parallel gives ranks others than DTensor says they have."""
    mesh = SimpleNamespace(size=lambda dim: (3, 2)[dim])
    parallel = [_StridedShard(0, split_factor=2), Shard(0)]
    assert [lies_in_intervals((n, 2), mesh, parallel) for n in (6, 7, 8)] == [True, False, True]
    assert lies_in_intervals((7, 2), mesh, [Shard(0), Shard(0)])
    assert lies_in_intervals((7, 2), mesh, [Shard(1), Replicate()])
    assert not lies_in_intervals((7, 2), mesh, [Partial(), Shard(0)])


def on_square(world: World, places: Any) -> Any:
    """Dense weights of a mesh of two dimensions, and torch's own step of them."""
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own, theirs = nn.Parameter(spread(world, x, places)), nn.Parameter(x.clone())
    groups: Any = [{"params": [("weight", own)], "rank": None}]
    ours = lowrank_optim.GaLoreAdamW(groups, lr=0.1)
    torchs = torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for _ in range(3):
        own.grad, theirs.grad = spread(world, g, places), g.clone()
        ours.step()
        torchs.step()
    return float((own.detach().full_tensor() - theirs.detach()).abs().max())


@pytest.mark.parametrize(
    "places", [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]], ids=str
)
def test_dense_weights_of_any_mesh_are_fine(places: Any, ranks: Worlds) -> None:
    for gap in ranks(4).run("square", on_square, places=places).checked():
        assert gap <= 1e-12


def no_interval(world: World, shape: tuple[int, ...], place: int, flatten: bool) -> Any:
    """A split inside a dimension that is flattened."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world.size,))
    x = distribute_tensor(torch.randn(shape), mesh, [Shard(place)])
    param = nn.Parameter(x)
    before = param.detach().to_local().clone()
    try:
        group: Any = {"params": [("weight", param)], "rank": 2, "flatten": flatten}
        optimizer = lowrank_optim.GaLoreAdamW([group])
        param.grad = torch.randn_like(param)
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), torch.equal(param.detach().to_local(), before)
    return "none", "", False


@pytest.mark.parametrize(
    ("shape", "place", "flatten"),
    [((6, 3, 4, 4), 2, False), ((6, 4, 4), 2, True)],
    ids=str,
)
def test_a_split_that_is_no_interval(
    shape: tuple[int, ...], place: int, flatten: bool, ranks: Worlds
) -> None:
    args = {"shape": shape, "place": place, "flatten": flatten}
    check(ranks(2).run("no interval", no_interval, **args).checked(), "split")


def other_gradient(world: World, kind: str) -> Any:
    """A gradient that is not placed as its weight is."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world.size,))
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(8, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    param = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]))
    optimizer = lowrank_optim.GaLoreAdamW([("weight", param)], lr=0.1, rank=2)
    alone = nn.Parameter(x.clone())
    one = lowrank_optim.GaLoreAdamW([("weight", alone)], lr=0.1, rank=2)
    alone.grad = g
    one.step()
    if kind == "partial":
        param.grad = DTensor.from_local(g / world.size, mesh, [Partial()])
    else:
        place = Replicate() if kind == "whole" else Shard(1)
        param.grad = distribute_tensor(g, mesh, [place])
    before = param.detach().to_local().clone()
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), torch.equal(param.detach().to_local(), before)
    return "stepped", "", float((param.detach().full_tensor() - alone.detach()).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["partial", "whole", "columns"])
def test_a_gradient_of_another_placement_is_right_or_refused(kind: str, ranks: Worlds) -> None:
    """Local parts that do not belong together have fitting shapes at times: never in silence."""
    values = ranks(2).run(kind, other_gradient, kind=kind).checked()
    assert len(set(values)) == 1, values
    what, text, fine = values[0]
    assert fine, (what, text)
    assert what == "stepped" or "weight" in text, text


def attaching(world: World, mode: Any) -> Any:
    """What was refused, with a process group that is not needed and without."""
    warnings.simplefilter("ignore")
    layer = nn.Linear(12, 8, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world.size,)))
    optimizer = lowrank_optim.GaLoreAdamW(layer.named_parameters(), rank=2)
    before = layer.weight.detach().to_local().clone()
    with pytest.raises(ValueError, match="weight, a DTensor"):
        lowrank_optim.attach_in_backward(optimizer, mode, process_group=dist.group.WORLD)
    lowrank_optim.attach_in_backward(optimizer, mode)
    layer(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    return not torch.equal(layer.weight.detach().to_local(), before)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_attaching_to_backward_is_fine(mode: str, ranks: Worlds) -> None:
    """As it would be without: ``test_in_backward_shards.py``."""
    assert all(ranks(2).run(mode, attaching, mode=mode).checked())
