"""Peaks of whole training steps, against torch's MemTracker on the steps that really run."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from lowrank_optim import FiraAdamW, FrugalAdamW, GaLoreAdamW, GaLoreAdamW8bit, methods, ops
from lowrank_optim.memory import Estimate, estimate, sets
from lowrank_optim.memory.rehearsal import Rehearsal
from lowrank_optim.ops import devices, products, tiles
from lowrank_optim.subspaces import pooled
from lowrank_optim.tensors.alive import Alive
from tests import cases
from tests.memory.trained import tracked

SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 256}
SIZES |= {"num_attention_heads": 2}
TOKENS = (2, 32)


@cache
def config(name: str, layers: int) -> Any:
    sizes = {**SIZES, "num_hidden_layers": layers}
    if name == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2Config(
            n_embd=64, n_layer=layers, n_head=2, n_positions=64, vocab_size=256, **drops, **ends
        )
    if name == "mixtral":
        return MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    return LlamaConfig(**sizes)


def options_of(name: str) -> dict[str, Any]:
    own = {"rank": 8, "update_proj_gap": 3, "stagger": False}
    if name.startswith("Frugal"):
        own["projector"] = "columns"
    if name.startswith("DCT"):  # "auto" depends on the device, and FFTs on who serves them
        own["transform"] = "matmul"
    if name.startswith("SST"):
        own = {"rank": 8, "steps_per_iteration": 3, "iterations_per_round": 1, "stagger": False}
    if name.startswith("Switch"):
        own = {"rank": 8}
    if name.startswith("Lisa"):
        own = {"active_layers": 1, "update_proj_gap": 3}
    return own


def projects(name: str) -> bool:
    """Whether ``mode="project"`` takes the class: others need whole gradients."""
    return name.startswith("GaLore")


def both(
    monkeypatch: pytest.MonkeyPatch, model: Any, name: str, **training: Any
) -> tuple[Estimate, dict[str, int]]:
    """What is predicted, and what is counted while the package takes the CPU for an accelerator.

    Of layers that take turns so many steps run that each has one.
    """
    options = options_of(name) if hasattr(methods, name) else {}
    training["steps"] = 12 if name.startswith(("BAdam", "Lisa")) else 4
    return counted_over(monkeypatch, model, name, options, **training)


def counted_over(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    name: str,
    options: dict[str, Any],
    *,
    steps: int,
    in_backward: Any = None,
    **training: Any,
) -> tuple[Estimate, dict[str, int]]:
    """The same of other options, and of so many steps."""
    cls = getattr(methods, name, None) or getattr(torch.optim, name)
    own = {"in_backward": in_backward, "tokens": TOKENS, **training}
    # of a CPU, whose allocator adds nothing, and the tracker neither
    found = estimate(model, cls, device="cpu", **own, **options)
    with monkeypatch.context() as patch:
        patch.setattr(devices, "HOSTS", frozenset())
        patch.setattr(pooled, "DRAWN", 8)  # by the host, of whose memory no estimate is
        return found, tracked(
            model, cls, options, tokens=TOKENS, mode=in_backward, steps=steps, **training
        )


EVERY = [
    (model, name, mode)
    for model in ("llama", "gpt2", "mixtral")
    for name in cases.method_names()
    for mode in (None, "step", "project")
    if mode != "project" or projects(name)
]
DEFAULT = {("llama", "DCTAdamW", None)}


@pytest.mark.parametrize(
    ("model", "name", "mode"),
    [pytest.param(*x, marks=() if x in DEFAULT else pytest.mark.slow) for x in EVERY],
)
@pytest.mark.filterwarnings("ignore")
def test_peaks_are_what_torch_counts(
    monkeypatch: pytest.MonkeyPatch, model: str, name: str, mode: Any
) -> None:
    """Of backward, of a step, and of one that finds bases; and which of them is the worst."""
    layers = 1 if (model, name, mode) in DEFAULT else 2
    found, counted = both(monkeypatch, config(model, layers), name, in_backward=mode)
    held = found.held - found.weights + found.host  # here all is on the CPU
    most = max(counted.values())
    assert held + max(found.beside.values()) == pytest.approx(most, rel=0.02)
    if mode is None:  # inside backward, moments are told apart by the estimate alone
        for moment, size in counted.items():
            estimated = held + found.beside.get(moment, 0)
            assert estimated == pytest.approx(size, rel=0.02), moment
        assert found.beside[found.peak_at] == max(found.beside.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["step", "project"])
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_micro_batches(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Gradients are added up, in checkpointed layers."""
    training = {"in_backward": mode, "accumulation_steps": 2, "checkpointing": True}
    found, counted = both(monkeypatch, config("llama", 2), "GaLoreAdamW", **training)
    held = found.held - found.weights
    assert held + max(found.beside.values()) == pytest.approx(max(counted.values()), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"on_refresh": "reset"}, {"block_order": "ascending"}])
@pytest.mark.parametrize("mode", [None, "step"])
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_the_worst_of_all_sets(
    monkeypatch: pytest.MonkeyPatch, mode: Any, options: dict[str, Any]
) -> None:
    """Tensors take turns, and other sets than the first hold more, by a tenth of it and above."""
    monkeypatch.setattr(sets, "SWITCHES", 4)  # as twelve steps have
    own = {"projector": "block", "density": 0.25, "update_proj_gap": 3, **options}
    model = config("llama", 2)
    found, counted = counted_over(
        monkeypatch, model, "FrugalAdamW", own, steps=12, in_backward=mode
    )
    held = found.held - found.weights
    assert held + max(found.beside.values()) == pytest.approx(max(counted.values()), rel=0.02)
    if mode is None:
        for moment, size in counted.items():
            assert held + found.beside[moment] == pytest.approx(size, rel=0.02), moment


@pytest.mark.filterwarnings("ignore")
def test_the_worst_step_of_projected_gradients_is_one_of_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before which most bytes stay whole: every turn comes within a gap, and it is there.

    Nothing of that is asked for beforehand where coordinates have no memory.
    """
    options = {"rank": 8, "update_proj_gap": 3, "state_dtype": "bfloat16"}
    found, counted = counted_over(
        monkeypatch, config("llama", 1), "GaLoreAdamW", options, steps=4, in_backward="project"
    )
    held = found.held - found.weights
    assert found.peak_at == "refresh"
    assert found.peak - found.weights == pytest.approx(max(counted.values()), rel=0.001)
    assert held + found.beside["step"] < 0.97 * max(counted.values())


@pytest.mark.skipif(not products.WRITES_WIDE, reason="torch has no such products")
@pytest.mark.parametrize("mode", [None, "step", "project"])
def test_where_nobody_says_the_device_is_a_gpu(mode: Any) -> None:
    """Products with halves of what is wide, which others do not have, need more."""
    model = nn.Linear(2048, 256, bias=False, dtype=torch.bfloat16)
    own: dict[str, Any] = {"rank": 64, "in_backward": mode}
    here, there, other = (
        estimate(model.to("meta"), GaLoreAdamW, device=device, **own)
        for device in (None, "cuda", "xpu")
    )
    assert here.beside == there.beside
    assert here.beside["refresh"] > other.beside["refresh"]


def rehearsed(cls: Any, shapes: Any, **options: Any) -> Rehearsal:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    return Rehearsal(params, lambda own: cls([own[id(p)] for p in params], **options))


def test_a_refresh_needs_more_than_a_step() -> None:
    """Of all bases and of some; none are found where none are due."""
    found = rehearsed(GaLoreAdamW, [(64, 96), (96, 64), (64,)], rank=4, update_proj_gap=4)
    turns = found.turns()
    assert len(turns) == 2
    assert found.step("none") < found.step(turns[0]) <= found.step("all")


def test_staging_is_counted_once() -> None:
    """What a first step with moments on the host needs in passing is what later ones do."""
    model = nn.Sequential(nn.Embedding(20000, 64), nn.Linear(64, 32)).to("meta")
    own = {"rank": 4, "in_backward": "step"}
    here = estimate(model, GaLoreAdamW, **own)
    there = estimate(model, GaLoreAdamW, state_device="cpu", **own)
    assert there.staging > 0
    assert there.refresh_transients == here.refresh_transients > 0
    assert there.step_transients == here.step_transients
    assert there.beside == here.beside


def test_what_runs_beside_it_changes_no_figure() -> None:
    """A frame that torch.compile watches holds what it was called with until it returns.

    What a refresh makes for a call must not be in it, and of an estimate nothing is watched.
    """

    def refresh() -> int:
        weight = nn.Parameter(torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta"))
        found = Rehearsal([weight], lambda own: GaLoreAdamW([*own.values()], rank=1024), "step")
        return found.arrivals("first")[0,]

    def sst() -> Estimate:
        model = nn.Linear(176, 64, bias=False, device="meta")
        return estimate(model, methods.SSTAdamW, in_backward="step", **options_of("SSTAdamW"))

    watched = torch._dynamo.run
    assert watched(refresh)() == refresh()
    assert watched(sst)() == sst()


SHAPES = [(64, 96)] * 5 + [(96, 64), (64,), (64, 96), (32, 32), (64,)]


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
@pytest.mark.parametrize(
    "cls",
    [
        FrugalAdamW,
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (GaLoreAdamW8bit, FiraAdamW, GaLoreAdamW)
        ),
    ],
)
def test_some_matrices_say_what_all_need(
    monkeypatch: pytest.MonkeyPatch, cls: Any, on_refresh: str
) -> None:
    """Matrices that are stepped alike are left out of a rehearsal, and nothing of it changes."""
    options = {"rank": 4, "update_proj_gap": 4, "on_refresh": on_refresh}
    options |= {"projector": "columns"} if cls is FrugalAdamW else {}
    monkeypatch.setattr("lowrank_optim.engine.bucket.CHUNK_BYTES", {True: 2 * 4 * 4 * 96, False: 1})
    some = rehearsed(cls, SHAPES, **options)
    dues = ["first", "none", "all", *some.turns()]
    found = [some.step(due) for due in dues]
    path = "lowrank_optim.memory.rehearsal.told_apart"
    with monkeypatch.context() as patch:
        from lowrank_optim.engine.bucket import bucketed

        patch.setattr(path, lambda items, chosen, due, apart: bucketed(items, chosen))
        every = rehearsed(cls, SHAPES, **options)
        assert [every.step(due) for due in dues] == found
    assert len(set(found)) > 1


def test_torch_takes_all_parameters_at_once() -> None:
    """AdamW's ``foreach`` on an accelerator: square roots of all second moments at once."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    found = estimate(model, torch.optim.AdamW)
    assert found.step_transients >= found.weights
    assert found.peak_at == "step"
    one_by_one = estimate(model, torch.optim.AdamW, foreach=False)
    assert one_by_one.step_transients < found.step_transients


class Looks(torch.optim.SGD):
    """A step that does what is not known without values."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if _get_current_dispatch_mode() is not None:
                    raise NotImplementedError
                self.state[p]["x"] = torch.zeros_like(p)


def test_what_is_not_known_is_said() -> None:
    """Steps of another's optimizer that need values count as unknown, not as nothing."""
    found = estimate(nn.Linear(8, 8), Looks)
    assert (found.step_transients, found.peak_at) == (None, "backward")
    assert "without activations or what a step needs" in str(found)


@pytest.mark.parametrize("shape", [(96, 4096), (4096, 96), (96, 100)])
def test_some_tiles_need_what_all_do(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """A rehearsal takes the first two and the last of alike tiles; real steps take all of them."""
    monkeypatch.setattr(ops.products, "TILE_ELEMENTS", 1 << 12)
    a = torch.randn(8, shape[0], dtype=torch.float64)
    b = torch.randn(shape).bfloat16()
    counted, outs = [], []
    for mode in (nullcontext, tiles.sizes_alone):
        alive = Alive()
        with mode(), alive:
            outs.append(ops.mixed_matmul(a, b))
        counted.append(alive.most)
    assert counted[0] == counted[1]
    torch.testing.assert_close(outs[0], a @ b.double())
    assert not torch.equal(*outs)
