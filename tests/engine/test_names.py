"""What is drawn for a parameter, and when, is of its name: not of its place, nor of the others."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, SwitchLoRAAdamW, methods
from lowrank_optim.engine.schedule import refresh_due, stagger_offset
from lowrank_optim.groups.names import NAMED, _hash, bare, uid_of
from lowrank_optim.nn import convert
from tests import cases, runs

STEPS = 5
SHAPES = {
    "embed.weight": (9, 6),
    "layers.0.up.weight": (6, 11),
    "layers.0.down.weight": (11, 6),
    "layers.0.norm.weight": (6,),
    "layers.1.up.weight": (6, 11),
    "layers.1.experts": (2, 6, 8),
    "head.weight": (9, 6),
}
DRAWING: dict[str, dict[str, Any]] = {
    "SSTAdamW": {"steps_per_iteration": 3, "warmup_steps": 1, "sampling": "mixed"},
    "SSTAdamW8bit": {"steps_per_iteration": 3, "warmup_steps": 1, "factors": "active"},
    "SwitchLoRAAdamW": {"interval": 4, "freeze_steps": 1, "order": "random"},
    "SwitchLoRAAdamW8bit": {"interval": 4, "freeze_steps": 1, "order": "random"},
}
"""Methods without a projector."""
CASES = [(name, p, {}) for name, p in cases.pairs()] + [(k, None, v) for k, v in DRAWING.items()]
WHO_DRAWS = ("GaLoreAdamW", *DRAWING)
"""Every projector is here, and what has none; other classes draw by these, and round alike."""
ALL = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case[0] in WHO_DRAWS else pytest.mark.slow) for case in CASES],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
OWN_ORDER = [(name, p, o) for name, p, o in CASES if p == "block"]
NAMES = list(SHAPES)


def trained(
    case: tuple[str, str | None, dict[str, Any]],
    groups: Sequence[Sequence[str]],
    spelled: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Weights after some steps on groups of these names, all of whose roundings are drawn."""
    name, projector, options = case
    params = {n: cases.parameter(SHAPES[n], torch.bfloat16, NAMES.index(n)) for n in NAMES}
    grads = {
        n: cases.gradients(SHAPES[n], STEPS, torch.bfloat16, NAMES.index(n) + 20) for n in NAMES
    }
    optimizer = cases.build(
        name,
        [{"params": [(spelled(n), params[n]) for n in own], "rank": 3} for own in groups],
        projector=projector or "svd",
        stagger=True,
        stochastic_rounding=True,
        **options,
    )
    used = [n for own in groups for n in own]
    cases.run(
        optimizer, [params[n] for n in used], [[grads[n][t] for n in used] for t in range(STEPS)]
    )
    return {n: params[n].detach() for n in used}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for n, x in actual.items():
        assert torch.equal(x, expected[n]), n


@pytest.mark.filterwarnings("ignore:.*does not use")
@pytest.mark.filterwarnings("ignore:.*is clamped")
@ALL
def test_order_groups_and_wrappers_change_no_bit(
    case: tuple[str, str | None, dict[str, Any]],
) -> None:
    """Nor does it matter who else is there: half of a model trains as in the whole of it.

    Blocks take turns within their group, so they may be put in another order, but not apart.
    """
    whole = trained(case, [NAMES])
    assert_same(trained(case, [NAMES[::-1]], lambda n: f"module._orig_mod.{n}"), whole)
    if case not in OWN_ORDER:
        assert_same(trained(case, [NAMES[4:], NAMES[1:4]]), whole)


def stage(names: Sequence[str]) -> nn.Sequential:
    """Layers of one network, which are the same whatever others there are."""
    layers = []
    for n in names:
        torch.manual_seed(int(n))
        layers.append((n, nn.Linear(6 + int(n), 9)))
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_a_stage_of_factors_trains_as_in_the_whole(method: str) -> None:
    """Layers of factors draw by the names of the weights that they stand for."""
    ends = []
    for names in (["0", "1", "2", "3"], ["2", "3"]):
        net = stage(names)
        own = {k: v for k, v in DRAWING.items() if k.lower().startswith(method)}
        name, options = next(iter(own.items()))
        optimizer = getattr(methods, name)(convert(net, method, rank=3), lr=0.05, **options)
        for step in range(STEPS):
            for k, p in net.named_parameters():
                seed = 100 * step + int(k[0]) * 10 + len(k)
                p.grad = cases.gradients(p.shape, 1, p.dtype, seed)[0] if p.requires_grad else None
            optimizer.step()
        ends.append({k: p.detach() for k, p in net.named_parameters()})
    assert_same(ends[1], ends[0])


def test_without_names_draws_are_of_the_place() -> None:
    """As they were; a module's factors count as the one weight that they stand for."""
    params = [cases.parameter((6, 9)) for _ in range(3)]
    optimizer = GaLoreAdamW([{"params": params[:1]}, {"params": params[1:]}], rank=2)
    items = [item for group in optimizer.param_groups for item in optimizer._items(group)]
    assert [(item.index, item.uid) for item in items] == [(0, 0), (1, 1), (2, 2)]

    groups = convert(stage(["0", "1", "2"]), "switchlora", rank=3)
    named = SwitchLoRAAdamW(groups)
    bare_groups = [{k: v for k, v in g.items() if k != "param_names"} for g in groups]
    for optimizer, expected in (
        (named, [uid_of(f"{n}.weight") for n in range(3)]),
        (SwitchLoRAAdamW(bare_groups), [0, 1, 2]),
    ):
        items = optimizer._items(optimizer.param_groups[0])
        assert [item.uid for item in items if item.subspace is not None] == expected
        assert [item.index for item in items] == [*range(9)]


# ------------------------------------------------------------------ the number of a name


def llama(layers: int = 32) -> list[str]:
    """The projected weights of LLaMA, in the order of the model."""
    kinds = [f"self_attn.{k}_proj" for k in "qkvo"] + [
        f"mlp.{k}_proj" for k in ("gate", "up", "down")
    ]
    return [f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in kinds]


def experts() -> list[str]:
    return [f"layers.{n}.experts.{e}.w{k}" for n in range(24) for e in range(32) for k in (1, 2, 3)]


def test_numbers_are_of_bare_names_and_distinct() -> None:
    """63 bits, above those of any place, and the same in every process: they are written here."""
    names = [*llama(), *experts(), "layers.1.x.2", "layers.2.x.1", "a.12", "a1.2"]
    uids = [uid_of(name) for name in names]
    assert len({*uids}) == len(names)
    assert all(NAMED <= uid < 2**63 for uid in uids)
    assert uid_of("layers.3.up.weight") == WRITTEN
    for wrapped in ("module.{}", "_orig_mod.module.{}", "module._fsdp_wrapped_module._orig_mod.{}"):
        assert bare(wrapped.format(names[5])) == names[5]
        assert uid_of(wrapped.format(names[5])) == uids[5]


WRITTEN = 7627622310132177329


def loads(offsets: Sequence[int], gap: int, window: int) -> list[int]:
    """Refreshes that are due in each window of some steps, cyclically."""
    count = [offsets.count(step) for step in range(gap)]
    return [sum(count[(s + i) % gap] for i in range(window)) for s in range(gap)]


def spread(offsets: Sequence[int], gap: int, window: int) -> float:
    """Standard deviation of the load of a window, of which 1 is that of independent draws."""
    found = loads(offsets, gap, window)
    mean = len(offsets) * window / gap
    variance = sum((x - mean) ** 2 for x in found) / gap
    return math.sqrt(variance / (mean * (1 - window / gap)))


@pytest.mark.parametrize(("names", "gap"), [(llama(), 200), (llama(80), 200), (experts(), 500)])
def test_names_spread_refreshes_more_evenly_than_hashes(names: list[str], gap: int) -> None:
    """Per step, where one refresh stalls, and over 5 % of a gap, where they add up.

    A 7B at gap 200 has at most 2 in a step, as places had; a hash of each name alone 5.
    """
    ours = [stagger_offset(uid_of(name), gap) for name in names]
    places = [stagger_offset(n, gap) for n in range(len(names))]
    hashed = [_hash(name, 32) * gap >> 32 for name in names]
    most = [max(loads(offsets, gap, 1)) for offsets in (places, ours, hashed)]
    assert most[0] <= most[1] < most[2] and most[1] <= most[0] + 2
    if gap == 200 and len(names) == 224:
        assert most == [2, 2, 5]
    for window, share in ((1, 0.75), (gap // 20, 0.45)):
        assert spread(ours, gap, window) < share * spread(hashed, gap, window)


# ------------------------------------------------------------------ older checkpoints


def test_a_run_takes_up_any_other_phase_of_the_gap() -> None:
    """As one does that is resumed from a checkpoint of draws by place: within a gap, then each."""
    for gap, offset, last in itertools.product((1, 2, 5), range(5), range(7)):
        taken = [last] if offset < gap else []
        for step in range(last, last + 4 * gap) if taken else ():
            if refresh_due(step, taken[-1], gap, offset):
                taken.append(step)
        apart = [b - a for a, b in itertools.pairwise(taken)]
        assert all(x == gap for x in apart[1:]) and all(1 <= x <= gap for x in apart[:1])
        assert all(step % gap == offset for step in taken[1:])


@pytest.mark.filterwarnings("ignore:.*does not use")
@ALL
def test_a_checkpoint_of_draws_by_place_goes_on(
    case: tuple[str, str | None, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads with what was drawn in it, and every state stays one that a step may read."""
    name, projector, options = case

    def made() -> tuple[list[Tensor], LowRankOptimizer]:
        params = {n: cases.parameter(shape) for n, shape in SHAPES.items()}
        own = {"projector": projector or "svd", "stagger": True, **options}
        groups = [{"params": [*params.items()], "rank": 3}]
        return [*params.values()], cases.build(name, groups, **own)

    params, optimizer = made()
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_optim.engine.planned.uid_of", NAMES.index)
        runs.train(params, optimizer, range(5))
    twins, resumed = made()
    resumed.load_state_dict(optimizer.state_dict())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    runs.train(twins, resumed, range(5, 10))
    assert all(x.isfinite().all() for x in twins)
    third = made()[1]
    third.load_state_dict(resumed.state_dict())  # which checks all values
    if optimizer.state[params[1]].get("refresh_step", -1) >= 0 and projector != "block":
        assert all(resumed.state[p]["refresh_step"] > 4 for p in twins if p.dim() > 1)
