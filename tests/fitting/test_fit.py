"""Plans against what real optimizers hold, brute force over budgets, and gradients by SVD."""

from __future__ import annotations

import math
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.common import llama
from lowrank_optim import DCTAdamW, FiraAdamW, GaLoreAdamW, fit, lowrank_groups
from lowrank_optim.cli.models import load
from lowrank_optim.fitting import Plan
from lowrank_optim.fitting.costs import gib
from lowrank_optim.fitting.spectra import spectra
from lowrank_optim.memory import GIB, estimate, report
from lowrank_optim.memory.models import MODELS
from lowrank_optim.memory.shapes import on_meta
from lowrank_optim.stores import STORES
from lowrank_optim.tensors.matrix import matrix_view
from tests.cases import several_gpus

CONFIG = llama(64, 96, 1, 4, 2, vocab_size=128, context=64)
TINY = ["GaLoreAdamW"]
"""Of one method, whose order of what is given up is short."""


pytestmark = pytest.mark.usefixtures("held_or_stepped")


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(128, (count, 2, 16), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def peak(model, share, **own) -> float:
    """GiB of a share of every side."""
    groups = own.pop("groups", lambda m: lowrank_groups(m, rank=share))
    return estimate(model, own.pop("optimizer", GaLoreAdamW), groups=groups, **own).peak / GIB


def some(model) -> float:
    """GiB for GaLore with float32 moments at some rank between the least and a half."""
    return peak(model, 24)


def trained(plan, model, steps=5):
    optimizer = plan.optimizer(model, lr=1e-3)
    plan.attach(optimizer)
    for _ in range(steps):
        for batch in batches(plan.accumulation_steps):
            (model(**batch).loss / plan.accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


WAYS = {
    "plain": ({"state_dtypes": ["float32"], "in_backward": [None]}, {}),
    "project": ({"in_backward": ["project"], "accumulation_steps": 2}, {}),
    "step": ({"in_backward": ["step"], "state_dtypes": ["8bit"]}, {}),
    "bfloat16": ({"state_dtypes": ["bfloat16"]}, {}),
    "dct": ({"optimizers": [(DCTAdamW, {"transform": "matmul"})]}, {}),
    "fira": ({"optimizers": [(FiraAdamW, {"projector": "svd"})]}, {}),
    "frugal": ({"optimizers": ["FrugalAdamW"]}, {}),
    "calibrated": ({"calibrate": batches, "state_dtypes": ["float32"]}, {}),
}


@pytest.mark.parametrize("name", WAYS)
def test_state_is_the_estimate_to_the_byte(name, model):
    """Plan, construct, attach, train: what is held is what was planned, within the budget."""
    own, _ = WAYS[name]
    own = {**own}
    if "calibrate" in own:
        own["calibrate"] = batches()
    own.setdefault("optimizers", TINY)
    budget = some(model)
    plan = fit(model, budget, **own)
    assert plan.estimate.peak <= budget * GIB and plan.estimate.fits(budget * GIB)
    assert all(rank % 8 == 0 for rank in plan.ranks.values())
    optimizer = trained(plan, model)
    assert report(optimizer).total == plan.estimate.state
    found = {
        name: group["rank"]
        for group in optimizer.param_groups
        if group["rank"] is not None
        for name in group["param_names"]
    }
    assert found == dict(plan.ranks)


def test_ranks_are_the_largest_that_fit(model):
    """One more multiple of one share does not fit; and the plan's estimate is memory's own."""
    most = 0
    for n in range(6):
        budget = peak(model, 32) * (0.8 + n / 24)
        plan = fit(model, budget, optimizers=TINY, in_backward=[None], state_dtypes=["float32"])
        (rank,) = {r for name, r in plan.ranks.items() if "q_proj" in name}
        more = peak(model, rank + 8, groups=lambda m, r=rank: shares(m, (r + 8) / 64))
        assert rank == 32 or more > budget
        assert rank >= most
        most = rank
    assert most == 32


def shares(model, share):
    """Groups of a share of each smaller side, in multiples of 8, at least 8."""
    ranks = {
        name: {"rank": max(8, int(share * min(p.shape)) // 8 * 8)}
        for name, p in model.named_parameters()
        if "layers" in name and p.dim() == 2
    }
    return lowrank_groups(model, overrides={name: keys for name, keys in ranks.items()})


def test_order_of_what_is_given_up(model):
    """As the documentation has it: a quarter decides, then the first of the order."""
    quarter = lambda **own: peak(model, 0.25, groups=lambda m: shares(m, 0.25), **own)  # noqa: E731
    choices = [
        (mode, store)
        for modes in ((None, "project"), ("step",))
        for store in ("float32", "bfloat16", "8bit", "4bit")
        for mode in modes
    ]
    costs = {c: quarter(in_backward=c[0], state_dtype=c[1]) for c in choices}
    for budget in sorted({*costs.values()}):
        plan = fit(model, budget, optimizers=TINY)
        expected = next(c for c in choices if costs[c] <= budget)
        assert (plan.in_backward, plan.arguments["state_dtype"]) == expected
        assert min(plan.ranks["model.layers.0.self_attn.q_proj.weight"], 16) == 16
        told = " ".join(plan.gave_up)
        assert ("Moments in float32" in told) == (expected[1] != "float32")
        assert ("Whole gradients" in told) == (expected[0] == "project")
        assert ("clipping by the global norm" in told) == (expected[0] == "step")
        if expected[1] != "float32":
            needed = gib(costs[expected[0], "float32"] * GIB)
            assert f"take {needed} GiB" in told


def stack() -> nn.Module:
    """Alike layers: with ``mode="step"`` buffers have the moments of one, states those of all."""
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))


HOSTED = {"device": "cuda", "optimizers": TINY, "in_backward": ["step"]}


def test_moments_leave_for_the_host_where_nothing_else_has_room():
    """After all else was given up, in the same order; and the plan says what it costs."""
    model = stack()
    quarter = lambda **own: peak(model, 0.25, in_backward="step", device="cuda", **own)  # noqa: E731
    stores = ["float32", "8bit"]
    costs = {
        (place, store): quarter(state_device=place, state_dtype=store)
        for place in (None, "cpu")
        for store in stores
    }
    assert min(costs["cpu", s] for s in stores) < min(costs[None, s] for s in stores)
    for budget in sorted({*costs.values()}):
        plan = fit(model, budget, state_dtypes=stores, **HOSTED)
        expected = next(c for c in costs if costs[c] <= budget)
        assert (plan.arguments.get("state_device"), plan.arguments["state_dtype"]) == expected
        told = " ".join(plan.gave_up)
        hosted = expected[0] == "cpu"
        assert ("cross the bus twice in every step" in told) == hosted
        assert ("GiB of the host" in str(plan)) == hosted
        assert (plan.estimate.host > 0) == hosted
    assert hosted is False and plan == Plan.from_json(plan.to_json(), model)
    here = fit(model, min(costs.values()), state_devices=[None], state_dtypes=stores, **HOSTED)
    assert here.estimate.host == 0 and max(here.ranks.values()) < 16


def test_what_moments_take_of_the_host_is_what_torch_pins():
    """Each tensor a power of two; ranks end where the host does, and a bit less is refused."""
    model = stack()
    own = {**HOSTED, "state_dtypes": ["float32"], "state_devices": ["cpu"]}
    plan = fit(model, 1.0, **own)
    optimizer = trained_alone(plan, model)
    moments = [
        x.nbytes
        for state in optimizer.state.values()
        for key, x in state.items()
        if key.startswith("low.exp_avg")
    ]
    assert plan.estimate.host == sum(moments)
    assert plan.estimate.pinned == sum(2 ** math.ceil(math.log2(x)) for x in moments)
    assert set(plan.ranks.values()) == {32}
    limit = plan.estimate.pinned / GIB
    assert fit(model, 1.0, host_gib=limit, **own).ranks == plan.ranks
    less = fit(model, 1.0, host_gib=limit * 0.99, **own)
    assert set(less.ranks.values()) == {16} and less.estimate.pinned <= limit * 0.99 * GIB
    with pytest.raises(ValueError, match="host_gib=1e-06 has no room for moments: the least") as e:
        fit(model, 1.0, host_gib=1e-6, **own)
    least = float(re.search(r"the least is ([\d.e-]+) GiB", str(e.value))[1])
    assert set(fit(model, 1.0, host_gib=least, **own).ranks.values()) == {8}


def test_a_limit_of_the_host_refuses_what_only_it_would_meet():
    """And the message has the limit that would do."""
    model = stack()
    own = {**HOSTED, "state_dtypes": ["float32"]}
    with pytest.raises(ValueError, match="nothing fits") as error:
        fit(model, 1e-5, state_devices=[None], **own)
    assert "state_devices=[None, 'cpu']" in str(error.value)
    budget = float(re.search(r"the least is ([\d.]+) GiB", str(error.value))[1]) * 0.99
    plan = fit(model, budget, **own)
    assert plan.arguments["state_device"] == "cpu"
    with pytest.raises(ValueError, match=r"nothing fits.* a host_gib of") as error:
        fit(model, budget, host_gib=1e-6, **own)
    needed = float(re.search(r"a host_gib of ([\d.e-]+),", str(error.value))[1])
    assert fit(model, budget, host_gib=needed, **own).estimate.pinned <= needed * GIB


def trained_alone(plan, model):
    optimizer = plan.optimizer(model, lr=1e-3)
    plan.attach(optimizer)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_where_no_way_has_room_for_a_quarter_the_largest_share_is_taken(model):
    """Below the least of all quarters."""
    least = min(
        peak(model, 0.25, groups=lambda m: shares(m, 0.25), in_backward="step", state_dtype=s)
        for s in STORES
    )
    plan = fit(model, least * 0.9999, optimizers=TINY, in_backward=["step"])
    found = []
    for store in STORES:
        fixed = {"optimizers": TINY, "in_backward": ["step"], "state_dtypes": [store]}
        try:
            found.append(sum(fit(model, least * 0.9999, **fixed).ranks.values()))
        except ValueError:
            # one is cast, the other decoded by plain torch, so that either may need more
            assert store in ("float32", "bfloat16", "4bit")
    assert found and sum(plan.ranks.values()) == max(found)
    assert any("quarter of the smaller sides" in text for text in plan.gave_up)


@pytest.mark.parametrize(
    "own", [{}, {"tokens": 16, "in_backward": ["project"], "optimizers": TINY}], ids=["", "tokens"]
)
def test_nothing_fits_and_the_smallest_budget_that_would(own, model):
    """A budget of the value in the message fits, and one 1 % smaller does not."""
    with pytest.raises(ValueError, match="nothing fits") as error:
        fit(model, 1e-5, **own)
    least = float(re.search(r"the least is ([\d.]+) GiB", str(error.value))[1])
    plan = fit(model, least, **own)
    assert plan.estimate.peak <= least * GIB
    with pytest.raises(ValueError, match="nothing fits"):
        fit(model, least * 0.99, **own)


def test_activations_are_those_of_the_plan(model):
    """Of coordinates too: the plan's estimate is memory's own, and one more share does not fit."""
    own = {"tokens": (2, 32), "in_backward": "project", "accumulation_steps": 2}
    low, high = (peak(model, r, **own) for r in (8, 32))
    budget = low + 0.7 * (high - low)
    plan = fit(
        model, budget, optimizers=TINY, state_dtypes=["float32"], tokens=own["tokens"],
        in_backward=["project"], accumulation_steps=2,
    )  # fmt: skip
    again = estimate(model, GaLoreAdamW, groups=plan.groups, **own)
    assert again == plan.estimate and again.activations > 0 and again.fits(budget * GIB)
    rank = plan.ranks["model.layers.0.self_attn.q_proj.weight"]
    assert 8 < rank < 32
    next_ = min((rank + 8) / 64, (plan.ranks["model.layers.0.self_attn.k_proj.weight"] + 8) / 32)
    assert peak(model, 0, groups=lambda m: shares(m, next_), **own) > budget


def test_more_memory_is_never_less(model):
    """In one way to train: no rank and no energy falls. Over all: below a quarter, and in order."""
    fixed = {"optimizers": TINY, "in_backward": ["project"], "state_dtypes": ["float32"]}
    floor = peak(model, 8, groups=lambda m: lowrank_groups(m, rank=8), in_backward="project")
    for calibrate in (None, batches()):
        before = None
        for n in range(5):
            plan = fit(model, floor * (1 + n / 25), calibrate=calibrate, **fixed)
            if before is not None:
                assert all(plan.ranks[k] >= r for k, r in before.ranks.items())
                assert calibrate is None or plan.energy >= before.energy
            before = plan
    order, last = [None, "project", "step"], (0, 99)
    low = peak(model, 8, in_backward="step") * 0.99
    for n in range(7):
        try:
            plan = fit(model, low * (1 + n / 6), optimizers=TINY, state_dtypes=["float32"])
        except ValueError:
            assert last == (0, 99)
            continue
        sides = {n: min(p.shape) for n, p in model.named_parameters() if n in plan.ranks}
        share = min(rank / sides[n] for n, rank in plan.ranks.items())
        now = min(share, 0.25), order.index(plan.in_backward)
        assert now[0] >= last[0] and (last[0] < 0.25 or now[1] <= last[1])
        last = now


def test_calibration_captures_more_at_no_more_bytes(model):
    """Than one share for all, at its bytes, but for less than the step that did not fit."""
    own = {"optimizers": TINY, "in_backward": [None], "state_dtypes": ["float32"]}
    even = fit(model, some(model), **own)
    budget = even.estimate.peak / GIB
    views = {n: matrix_view(dict(model.named_parameters())[n].shape) for n in even.ranks}
    found = spectra(model, views, batches())
    for energy in ("relative", "absolute"):
        plan = fit(model, budget, calibrate=batches(), energy=energy, **own)
        weights = {n: sum(e) if energy == "relative" else 1.0 for n, e in found.items()}

        def take(ranks, weights=weights):
            return sum(sum(found[n][:r]) / weights[n] for n, r in ranks.items())

        total = sum(sum(e) / weights[n] for n, e in found.items())
        step = max(sum(e[8:16]) / weights[n] for n, e in found.items())
        assert plan.estimate.peak <= even.estimate.peak
        assert take(plan.ranks) > take(even.ranks) - step
        assert plan.energy == pytest.approx(take(plan.ranks) / total)
        assert len({*plan.ranks.values()}) > 1
    assert fit(model, budget, calibrate=batches(), **own) == plan  # absolute is the default


def test_spectra_are_squared_singular_values_added_over_micro_batches(model):
    """Against svdvals of each gradient; gradients that were there are put back, modes too."""
    names = [n for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    params = dict(model.named_parameters())
    expected = {n: torch.zeros(min(params[n].shape)).double() for n in names}
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for n in names:
            expected[n] += torch.linalg.svdvals(params[n].grad.double()) ** 2
    kept = params[names[0]].grad
    model.eval()
    found = spectra(model, {n: matrix_view(params[n].shape) for n in names}, batches())
    assert params[names[0]].grad is kept and not model.training
    for n in names:
        torch.testing.assert_close(
            torch.tensor(found[n]).double(), expected[n], rtol=1e-4, atol=1e-6 * expected[n].max()
        )


def test_forms_of_calibrate(model):
    """A function that yields losses, one that returns a loss, micro-batches: the same plan."""
    own = {"optimizers": TINY, "in_backward": [None], "state_dtypes": ["float32"]}
    plans = [
        fit(model, some(model), calibrate=given, **own)
        for given in (
            batches(1),
            lambda m: (m(**b).loss for b in batches(1)),
            lambda m: m(**batches(1)[0]).loss,
            (m for m in [model(**batches(1)[0]).loss]),
        )
    ]
    assert all(plan == plans[0] for plan in plans)


def test_what_gets_no_rank_is_listed(model):
    """Embedding and head are dense, a small matrix too; what is frozen is named."""
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    model.small = nn.Linear(8, 64)
    plan = fit(model, 1.0)
    assert plan.dense == {
        "model.embed_tokens.weight": 128 * 64 * 4,
        "lm_head.weight": 128 * 64 * 4,
        "small.weight": 8 * 64 * 4,
    }
    assert plan.frozen == {"model.layers.0.mlp.up_proj.weight": 96 * 64 * 4}
    assert "model.layers.0.mlp.up_proj.weight" not in plan.ranks
    for name in (*plan.dense, *plan.frozen):
        assert name in str(plan)


@pytest.mark.parametrize(
    "name",
    ["ViT-B/16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("Qwen3-0.6B", "GPT-2"))],
)
def test_configurations_without_transformers_get_the_same_ranks(name):
    """Modules that hold shapes alone stand for those of transformers."""
    config = MODELS[name].config
    shapes, real = on_meta(config, torch.bfloat16), load(name, torch.bfloat16, runs=True)
    found = [fit(m, 40.0, optimizers=TINY) for m in (shapes, real)]
    assert found[0] == found[1]


def test_a_configuration_is_its_model(model):
    own = {"dtype": torch.float32, "device": "cpu"}
    assert fit(CONFIG, some(model), **own) == fit(model, some(model))


def test_the_loss_is_that_of_every_estimate_with_tokens(monkeypatch):
    """And makes room: with all logits the least is more than this budget."""
    asked = []

    def spy(*args, **given):
        asked.append(given)
        return estimate(*args, **given)

    monkeypatch.setattr("lowrank_optim.fitting.costs.estimate", spy)
    config = llama(16, 16, 1, 2, 2, vocab_size=4096, context=64)
    own = {"tokens": 64, "optimizers": TINY, "state_dtypes": ["8bit"], "in_backward": ["step"]}
    found = fit(config, 0.0025, loss="fused", **own)
    losses = {given.get("loss") for given in asked if given.get("tokens")}
    assert losses == {"fused"} and found.estimate.fits(0.0025 * GIB)
    with pytest.raises(ValueError, match="nothing fits"):
        fit(config, 0.0025, **own)


@several_gpus
def test_of_two_gpus_each_has_the_budget():
    """The largest ranks of which one of them has room, where one alone has room for none."""
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))  # each gathered by itself
    model = nn.Sequential(OrderedDict(layers=layers))
    own = {"optimizers": TINY, "state_dtypes": ["float32"], "in_backward": [None]}
    own |= {"state_devices": [None], "device": "cuda"}
    own |= {"transients": False}
    some = {"device": "cuda", "world_size": 2, "transients": False}
    budget = peak(model, 24, **some) + 1e-9
    found = fit(model, budget, world_size=2, **own)
    with pytest.raises(ValueError, match="nothing fits"):
        fit(model, budget, **own)
    assert found.estimate.world_size == found.world_size == 2 and set(found.ranks.values()) == {24}
    assert f"of {budget:.6g} GiB without activations, each of 2 GPUs" in str(found)
    assert found.estimate.peak / GIB == peak(model, None, groups=found.groups, **some) <= budget
    assert Plan.from_json(found.to_json(), model) == found


@several_gpus
@pytest.mark.slow
def test_4_bits_are_for_several_gpus():
    """The last of the formats: where a quarter of no other fits."""
    model = nn.Sequential(nn.Linear(256, 384), nn.Linear(384, 256))
    own = {"world_size": 2, "transients": False, "device": "cuda"}
    costs = {
        store: peak(
            model, None, groups=lambda m: lowrank_groups(m, rank=64), state_dtype=store, **own
        )
        for store in ("8bit", "4bit")
    }
    assert costs["4bit"] < costs["8bit"]
    own |= {"optimizers": TINY, "in_backward": [None], "state_devices": [None]}
    found = fit(model, costs["4bit"] + 1e-9, **own)
    assert found.arguments["state_dtype"] == "4bit"
    assert found.estimate.peak / GIB <= costs["4bit"] + 1e-9
    with pytest.raises(ValueError, match="nothing fits"):  # after every format was tried
        fit(model, 1e-6, **own)


REFUSED = [
    (ValueError, "world_size must be a number of ranks", {"world_size": 0}),
    (ValueError, "has no effect without world_size", {"shard": print}),
    (TypeError, "must be an nn.Module", {"model": 3}),
    (ValueError, "budget_gib must be a positive number", {"budget_gib": float("nan")}),
    (ValueError, "budget_gib must be a positive number", {"budget_gib": -1}),
    (ValueError, "checkpointing has no effect", {"checkpointing": True}),
    (ValueError, "loss='fused' has no effect", {"loss": "fused"}),
    (ValueError, "loss must be one of .*'liger'", {"loss": "liger", "tokens": 8}),
    (ValueError, "energy='absolute' has no effect", {"energy": "absolute"}),
    (ValueError, "energy must be", {"energy": "most", "calibrate": batches()}),
    (ValueError, "dtype has no effect", {"dtype": torch.bfloat16}),
    (ValueError, "rank=4: fit finds ranks", {"rank": 4}),
    (ValueError, "state_dtype='8bit': give the formats", {"state_dtype": "8bit"}),
    (ValueError, "state_dtypes must be a list", {"state_dtypes": "8bit"}),
    (ValueError, "state_dtypes must be a list .*'3bit'", {"state_dtypes": ["3bit"]}),
    (ValueError, "in_backward must be a list", {"in_backward": ["both"]}),
    (ValueError, "host_gib must be None or a positive number", {"host_gib": 0}),
    (ValueError, "host_gib=1 has no effect", {"host_gib": 1}),  # the device is a CPU
    (ValueError, "host_gib=1 has no effect",
     {"host_gib": 1, "state_devices": [None], "device": "cuda"}),
    (ValueError, "state_devices must be a list", {"state_devices": "cpu", "device": "cuda"}),
    (ValueError, "which has no effect where the device is a CPU", {"state_devices": ["cpu"]}),
    (ValueError, "device must be None or one of", {"device": "gpu"}),
    (ValueError, "both say where", {"state_devices": [None], "state_device": "cpu"}),
    (ValueError, "twice", {"state_dtypes": ["8bit", "8bit"]}),
    (ValueError, "frees no gradient", {"in_backward": ["step"], "accumulation_steps": 2}),
    (ValueError, "no way to train", {"in_backward": ["project"], "optimizers": ["FiraAdamW"]}),
    (ValueError, "coords_dtype=.* has no", {"coords_dtype": "float32", "in_backward": [None]}),
    (ValueError, "least must be a multiple", {"least": 12}),
    (ValueError, "multiple must be a positive int", {"multiple": 0}),
    (ValueError, "no matrix has room", {"least": 64}),
    (ValueError, "optimizers must be in", {"optimizers": ["AdamW"]}),
    (TypeError, "classes of lowrank_optim", {"optimizers": [torch.optim.AdamW]}),
    (ValueError, "and for all", {"optimizers": [("GaLoreAdamW", {"scale": 1.0})], "scale": 1.0}),
    (TypeError, "unexpected keyword", {"scael": 1.0}),
    (ValueError, "matches no", {"target_modules": "nowhere"}),
    (TypeError, "calibrate must yield", {"calibrate": [3]}),
    (TypeError, "calibrate must be a function of the model", {"calibrate": lambda: []}),
    (TypeError, "calibrate must be a function of the model", {"calibrate": 3}),
    (ValueError, "gave no micro-batch", {"calibrate": []}),
    (ValueError, "not its configuration", {"model": CONFIG, "calibrate": batches()}),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c[1][:24]}-{next(iter(c[2]))}")
def test_what_is_refused(case, model):
    error, text, own = case
    own = {"model": model, "budget_gib": 1.0, **own}
    with pytest.raises(error, match=text):
        fit(own.pop("model"), own.pop("budget_gib"), **own)


def test_calibrate_refuses_what_says_nothing(model):
    """No values, or gradients that are not finite; hooks and gradients are as before."""
    bad = batches(1)[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"gradient of .* is not finite"):
        fit(model, 1.0, calibrate=lambda m: m(**bad).loss * float("nan"))
    assert weight.grad is None and not weight._post_accumulate_grad_hooks
    with pytest.raises(ValueError, match="on the meta device"):
        fit(AutoModelForCausalLM.from_config(CONFIG).to("meta"), 1.0, calibrate=batches())


def test_a_matrix_without_a_gradient_keeps_the_least_rank_and_is_named(model):
    model.idle = nn.Linear(64, 64, bias=False)
    plan = fit(model, peak(model, 24), optimizers=TINY, calibrate=batches())
    assert plan.ranks["idle.weight"] == 8
    assert any("idle.weight" in text for text in plan.gave_up)
