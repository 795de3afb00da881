"""What one rank of 64 keeps: counted on a group that sends nothing, against the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import lowrank_optim
from lowrank_optim import LowRankOptimizer, memory
from lowrank_optim.engine.state import on_host

SHAPES = {"wide": (128, 512), "tall": (512, 128), "square": (256, 256), "experts": (64, 128, 64)}
"""Divided by 64 in every way."""
RANK = 16

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {"projector": "svd"}),
    "two sides": ("GaLoreAdamW", {"projector": "svd", "proj_type": "full"}),
    "larger side": ("GaLoreLion", {"projector": "rsvd", "proj_type": "reverse_std"}),
    "momentum in bfloat16": ("GaLoreSGD", {"momentum": 0.9, "state_dtype": "bfloat16"}),
    "fira": ("FiraAdamW", {"projector": "random"}),
    "columns": ("FrugalAdamW", {"projector": "columns"}),
    "rows": ("FrugalLion", {"projector": "rows"}),
    "blocks": ("FrugalAdamW", {}),
    "dct": ("DCTAdamW", {}),
    "dct memory": ("DCTAdamW", {"error_feedback": "float32"}),
    "dct memory bfloat16": ("DCTAdamW", {"error_feedback": "bfloat16", "update_proj_gap": 9}),
    "ldadam": ("LDAdamW", {}),
    "ldadam memory 8bit": ("LDAdamW", {"error_feedback": "8bit"}),
    "dense": ("GaLoreAdamW", {"rank": None}),
}


@contextmanager
def pretended(size: int, rank: int) -> Iterator[None]:
    """A world of ``size`` of which this process is one rank and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(shape))
            self.add_module(name, layer)


def made(method: str, size: int, rank: int) -> LowRankOptimizer:
    """An optimizer with the state of its first step, on one rank."""
    cls, options = METHODS[method]
    own: dict[str, Any] = {"lr": 1e-2, **options}
    if not cls.startswith("Frugal"):
        own = {"rank": RANK, **own}
    model = Weights()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    params: Any = model.named_parameters()
    if own.get("rank", 1) is None:
        params = [{"params": list(params), "rank": own.pop("rank")}]
    optimizer: LowRankOptimizer = getattr(lowrank_optim, cls)(params, **own)
    optimizer._make_state()
    return optimizer


def entries(optimizer: LowRankOptimizer) -> dict[tuple[str, str], Tensor]:
    out = {}
    for group in optimizer.param_groups:
        for item in optimizer._items(group):
            for key, x in optimizer.state[item.param].items():
                out[item.name, key] = x
    return out


def nbytes(x: Tensor) -> int:
    """Of what is here."""
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.untyped_storage().nbytes()


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("method", METHODS)
def test_state_of_a_rank(method: str, size: int) -> None:
    """Together it is one process's; what grows with a split side is split, the rest is whole.

    On the first rank, and on the last, which has least where sizes do not divide.
    """
    alone = entries(made(method, 1, 0))
    for rank in (0, size - 1):
        with pretended(size, rank):
            split = entries(made(method, size, rank))
            assert split.keys() == alone.keys()
            for (name, key), x in split.items():
                check_entry(f"{key} of {name}", key, x, alone[name, key], size)


BIG = 1024
"""Numbers of an entry from which on no rank may keep a copy of all of them."""


def check_entry(what: str, key: str, x: Tensor, one: Tensor, size: int) -> None:
    assert x.shape == one.shape and x.dtype == one.dtype, what
    if on_host(key):
        assert not isinstance(x, DTensor) and x.device == one.device, f"{what} is a plain scalar"
    if one.dim() == 0:
        return
    assert isinstance(x, DTensor), f"{what} is of a sharded weight and a plain tensor"
    (place,) = x.placements
    experts = what.endswith("experts.weight") and one.dim() > 1 and len(one) == 64
    if experts:
        assert place == Shard(0), f"{what} is {place}: experts are split, and all that is theirs"
    elif key in ("basis", "basis_index", "index") or key.endswith(".age"):
        assert isinstance(place, Replicate), f"{what} is {place}"
    elif one.numel() >= BIG:
        assert isinstance(place, Shard), f"{what} is {place}: {nbytes(x)} bytes on every rank"
    if isinstance(place, Shard):
        assert nbytes(x) * size == one.numel() * one.element_size(), what


@pytest.mark.parametrize("method", METHODS)
def test_moments_shrink_with_the_ranks(method: str) -> None:
    """``memory.report`` counts what is here: moments a 64th of the estimate of one process."""
    cls, options = METHODS[method]
    own = {"rank": RANK, **options} if not cls.startswith("Frugal") else options
    groups = None
    if own.get("rank", 1) is None:
        groups = dense
        own.pop("rank")
    whole = memory.estimate(Weights(), getattr(lowrank_optim, cls), groups=groups, **own)
    with pretended(64, 0):
        optimizer = made(method, 64, 0)
        held = memory.report(optimizer)
        counted = sum(nbytes(x) for x in entries(optimizer).values())
        counted += sum(x.nbytes for x in optimizer._shared.tensors())
    assert held.total == counted
    alone = entries(made(method, 1, 0))
    small = sum(x.nbytes for x in alone.values() if x.dim() and x.numel() < BIG)
    assert whole.moments / 64 <= held.moments <= whole.moments / 64 + small
    assert held.basis <= whole.basis and held.other <= whole.other


FACTORED = {
    "sst": ("SSTAdamW", {"factors": "active"}),
    "switchlora": ("SwitchLoRAAdamW", {}),
}


@pytest.mark.parametrize("method", FACTORED)
def test_of_two_factors_one_is_split(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a number for each column that is stepped is; a pool stays in host memory."""
    monkeypatch.setitem(METHODS, method, FACTORED[method])
    alone = entries(made(method, 1, 0))
    with pretended(8, 0):
        optimizer = made(method, 8, 0)
        for item in optimizer._items(optimizer.param_groups[0]):
            view = item.view
            if view is None or view.batch or view.m == view.n:
                continue
            for key, x in optimizer.state[item.param].items():
                one, what = alone[item.name, key], f"{key} of {item.name}"
                assert x.shape == one.shape and x.device == one.device, what
                is_split = isinstance(x, DTensor) and x.placements == (Shard(x.dim() - 1),)
                assert is_split == (x.dim() > 1 and x.shape[-1] == view.n), what
                if is_split:
                    assert nbytes(x) * 8 == one.numel() * one.element_size(), what


def dense(module: nn.Module) -> Any:
    return [{"params": list(module.named_parameters()), "rank": None}]


EIGHT_BITS: dict[str, tuple[int, ...]] = {
    "wide": (128, 64 * 256),
    "ragged": (128, 64 * 256 + 100),
    "narrow": (250, 255),
    "table": (640, 300),
}
"""As many blocks as ranks, one more that is not full, one alone; and a dense one."""


# one rank of each world: torch keeps what it found of a mesh that is like another
@pytest.mark.parametrize(
    ("state_dtype", "size", "rank", "blocks"),
    [
        ("8bit", 64, 63, 0), ("8bit", 32, 5, 3), ("8bit", 16, 12, 5),
        ("4bit", 128, 127, 0), ("4bit", 32, 25, 4),
    ],
)  # fmt: skip
def test_moments_in_blocks(state_dtype: str, size: int, rank: int, blocks: int) -> None:
    """Codes and scales of a rank: those of the blocks that it steps, and the estimate says so."""
    with pretended(size, rank):
        optimizer, model = in_blocks(size, state_dtype)
        mine = {k: nbytes(x) for k, x in entries(optimizer).items() if "exp_avg" in k[1]}
        held = memory.report(optimizer)
        cls, own = lowrank_optim.GaLoreAdamW, {"state_dtype": state_dtype}
        told = memory.estimate(model, cls, groups=grouped, lr=1e-2, **own)
    assert sum(mine.values()) == held.moments == told.moments
    assert optimizer.summary().state_bytes == held.total
    counted = {
        name: sum(size for (x, _), size in mine.items() if x.startswith(name))
        for name in EIGHT_BITS
    }
    wide, block, row = {
        "8bit": (64, 256 + 4, 300 + 2 * 4),
        "4bit": (128, 64 + 4, 150 + 3 * 4),
    }[state_dtype]
    block *= 2 * RANK
    assert counted["wide"] == wide // size * block
    assert counted["ragged"] == blocks * block, "of one more, by torch.chunk"
    assert counted["narrow"] == 0, "all on the first rank"
    assert counted["table"] == 2 * 640 // size * row


EIGHT_FACTORED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "sst": ("SSTAdamW8bit", {"factors": "active"}, ("v.exp_avg", "v.exp_avg_sq", "basis_v")),
    "switchlora": (
        "SwitchLoRAAdamW8bit", {}, ("A.exp_avg", "A.exp_avg_sq", "basis_A", "host.pool_A")
    ),
    "adafactor": (
        "GaLoreAdafactor", {"state_dtype": "8bit", "beta1": 0.9},
        ("low.exp_avg", "low.exp_avg_sq_col"),
    ),
}  # fmt: skip
"""Class, options, and what ranks have parts of."""


@pytest.mark.parametrize("method", EIGHT_FACTORED)
def test_moments_in_8_bits_of_factors_and_means(method: str) -> None:
    """Of one factor a rank has its blocks, and of the other all; so of means. Report and estimate
    say so."""
    cls, options, parts = EIGHT_FACTORED[method]
    layer = nn.Linear(8192, 128, bias=False)
    alone = getattr(lowrank_optim, cls)(layer.named_parameters(), rank=64, **options)
    alone._make_state()
    one = {key: nbytes(x) for (_, key), x in entries(alone).items()}
    size = 16
    with pretended(size, 3):
        fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
        told = memory.estimate(layer, getattr(lowrank_optim, cls), rank=64, **options)
        optimizer = getattr(lowrank_optim, cls)(layer.named_parameters(), rank=64, **options)
        optimizer._make_state()
        held = memory.report(optimizer)
        mine = {key: nbytes(x) for (_, key), x in entries(optimizer).items()}
    assert sum("scale" in key for key in one) >= 2
    for key, bytes_ in mine.items():
        split = key in parts or key.removesuffix("_scale") in parts
        assert bytes_ * (size if split else 1) == one[key], key
    moments = sum(x for key, x in mine.items() if "exp_avg" in key or key.endswith(".age"))
    assert held.moments == told.moments == moments


def grouped(model: nn.Module) -> Any:
    named = dict(model.named_parameters())
    dense = {"params": [("table.weight", named.pop("table.weight"))], "rank": None}
    own = {"params": [("narrow.weight", named.pop("narrow.weight"))], "rank": 17}
    return [{"params": list(named.items()), "rank": RANK}, own, dense]


def in_blocks(size: int, state_dtype: str) -> tuple[LowRankOptimizer, nn.Module]:
    model, mesh = nn.Module(), init_device_mesh("cpu", (size,))
    for name, shape in EIGHT_BITS.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.ones(shape))
        model.add_module(name, layer)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = lowrank_optim.GaLoreAdamW(grouped(model), lr=1e-2, state_dtype=state_dtype)
    optimizer._make_state()
    return optimizer, model


CHUNKS = [(5, 0, 3), (5, 3, 3), (5, 4, 1), (6, 5, 0)]
"""Ranks, one of them, and how many of 13 rows it has."""


@pytest.mark.parametrize(("size", "rank", "rows"), CHUNKS)
def test_sizes_that_do_not_divide_are_split_as_the_weight_is(
    size: int, rank: int, rows: int
) -> None:
    """A rank has as many columns of the moments as it has rows of the weight; the last none."""
    with pretended(size, rank):
        layer = nn.Linear(6, 13, bias=False)
        fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
        assert layer.weight.to_local().shape[0] == rows
        optimizer = lowrank_optim.GaLoreAdamW(layer.named_parameters(), rank=2)
        optimizer._make_state()
        moment = optimizer.state[layer.weight]["low.exp_avg"]
        assert tuple(moment.shape) == (2, 13)
        assert tuple(moment.to_local().shape) == (2, rows)
