"""What an optimizer says of itself before the first step, and what it warns of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from lowrank_optim import (
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    LowRankOptimizer,
    attach_in_backward,
    lowrank_groups,
    memory,
    methods,
)
from lowrank_optim.nn import convert
from tests import cases
from tests.logged import Logged
from tests.sharded.ranks import Ranks, World


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24))


def stepped(optimizer: LowRankOptimizer, of: nn.Module) -> None:
    of(torch.randn(3, 24)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", cases.method_names())
def test_figures_are_those_of_the_run(name: str) -> None:
    """Before the first step and after it; the state is that of ``memory.report``, to the byte."""
    net = model()
    optimizer = cases.build(name, net.named_parameters(), lr=0.02)
    before = optimizer.summary()
    stepped(optimizer, net)
    after = optimizer.summary()
    count, size = (4, 88) if name in cases.WHOLE_LAYERS else (2, 0)
    assert before.tensors == 4 and before.projected_tensors == count
    assert (before.parameters, before.projected) == (24 * 64 * 2 + 88, 24 * 64 * 2 + size)
    assert after.state_bytes == memory.report(optimizer).total
    if not name.startswith("DCT"):  # what matrices share is built by the first step
        assert before == after


def test_the_rate_of_the_projected_part() -> None:
    net = model()
    (rates,) = GaLoreAdamW(net.named_parameters(), lr=0.02, scale=0.5, rank=4).summary().rates
    assert rates == (0.02, 0.01)
    own = {"lr": 0.02, "proj_params_lr_scale": 0.1, "density": 0.5}
    (rates,) = FrugalAdamW(net.named_parameters(), **own).summary().rates
    assert rates == pytest.approx((0.02, 0.002))
    (rates,) = methods.SwitchLoRAAdamW(net.named_parameters(), lr=0.02, rank=4).summary().rates
    assert rates == (0.02, 0.02)
    adafactor = GaLoreAdafactor(net.named_parameters(), rank=4).summary()
    (rates,) = adafactor.rates
    assert rates.lr != rates.lr  # steps of its own size
    assert "nan" not in str(adafactor) and "learning rate of each step's own" in str(adafactor)


def test_modules_count_as_projected() -> None:
    net = model()
    optimizer = methods.SwitchLoRAAdamW(convert(net, "switchlora", rank=4), lr=1e-2)
    found = optimizer.summary()
    stepped(optimizer, net)
    assert found.shortfall() is None
    assert found.state_bytes == memory.report(optimizer).total


def test_one_line_at_the_first_step(logged: Logged) -> None:
    net = model()
    optimizer = GaLoreAdamW(net.named_parameters(), lr=0.02, rank=4)
    with logged.at_level(logging.INFO, "lowrank_optim"):
        stepped(optimizer, net)
        stepped(optimizer, net)
    lines = [r.getMessage() for r in logged.records if "tensors projected" in r.getMessage()]
    assert lines == [str(optimizer.summary())]
    assert lines[0].startswith("GaLoreAdamW: 2 of 4 tensors projected, 97.2% of 3,160 parameters;")


def test_a_model_that_is_mostly_dense_is_told_with_the_remedy() -> None:
    """Mixtral's experts were skipped without a word."""
    net = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24), nn.Linear(24, 4))
    optimizer = GaLoreAdamW(lowrank_groups(net, rank=2, target_modules=[r"^3\."]))
    text = r"projects 3\.0% of the parameters in matrices; dense are 0\.weight .*widen target"
    with pytest.warns(UserWarning, match=text):
        stepped(optimizer, net)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        stepped(optimizer, net)


def test_embeddings_and_heads_are_no_matrices_to_project() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.proj = nn.Embedding(500, 24), nn.Linear(24, 24)
            self.lm_head = nn.Linear(24, 500)

    found = GaLoreAdamW(Net().named_parameters(), rank=4).summary()
    assert found.matrices == found.projected == 24 * 24
    assert found.shortfall() is None


def test_a_head_of_a_wrapped_model_is_none_either() -> None:
    """A warning asked for a rank of the head, which is dense as in the plain model."""
    net = nn.ModuleDict({"proj": nn.Linear(24, 24), "output": nn.Linear(24, 500)})
    found = GaLoreAdamW(nn.ModuleDict({"module": net}).named_parameters(), rank=4).summary()
    assert found.matrices == found.projected == 24 * 24
    assert found.shortfall() is None


def test_dense_on_purpose_is_not_warned_of() -> None:
    net = model()
    optimizer = GaLoreAdamW([{"params": [*net.parameters()], "rank": None}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(optimizer, net)


def test_a_step_without_any_gradient_is_told() -> None:
    optimizer = GaLoreAdamW(model().named_parameters(), rank=4)
    with pytest.warns(UserWarning, match="no parameter of this GaLoreAdamW has a gradient"):
        optimizer.step()


def test_a_later_step_without_any_gradient_is_told_once() -> None:
    """As of a model whose parameters something has replaced since."""
    net = model()
    optimizer = GaLoreAdamW(net.named_parameters(), rank=4)
    stepped(optimizer, net)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="make the optimizer after what replaces the parameters"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("mode", ["project", "step"])
def test_a_step_inside_backward_is_not_told_of(mode: Any) -> None:
    net = model()
    optimizer = GaLoreAdamW(net.named_parameters(), rank=4)
    with attach_in_backward(optimizer, mode), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            stepped(optimizer, net)
            optimizer.zero_grad()


# ------------------------------------------------------------------ sharded


def _ranks(world: World) -> None:
    device = torch.device("cpu")

    def flattened(**options: Any) -> Any:
        return FullyShardedDataParallel(model(), device_id=device, **options)

    for original in (True, False):
        wrapped = flattened(use_orig_params=original)
        with pytest.raises(ValueError, match=r"has flattened: no matrix .*DistributedDataParallel"):
            GaLoreAdamW(wrapped.named_parameters(), rank=4)
        GaLoreAdamW([{"params": [*wrapped.parameters()], "rank": None}])
    whole = flattened(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD)
    assert GaLoreAdamW(whole.parameters(), rank=4).summary().projected_tensors == 2

    net = model()  # and the other way round: the optimizer first
    optimizer = GaLoreAdamW(net.named_parameters(), rank=4)
    wrapped = FullyShardedDataParallel(net, device_id=device, use_orig_params=True)
    wrapped(torch.randn(3, 24)).square().mean().backward()
    with pytest.raises((ValueError, RuntimeError), match=r"has flattened|after what reshapes"):
        optimizer.step()

    net = model()
    optimizer = GaLoreAdamW(net.named_parameters(), rank=4)
    wrapped = FullyShardedDataParallel(net, device_id=device, use_orig_params=False)
    wrapped(torch.randn(3, 24)).square().mean().backward()
    with pytest.warns(UserWarning, match="make the optimizer after what replaces the parameters"):
        optimizer.step()

    for stepped in (False, True):  # or loaded: either way it has a state
        net = model()
        optimizer = GaLoreAdamW(net.named_parameters(), rank=4)
        if stepped:
            net(torch.randn(3, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        own = next(net.parameters())
        fully_shard(net, mesh=init_device_mesh(device.type, (world.size,)))
        net(torch.randn(3, 24)).square().mean().backward()
        if hasattr(own, "_fsdp_orig_uid"):  # torch 2.13 leaves a mark
            told: Any = pytest.raises(
                RuntimeError, match=r"make the optimizer after fully_shard\(model\)"
            )
        else:
            told = pytest.warns(UserWarning, match="make the optimizer after what replaces")
        with told:
            optimizer.step()


def test_sharding_that_cannot_train_is_told(ranks: Callable[[int], Ranks]) -> None:
    """FSDP1 trained dense AdamW in silence; an optimizer from before ``fully_shard``, nothing."""
    ranks(2).run("sharding", _ranks).checked()
