"""A step in a CUDA graph: replayed with other gradients, it is the step that eager code takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, SSTAdamW, attach_in_backward
from lowrank_optim.engine import step as engine_step
from lowrank_optim.engine.draws import seeds_of
from lowrank_optim.engine.recording import check_recorded
from lowrank_optim.engine.state import RECORDED, init_state
from lowrank_optim.nn import convert
from lowrank_optim.ops import devices, quant
from lowrank_optim.rules.adamw import AdamW
from tests import cases, runs
from tests.compare import assert_close, assert_mostly_close
from tests.engine.replay import captured

GAP = 4
BY_HOST = ("SwitchLoRA", *cases.WHOLE_LAYERS)
"""Parts of the names of what follows the host's count of steps."""


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stands for a device that captures graphs."""
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    yield


def names() -> list[Any]:
    """Those that can be captured; what 8-bit classes add is one store, which one of them shows."""
    found = [n for n in cases.method_names() if not any(part in n for part in BY_HOST)]
    return [
        pytest.param(n, marks=pytest.mark.slow if "8bit" in n and n != "GaLoreAdamW8bit" else ())
        for n in found
    ]


def rate(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def build(name: str, params: Sequence[Tensor], **options: Any) -> LowRankOptimizer:
    given: dict[str, Any] = {"update_proj_gap": GAP, "stagger": False, "weight_decay": 0.1}
    if "projector" not in cases.METHOD_ARGS.get(name, {}):
        given["projector"] = "svd"
    if name.startswith("Frugal"):
        given["projector"] = "columns"
    if name.startswith("SST"):  # whose warm-up is longer than what is between two refreshes
        del given["update_proj_gap"], given["projector"]
        given |= {"steps_per_iteration": GAP, "warmup_steps": 6}
    return cases.build(name, params, **given | options)


def pair(
    name: str, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], LowRankOptimizer, list[Tensor], LowRankOptimizer]:
    """Parameters and an optimizer to capture, and others of the same values that step eagerly."""
    mine: list[Tensor] = [*runs.parameters(dtype).values()]
    theirs: list[Tensor] = [*runs.copies(mine)]
    lr = None if options.get("relative_step") else 0.01
    capturable = build(name, mine, lr=None if lr is None else rate(lr), capturable=True, **options)
    return mine, capturable, theirs, build(name, theirs, lr=lr, **options)


def give(params: Sequence[Tensor], others: Sequence[Tensor], step: int) -> None:
    """Gradients of a step, into the memory that a graph has recorded where there is one."""
    generator = torch.Generator().manual_seed(step)
    for p, q in zip(params, others, strict=True):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        q.grad = grad.clone()
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


def check_replays(
    name: str, dtype: torch.dtype, rounded: float = 0.0, **options: Any
) -> LowRankOptimizer:
    """Eager steps where bases are due, one graph for all others, rates that change in place.

    To the bit those of the same optimizer without a graph, and of one that counts on the host
    within rounding; where numbers are rounded at random, but for a share ``rounded`` of them.
    """
    mine, capturable, theirs, eager = pair(name, dtype, **options)
    same: list[Tensor] = [*runs.copies(mine)]
    twin = build(
        name, same, lr=copy.deepcopy(capturable.defaults["lr"]), capturable=True, **options
    )
    graph = None
    for step in range(GAP + 3):
        give(mine, theirs, step)
        give(same, theirs, step)
        if not options.get("relative_step"):
            lr = 0.01 / (1 + step)
            capturable.param_groups[0]["lr"].fill_(lr)
            twin.param_groups[0]["lr"].fill_(lr)
            eager.param_groups[0]["lr"] = lr
        if step % GAP == 0:
            capturable.step()
        else:
            if graph is None:
                with captured(capturable) as graph:
                    capturable.step()
            graph.replay()
        twin.step()
        eager.step()
        for n, (p, q, exactly) in enumerate(zip(mine, theirs, same, strict=True)):
            assert torch.equal(p, exactly), f"differs from the step without a graph: {n}"
            if rounded:
                assert_mostly_close(p, q, dtype, max_error_rate=rounded)
            else:
                assert_close(p, q, dtype)
    for p, q, exactly in zip(mine, theirs, same, strict=True):
        for key, x in capturable.state[p].items():
            assert torch.equal(x, twin.state[exactly][key]), key
        assert capturable.state[p]["step"] == eager.state[q]["step"] == GAP + 3
    return capturable


@pytest.mark.parametrize("name", names())
def test_replays_are_eager_steps(name: str) -> None:
    """In float64, every kind of parameter: no number of the host is part of the graph."""
    check_replays(name, torch.float64)


@pytest.mark.parametrize("name", names())
def test_a_rate_may_stay_a_number(name: str) -> None:
    """As torch has it: the graph keeps it, and nothing of a step need be on the device."""
    mine: list[Tensor] = [*runs.parameters(torch.float64).values()]
    theirs: list[Tensor] = [*runs.copies(mine)]
    capturable, eager = build(name, mine, capturable=True), build(name, theirs)
    for step in range(3):
        give(mine, theirs, step)
        capturable.step()
        eager.step()
        for p, q in zip(mine, theirs, strict=True):
            assert_close(p, q, torch.float64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GaLoreAdamW", {"on_refresh": "reset"}),
        ("GaLoreAdamW", {"on_refresh": "project", "projector": "rsvd", "maximize": True}),
        ("GaLoreAdamW", {"proj_type": "full"}),
        ("FiraAdamW", {"limiter": None, "alpha_mode": "paper"}),
        ("DCTAdamW", {"error_feedback": "float32"}),
        ("FrugalAdamW", {"projector": "dct", "on_refresh": "reset"}),
        ("GaLoreAdafactor", {"relative_step": True, "warmup_init": True, "beta1": 0.9}),
        ("GaLoreAdafactor", {"relative_step": True, "scale_parameter": False}),
        ("SSTAdamW", {"factors": "active"}),
        ("SSTAdamW", {"negative": "flip"}),
        ("SSTAdamW", {"offload_inactive": True, "state_dtype": "8bit"}),
    ],
    ids=[
        "reset", "project", "both sides", "no limiter", "error feedback", "ages", "relative",
        "relative alone", "active", "flip", "offload",
    ],
)  # fmt: skip
def test_options(name: str, options: dict[str, Any]) -> None:
    """What changes the way through a step."""
    check_replays(name, torch.float64, **options)


def test_a_free_rule_in_narrower_weights() -> None:
    """Corrections of the device are in float64, and kernels read factors in float32."""
    check_replays("FrugalAdamW", torch.float32, projector="svd", free_rule="sgd")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FiraAdamW", {}),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("DCTAdamW", {"error_feedback": "bfloat16"}),
                ("SSTAdamW", {}),
                ("GaLoreAdamW", {}),
                ("FrugalAdamW", {}),
                ("GaLoreAdafactor", {"beta1": 0.9}),
                ("GaLoreLion", {"on_refresh": "project"}),
            )
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rounding_at_random(name: str, options: dict[str, Any]) -> None:
    """Of weights and of moments: a replay draws what its step draws, from a seed on the device."""
    rounding = {"stochastic_rounding": True, "state_dtype": "bfloat16"}
    check_replays(name, torch.bfloat16, rounded=0.05, **options, **rounding)


@pytest.mark.parametrize(
    "name",
    ["GaLoreAdamW", *(pytest.param(x, marks=pytest.mark.slow) for x in ("DCTAdamW", "SSTAdamW"))],
)
def test_moments_in_4_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two codes a replay takes is drawn as its step draws it."""
    monkeypatch.setattr(quant, "MIN_SIZE", 1)
    optimizer = check_replays(name, torch.float32, rounded=0.05, state_dtype="4bit")
    states = optimizer.state.values()
    assert any(x.dtype == torch.uint8 for state in states for x in state.values())


def test_seeds_of_a_device_are_those_of_a_host() -> None:
    """All 63 bits, of counters and hashes of any size."""
    params = [torch.nn.Parameter(torch.zeros(6, 8)) for _ in range(3)]
    chosen = []
    for kind in (True, False):
        optimizer = build("GaLoreAdamW", params, capturable=kind, seed=2**40 + 1, rank=2)
        chosen.append(optimizer._strategies(optimizer.param_groups[0]))
    items = optimizer._items(optimizer.param_groups[0])
    for item, uid in zip(items, (0, 2**62 + 12345, 987654321), strict=True):
        item.uid = uid
    for step in (1.0, 17.0, 2.0**20):
        states = [{"step": torch.tensor(step)} for _ in items]
        on_device, here = (seeds_of(items, states, own, 1, 3) for own in chosen)
        assert [int(x) for x in on_device] == list(here)


def test_layers_of_factors() -> None:
    """Of SST: what a graph holds of its warm-up is where the counters of the layer are."""

    def made(capturable: bool) -> tuple[list[Tensor], LowRankOptimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(2))).double()
        groups = convert(net, "sst", rank=2)
        lr = rate(0.01) if capturable else 0.01
        steps = {"steps_per_iteration": GAP, "warmup_steps": 6, "stagger": False}
        return [*net.parameters()], SSTAdamW(groups, lr=lr, capturable=capturable, **steps)

    (mine, capturable), (theirs, eager) = made(True), made(False)
    group = capturable.param_groups[0]
    item, chosen = capturable._items(group)[0], capturable._strategies(group)
    state = init_state(item, chosen, torch.empty(8, 8, device="meta"))
    assert {state[key].device.type for key in RECORDED} == {"meta"}
    graph = None
    for step in range(2 * GAP + 2):
        give(mine, theirs, step)
        if step and step % GAP != GAP - 1:  # layers draw others after the step
            if graph is None:
                with captured(capturable) as graph:
                    capturable.step()
            graph.replay()
        else:
            capturable.step()
        eager.step()
        for p, q in zip(mine, theirs, strict=True):
            assert_close(p, q)


def test_large_moments_in_8_bits() -> None:
    """Codes: of matrices with so many coordinates that they are kept in 8 bits."""
    w = torch.nn.Parameter(torch.randn(32, 600, generator=torch.Generator().manual_seed(0)))
    v = torch.nn.Parameter(w.detach().clone())
    one = GaLoreAdamW([w], lr=rate(0.01), rank=16, state_dtype="8bit", capturable=True)
    other = GaLoreAdamW([v], lr=0.01, rank=16, state_dtype="8bit")
    graph = None
    for step in range(4):
        give([w], [v], step)
        if step == 1:
            with captured(one) as graph:
                one.step()
        one.step() if graph is None else graph.replay()
        other.step()
    assert one.state[w]["low.exp_avg"].dtype == torch.uint8
    assert_close(w, v)
    different = one.state[w]["low.exp_avg"] != other.state[v]["low.exp_avg"]
    assert different.double().mean() < 1e-3  # float32: next to an edge, a code may be another


@pytest.mark.parametrize("what", ["correction", "rate", "step"])
def test_a_number_of_the_host_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baked in on purpose, each makes the replays other steps, or is a look."""
    if what == "correction":
        honest = AdamW.directions_

        def baked(self: AdamW, grads: Any, slots: Any, steps: Any, *rest: Any) -> Any:
            steps = [2.0] * len(grads) if devices.recording() else steps
            return honest(self, grads, slots, steps, *rest)

        monkeypatch.setattr(AdamW, "directions_", baked)
    elif what == "rate":
        honest_prepared = engine_step.prepared

        def constant(work: Any, chosen: Any, lr: Any, *rest: Any) -> Any:
            return honest_prepared(work, chosen, 0.005 if devices.recording() else lr, *rest)

        monkeypatch.setattr(engine_step, "prepared", constant)
    else:
        path = "lowrank_optim.engine.adapt._times_on_device"
        monkeypatch.setattr(path, lambda work, _: [float(w.state["step"]) for w in work])
    with pytest.raises(AssertionError, match=r"differ|a value is read"):
        check_replays("GaLoreAdamW", torch.float64)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    """In a replay too: weights and moments stay, dense ones as well; the step is counted."""
    mine, capturable, theirs, _ = pair("FiraAdamW", torch.float32)
    give(mine, theirs, 0)
    capturable.step()
    with captured(capturable) as graph:
        capturable.step()
    weights = [p.detach().clone() for p in mine]
    before = runs.entries(capturable)
    for p in mine:
        assert p.grad is not None
        p.grad.reshape(-1)[0] = float("nan")
    graph.replay()
    for n, (p, w) in enumerate(zip(mine, weights, strict=True)):
        batch = p.dim() == 3  # experts have one norm together
        assert torch.equal(p, w), (n, batch)
        for key, x in capturable.state[p].items():
            if key == "step":
                assert x == before[n][key] + 1
            else:
                assert torch.equal(x, before[n][key]), key


def test_resumed_between_replays() -> None:
    """What replays have counted is saved; either kind of optimizer goes on with it."""
    mine, capturable, theirs, eager = pair("GaLoreAdamW", torch.float64)
    give(mine, theirs, 0)
    capturable.step()
    with captured(capturable) as graph:
        capturable.step()
    eager.step()
    for step in (1, 2):
        give(mine, theirs, step)
        graph.replay()
        eager.step()
    saved = copy.deepcopy(capturable.state_dict())
    for kind in (True, False):
        fresh = [*runs.copies(mine)]
        loaded = build("GaLoreAdamW", fresh, lr=rate(0.01) if kind else 0.01, capturable=kind)
        loaded.load_state_dict(saved)
        assert loaded.param_groups[0]["capturable"] is kind
        truth = [*runs.copies(theirs)]
        again = build("GaLoreAdamW", truth, lr=0.01)
        again.load_state_dict(copy.deepcopy(eager.state_dict()))
        for step in range(3, 3 + GAP):
            give(fresh, truth, step)
            loaded.step()
            again.step()
        for p, q in zip(fresh, truth, strict=True):
            assert_close(p, q)


def test_counters_follow_their_group() -> None:
    """Set after steps have been taken, as code for torch does to load old checkpoints."""
    mine, capturable, *_ = pair("GaLoreAdamW", torch.float32)
    give(mine, mine, 0)
    capturable.step()
    capturable.param_groups[0]["capturable"] = False
    capturable.step()
    assert capturable.state[mine[0]]["step"] == 2


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("SwitchLoRAAdamW", {}, "switch vectors"),
        ("SSTAdamW", {"offload_inactive": True, "negative": "flip"}, "around on the host"),
        ("FrugalAdamW", {"projector": "block"}, "'columns'"),
        ("GaLoreSGD", {"momentum": 0.9, "dampening": 0.5}, "dampened"),
    ],
)
def test_refused(name: str, options: dict[str, Any], why: str) -> None:
    """What follows the host's count says so when it is made, and when a group is edited."""
    params = [torch.nn.Parameter(torch.zeros(6, 8))]
    with pytest.raises(ValueError, match=f"{name}: capturable=True is not possible.*{why}"):
        cases.build(name, params, capturable=True, **options)
    later = cases.build(name, params, **options)
    later.param_groups[0]["capturable"] = True
    params[0].grad = torch.ones(6, 8)
    with pytest.raises(ValueError, match=f"capturable=True is not possible.*{why}"):
        later.step()


def test_hooks_are_not_captured() -> None:
    _, capturable, *_ = pair("GaLoreAdamW", torch.float32)
    with pytest.raises(ValueError, match="does not go with capturable=True"):
        attach_in_backward(capturable)


def test_what_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's words where torch has them; nothing is recorded before."""
    mine, capturable, theirs, eager = pair("GaLoreAdamW", torch.float32)
    give(mine, theirs, 0)
    monkeypatch.setattr(devices, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="param_groups' capturable is False"):
        eager.step()
    with pytest.raises(RuntimeError, match="take a step"):
        capturable.step()
    monkeypatch.setattr(devices, "_capturing", lambda: False)
    capturable.step()
    monkeypatch.setattr(devices, "_capturing", lambda: True)
    capturable.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="every replay of this graph will use 0.1"):
        capturable.step()
    monkeypatch.setattr(devices, "_capturing", lambda: False)
    monkeypatch.setattr(devices, "HOSTS", frozenset({"cpu"}))
    groups = [{"lr": rate(0.1), "capturable": True}]
    with pytest.raises(RuntimeError, match="a graph would read once"):
        check_recorded(groups, True, "GaLoreAdamW")
    with pytest.raises(AssertionError, match="must be on supported devices"):
        capturable.step()
    torchs = torch.optim.AdamW(mine, capturable=True)
    with pytest.raises(AssertionError, match="must be on supported devices"):
        torchs.step()


def test_no_basis_is_found_in_a_replay() -> None:
    """What is captured is a plain step: no basis changes in a replay, whatever is due."""
    mine, capturable, theirs, _ = pair("GaLoreAdamW", torch.float32)
    give(mine, theirs, 0)
    capturable.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with captured(capturable) as graph:
            capturable.step()
    bases = [capturable.state[p]["basis"].clone() for p in mine if "basis" in capturable.state[p]]
    for step in range(1, GAP + 2):
        give(mine, theirs, step)
        graph.replay()
    now = [capturable.state[p]["basis"] for p in mine if "basis" in capturable.state[p]]
    assert len(bases) == 3 and all(map(torch.equal, bases, now))
    capturable.step()  # overdue: counted by the replays
    assert not any(map(torch.equal, bases, now))
