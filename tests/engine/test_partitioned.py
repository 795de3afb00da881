"""DeepSpeed's ZeRO 1 to 3: a piece of one long vector in the place of a group's matrices."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer, lowrank_groups, methods
from tests import cases
from tests.compare import assert_close

DENSE = ("AdamW", "Lion", "SGD")
"""Rules that look at each entry by itself."""


def text(why: str) -> str:
    """Of the error, with the remedy."""
    start = "for the 2 matrices .*as under DeepSpeed's ZeRO 1, 2 and 3: "
    return f"{start}.*{why}.*Take ZeRO stage 0.*fully_shard"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 9)).double()


def partition(optimizer: LowRankOptimizer, rank: int = 0, size: int = 1) -> None:
    """What it does to the optimizer that it is given: groups stay, and have one new vector each.

    Of all parameters of a group, end to end and padded, it is this rank's part.
    """
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        flat = nn.functional.pad(flat, (0, -len(flat) % size)).chunk(size)[rank].clone()
        flat.requires_grad = True
        group["params"] = [flat]


def flat_gradient(optimizer: LowRankOptimizer, grads: list[Tensor]) -> None:
    (flat,) = optimizer.param_groups[0]["params"]
    flat.grad = torch.cat([g.reshape(-1) for g in grads]).to(flat.dtype)


def told(optimizer: LowRankOptimizer, text: str) -> None:
    """A step raises, and no vector has moved."""
    flats = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in flats]
    for p in flats:
        p.grad = torch.ones_like(p)
    for _ in range(2):  # whoever goes on is told again
        with pytest.raises(ValueError, match=text):
            optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(flats, before, strict=True))


@pytest.mark.parametrize("name", cases.method_names())
def test_a_rank_without_matrices_is_refused(name: str) -> None:
    """Every released package steps dense there, and says nothing."""
    for named in (True, False):
        model = network()
        params: Any = model.named_parameters() if named else model.parameters()
        optimizer = cases.build(name, params)
        partition(optimizer, size=2)
        told(optimizer, text("has no matrix left to project"))


def test_it_says_how_many_matrices_and_which_vector() -> None:
    optimizer = methods.GaLoreAdamW(lowrank_groups(network(), rank=3), lr=0.01)
    partition(optimizer, size=2)
    told(optimizer, r"^\(315,\) stands in a group of GaLoreAdamW for the 2 matrices .*rank=3 has")


def test_after_a_checkpoint_too() -> None:
    """Whose loading makes every group anew."""
    model = network()
    optimizer = methods.GaLoreAdamW(model.parameters(), lr=0.01, rank=3)
    optimizer.load_state_dict(optimizer.state_dict())
    partition(optimizer)
    told(optimizer, text("rank=3 has no matrix left"))


@pytest.mark.parametrize("name", [f"GaLore{rule}" for rule in DENSE])
def test_dense_groups_step_as_their_matrices(name: str) -> None:
    model = network()
    groups = [{"params": list(model.named_parameters()), "rank": None}]
    whole = getattr(methods, name)(groups, lr=0.01, weight_decay=0.1)
    flat = getattr(methods, name)(copy.deepcopy(groups), lr=0.01, weight_decay=0.1)
    partition(flat)
    for step in range(4):
        grads = [cases.gradients(p.shape, 1, p.dtype, step)[0] for p in model.parameters()]
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        whole.step()
        flat_gradient(flat, grads)
        flat.step()
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert_close(flat.param_groups[0]["params"][0].detach(), expected)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("GaLoreAdafactor", "Adafactor needs whole tensors"),
        ("GaLoreAdamW8bit", "blocks of moments in 8 or 4 bits would go across parameters"),
    ],
)
def test_dense_groups_that_depend_on_shapes_are_refused(name: str, why: str) -> None:
    params = list(network().parameters())
    optimizer = getattr(methods, name)([{"params": params, "rank": None}], lr=0.01)
    partition(optimizer)
    told(optimizer, text(why))


def test_vectors_that_a_group_was_given_are_fine() -> None:
    """And an unpickled optimizer does not know what it was given."""
    bias = nn.Parameter(torch.zeros(9))
    bias.grad = torch.ones(9)
    optimizer = methods.GaLoreAdamW([{"params": [bias], "rank": 2}], lr=0.01)
    optimizer.step()
    again = pickle.loads(pickle.dumps(optimizer))
    again.param_groups[0]["params"][0].grad = torch.ones(9)
    again.step()


REAL = """
import sys
import deepspeed, torch
from torch import nn
import lowrank_optim

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles for minutes
torch.manual_seed(0)
model, one = nn.Linear(12, 30), nn.Linear(12, 30)
one.load_state_dict(model.state_dict())
rank, stage = eval(sys.argv[1]), int(sys.argv[2])

def made(model):
    groups = [{"params": list(model.named_parameters()), "rank": rank}]
    return lowrank_optim.GaLoreAdamW(groups, lr=0.01, update_proj_gap=2)

config = {
    "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}
try:
    engine, *_ = deepspeed.initialize(model=model, optimizer=made(model), config=config)
    alone = made(one)
    for step in range(5):
        x = torch.randn(4, 12)
        engine.backward(engine(x).square().mean())
        engine.step()
        alone.zero_grad()
        one(x).square().mean().backward()
        alone.step()
    if stage == 3:
        print("TRAINED")
    else:
        print("APART", float((model.weight - one.weight).abs().max()))
except ValueError as error:
    print("TOLD", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [3, None])
def test_deepspeed_itself(rank: int | None, stage: int) -> None:
    """Where it is installed: one process, as the optimizer is given the same flat vector then."""
    pytest.importorskip("deepspeed", reason="installs with DS_BUILD_OPS=0 where no GPU is")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    own = {**os.environ, **ranks, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", REAL, repr(rank), str(stage)]
    done = subprocess.run(command, env=own, timeout=240, capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith(("TOLD", "APART", "TRAINED"))]
    assert lines, done.stderr[-3000:]
    if rank is not None and stage > 0:
        assert "TOLD" in lines[0] and "has no matrix left" in lines[0]
    elif stage < 3:
        assert lines[0].startswith("APART") and float(lines[0].split()[1]) < 1e-6
    else:
        assert lines == ["TRAINED"]
