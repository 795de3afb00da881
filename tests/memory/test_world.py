"""Estimates of one of several GPUs, against ranks that train under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit, memory
from lowrank_optim.memory import estimate, sets, world
from lowrank_optim.memory.estimating import estimated
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.training import Training
from lowrank_optim.memory.world import pretended
from lowrank_optim.nn import convert
from lowrank_optim.tensors.alive import Alive, of_shape
from tests import cases
from tests.cases import several_gpus
from tests.memory.ranks import SHARDS, TOKENS, class_of, config, held, messages, peaks
from tests.sharded.ranks import Ranks

Worlds = Callable[[int], Ranks]

UNEVEN = {"hidden_size": 44, "intermediate_size": 275, "vocab_size": 255}
"""Rows that two ranks do not divide, and columns of 8-bit moments that are no whole blocks."""


def options_of(name: str, projector: str | None = None) -> dict[str, Any]:
    own: dict[str, Any] = {"rank": 16, "update_proj_gap": 3, "stagger": False}
    if name.startswith("SST"):
        own = {"rank": 16, "steps_per_iteration": 3, "factors": "active", "stagger": False}
    if name.startswith("Switch"):
        own = {"rank": 16}
    if projector is not None:
        own["projector"] = projector
    if projector == "block" or (projector is None and name.startswith("Frugal")):
        own["rank"] = 0.25
    return own


def refused(name: str, projector: str | None) -> bool:
    """What no DTensor may be."""
    return name.startswith("LDAdam") or projector == "randk" or (
        projector == "block" and ("Adafactor" in name or name.startswith(("Fira", "Apollo")))
    )  # fmt: skip


EVERY = [
    *((name, None) for name in cases.method_names() if not refused(name, None)),
    *((name, projector) for name, projector in cases.pairs() if not refused(name, projector)),
]
FEW = [
    ("GaLoreAdamW", "rsvd"),
    ("SSTAdamW", None),
    ("LisaAdamW", None),
]


IN_4_BITS = [(name, None) for name in cases.distinct_names() if not refused(name, None)]


def in_4_bits(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with moments in 4 bits."""
    return [{**run, "options": {**run["options"], "state_dtype": "4bit"}} for run in runs]


def runs(pairs: list[tuple[str, str | None]], **own: Any) -> list[dict[str, Any]]:
    return [
        {"name": n, "options": options_of(n, p) if n != "AdamW" else {}, **own} for n, p in pairs
    ]


def told(run: dict[str, Any], size: int = 2, **own: Any) -> Any:
    """The estimate of a run."""
    return estimate(
        config(**run.get("sizes", {})),
        class_of(run["name"]),
        world_size=size,
        shard=SHARDS[run.get("shard")],
        dtype=run.get("dtype", torch.bfloat16),
        checkpointing=run.get("checkpointing", False),
        accumulation_steps=run.get("accumulation_steps", 1),
        **own,
        **run["options"],
    )


@pytest.mark.parametrize(
    "pairs", [pytest.param(FEW, id="few"), pytest.param(EVERY, id="all", marks=pytest.mark.slow)]
)
@several_gpus
@pytest.mark.filterwarnings("ignore")
def test_a_rank_holds_what_is_told(ranks: Worlds, pairs: list[tuple[str, str | None]]) -> None:
    """Of two real ranks, to the byte: weights, gradients, bases, moments, the rest."""
    wrong = []
    of_four = IN_4_BITS if pairs is EVERY else []
    for run in (*runs(pairs, sizes=UNEVEN), *in_4_bits(runs(of_four, sizes=UNEVEN))):
        real, other = ranks(2).run("held", held, run=run).checked()
        e = told(run, device="cpu", transients=False)
        found = (e.weights, e.gradients, e.basis, e.moments, e.other)
        least = other[0] + sum(other[2:])
        if found != real or e.least != least:
            wrong.append((run, found, real, e.least, least))
    assert not wrong, wrong


GALORE = [("GaLoreAdamW", None)]
PEAKS = [*runs(GALORE, checkpointing=True, accumulation_steps=2, shard="placed")]
MORE = [
    *runs(GALORE),
    *runs([("FrugalAdamW", "columns")], shard="mixed", dtype=torch.float32),
    *runs([(n, "rsvd" if n in cases.projecting_names() else None) for n in cases.distinct_names()
           if not refused(n, None)]),
    *runs([("GaLoreAdamW8bit", "svd"), ("FiraAdamW", "svd")], checkpointing=True),
    *runs([("GaLoreAdamW8bit", None)], shard="mixed", dtype=torch.float32),
    *runs([("GaLoreAdamW", "random")], shard="placed", checkpointing=True),
    *in_4_bits(runs([("GaLoreAdamW", None), ("DCTAdamW", None)])),
]  # fmt: skip


@pytest.mark.parametrize("asked", [pytest.param(PEAKS, id="few"), pytest.param(MORE, id="all")])
@several_gpus
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_a_rank_are_what_torch_counts(ranks: Worlds, asked: list[dict[str, Any]]) -> None:
    """Of backward, of a step, and of one that finds bases, on each of two ranks that train."""
    wrong = []
    for run in asked:
        own, other = ranks(2).run("peaks", peaks, run=run).checked()
        if own != other:  # both have the same shards
            wrong.append((run["name"], own, other))
        e = told(run, device="cpu", tokens=TOKENS)
        for moment, size in own.items():
            found = e.state + e.beside.get(moment, 0)
            if moment in e.beside and not 0.98 * size <= found <= 1.02 * size:
                wrong.append((run["name"], moment, found / size))
        most = e.peak - e.weights + e.host  # here all is on the CPU
        if not 0.98 <= most / max(own.values()) <= 1.02:
            wrong.append((run["name"], "peak", most, own))
    assert not wrong, wrong


INSIDE = [
    *runs(GALORE, mode="step"),
    *runs(GALORE, mode="step", accumulation_steps=2, checkpointing=True, shard="placed"),
    *runs(GALORE, mode="step", shard="mixed", dtype=torch.float32),
    *runs([("FiraAdamW", "svd"), ("DCTAdamW8bit", None), ("FrugalAdamW", "block")], mode="step"),
    *runs([("LisaAdamW", None), ("SSTAdamW", None), ("GaLoreAdafactor", None)], mode="step"),
    *runs(GALORE, mode="project", shard="placed"),
    *runs(GALORE, mode="project"),
    *in_4_bits(runs(GALORE, mode="step")),
]


@several_gpus
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peaks_inside_backward(ranks: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens so few that gradients, and steps inside backward, are what counts."""
    wrong = []
    monkeypatch.setattr(sets, "SWITCHES", 2)  # as four steps have
    for run in INSIDE:
        run = {**run, "tokens": (1, 8)}
        own, other = ranks(2).run("peaks", peaks, run=run).checked()
        e = told(run, device="cpu", tokens=run["tokens"], in_backward=run["mode"])
        counted = max(*own.values(), *other.values())  # either may have more: of bases it finds
        most = (e.peak - e.weights + e.host) / counted
        if not 0.98 <= most <= 1.02:
            wrong.append((run["name"], run["mode"], most, own, other, e.beside))
    assert not wrong, wrong


@pytest.mark.parametrize("checkpointing", [True, False])
@several_gpus
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_backward_of_micro_batches_of_few_tokens(ranks: Worlds, checkpointing: bool) -> None:
    """Gradients that are added up outweigh activations."""
    (run,) = runs(GALORE, accumulation_steps=2, checkpointing=checkpointing, tokens=(1, 8))
    own, other = ranks(2).run("peaks", peaks, run=run).checked()
    e = told(run, device="cpu", tokens=run["tokens"])
    found = e.state + e.beside["backward"]
    assert found == pytest.approx(own["backward"], rel=0.02)
    assert found == pytest.approx(other["backward"], rel=0.02)


def test_a_message_counts_until_it_is_done(ranks: Worlds) -> None:
    """What is counted of ranks is not what threads that sent something still hold of it."""
    assert ranks(2).run("messages", messages, count=60).checked() == [2 * 2**16] * 2


@several_gpus
@pytest.mark.parametrize("size", [3, 8])
def test_the_first_rank_holds_most(size: int) -> None:
    """Of all ranks that there are, and together they hold each weight once."""
    run = runs([("GaLoreAdamW8bit", None)], sizes=UNEVEN)[0]
    e = told(run, size, transients=False)
    found, weights = [], 0
    for rank in range(size):
        with pretended(size, rank=rank) as world, torch.device("meta"):
            model = world.on_meta(model_of(config(**UNEVEN), torch.bfloat16))
            optimizer = GaLoreAdamW8bit(model.named_parameters(), **run["options"])
            optimizer._make_state()
            params = [p.to_local() for p in model.parameters()]
            weights += sum(x.nbytes for x in params)
            found.append(memory.storage_bytes(params) + memory.report(optimizer).total)
    assert weights == estimate(config(**UNEVEN), torch.optim.SGD, transients=False).weights
    assert max(found) == found[0] == e.weights + e.state
    assert min(found) == found[-1] == e.least


@several_gpus
def test_the_peak_is_that_of_the_worst_rank() -> None:
    """The first finds the basis of the largest matrix, and the second those of two others."""
    model = nn.Sequential(*(nn.Linear(n, 64, bias=False, device="meta") for n in (80, 64, 64)))
    own = {"rank": 4, "projector": "svd"}
    peaks = []
    for rank in range(2):
        with pretended(2, rank=rank) as among:
            training = Training(in_backward="step", device="cuda").on(among)
            peaks.append(estimated(model, GaLoreAdamW, training, None, own, {}).peak)
    found = estimate(model, GaLoreAdamW, world_size=2, in_backward="step", device="cuda", **own)
    assert peaks[1] > peaks[0]
    assert (found.peak, found.rank) == (peaks[1], 1)
    assert "of rank 1" in str(found)


@several_gpus
def test_one_gpu_is_no_other() -> None:
    """A world of one holds the state of one process, and one estimate leaves nothing to another."""
    run = runs(GALORE)[0]
    before = told(run, 4, transients=False)
    alone = estimate(config(), GaLoreAdamW, transients=False, **run["options"])
    one = told(run, 1, transients=False)
    assert (one.weights, one.gradients, one.state) == (
        alone.weights,
        alone.gradients,
        alone.state,
    )
    assert not dist.is_initialized()
    assert told(run, 4, transients=False) == before
    assert before.weights == alone.weights // 4 and before.gathered > 0


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"world_size": 0}, ValueError, "world_size must be a number of ranks, 1 or more"),
    "a bool": ({"world_size": True}, ValueError, "world_size must be a number of ranks"),
    "shard alone": ({"shard": print}, ValueError, "shard=.* has no effect without world_size"),
    "no function": ({"world_size": 2, "shard": 3}, TypeError, "shard must be a function"),
    "shards nothing": ({"world_size": 2, "shard": lambda *_: None}, ValueError, "shard must shard"),
    "randk": ({"world_size": 2, "projector": "randk"}, NotImplementedError, "randk"),
}


SHARDED_FIRST = ("shards nothing", "randk")
"""What is seen of the shards that a rank has."""


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=several_gpus if x in SHARDED_FIRST else ()) for x in REFUSED]
)
def test_what_is_refused(case: str) -> None:
    """With a sentence, and with nothing left behind."""
    given, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        estimate(config(), GaLoreAdamW, rank=8, **given)
    assert not dist.is_initialized()


@several_gpus
def test_two_dtypes_of_one_unit_are_refused() -> None:
    mixed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    with pytest.raises(ValueError, match="fully_shard does not take it"):
        estimate(mixed, GaLoreAdamW, rank=2, world_size=2)


def test_a_torch_that_sends_nothing_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 2.6 said of it that a model does what tensors without data cannot."""
    monkeypatch.setattr(world, "sends_without_data", lambda: False)
    with pytest.raises(RuntimeError, match=r"world_size=2: torch .*Take a newer torch, or leave"):
        estimate(config(), GaLoreAdamW, rank=8, world_size=2)
    assert not dist.is_initialized()


def test_models_and_processes_that_are_refused() -> None:
    """Layers of factors, a layout, a process that is in a group."""
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(NotImplementedError, match="bitsandbytes"):
        estimate(model, "adamw-8bit", world_size=2)
    with pytest.raises(NotImplementedError, match="in_backward='step' with world_size of AdamW"):
        estimate(model, torch.optim.AdamW, world_size=2, in_backward="step")
    with pretended(2), pytest.raises(RuntimeError, match="is in a process group already"):
        estimate(model, GaLoreAdamW, rank=2, world_size=2)
    convert(model, "switchlora", rank=4)
    with pytest.raises(NotImplementedError, match="layers of factors"):
        estimate(model, GaLoreAdamW, rank=2, world_size=2)


def test_what_has_a_shape_alone_is_no_memory() -> None:
    """Where the meta device stands for an accelerator it would count as a matrix there."""
    with Alive("meta") as alive:
        x = of_shape((64, 96), torch.bfloat16)
        view = x[:, :32].mT
    assert (x.shape, x.dtype, view.shape) == ((64, 96), torch.bfloat16, (32, 64))
    assert alive.most == x.element_size()


def test_a_storage_that_is_emptied_counts_no_more() -> None:
    """As FSDP2 does with gathered parameters."""
    with Alive() as alive:
        x = torch.empty(64)
        x.untyped_storage().resize_(0)
        assert (alive.now, alive.most) == (0, 256)
        x.untyped_storage().resize_(256)
        y = torch.empty(8)
        assert (alive.now, alive.most) == (288, 288)
        del x, y
        assert alive.now == 0
