"""Small matrices are taken several at a time on a CPU: bit for bit as one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_optim.engine import matrix_step
from tests import cases

CASES: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {"stochastic_rounding": True, "proj_type": "full"}),
    ("GaLoreAdamW", {"projector": "random", "state_dtype": "4bit"}),
    ("FiraAdamW", {"alpha_mode": "paper", "scale": 0.5}),
    ("DCTAdamW", {"transform": "matmul", "error_feedback": "8bit"}),
    ("SSTAdamW", {"steps_per_iteration": 2}),
    ("SwitchLoRAAdamW", {"interval": 4, "freeze_steps": 2}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW8bit", {"projector": "rsvd"}),
    ("GaLoreAdafactor", {"scale_parameter": True}),
    ("FrugalAdamW", {"projector": "svd"}),
    ("FrugalAdamW", {"projector": "randk", "free_rule": "sgd"}),
    ("ApolloAdamW", {}),
    ("LDAdamW", {}),
]


@pytest.mark.filterwarnings("ignore:.*does not use")
@pytest.mark.parametrize(
    ("name", "options"),
    [*CASES, *(pytest.param(*own, marks=pytest.mark.slow) for own in OTHERS)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_several_at_a_time_are_as_each(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and state of three matrices, one of whose gradients is not finite in one step.

    A portion is of two: the first has another beside it, the last has not.
    """
    shape, dtype, found = (12, 320), torch.bfloat16, []
    grads = [cases.gradients(shape, 4, dtype, seed=n) for n in range(3)]
    grads[1][3][2, 3] = torch.nan
    for most in (0, 2 * 12 * 320):
        monkeypatch.setattr(matrix_step, "CACHED_ELEMENTS", most)
        params = [cases.parameter(shape, dtype) * (n + 1) for n in range(3)]
        params = [p.detach().requires_grad_() for p in params]
        gap = {} if "steps_per_iteration" in options else {"update_proj_gap": 2}
        built = cases.build(name, params, **{"weight_decay": 0.1, "rank": 4, **gap, **options})
        cases.run(built, params, [list(row) for row in zip(*grads, strict=True)])
        found.append([[p, *built.state[p].values()] for p in params])
    for one, several in zip(*found, strict=True):
        for x, y in zip(one, several, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    ("name", "options"),
    [("DCTAdamW", {"error_feedback": "float32"}), ("LDAdamW", {}), ("FiraAdamW", {})],
    ids=str,
)
def test_rounding_of_weights_is_nothing_to_their_state(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, which writes such weights in float32 before: state is of gradients alone.

    Of two matrices, and of two whose strides allow no view as a matrix.
    """
    cases.branching(monkeypatch, lambda x: True)
    shape, found = (6, 8, 3, 3), []
    for rounding in (False, True):
        starts = [cases.parameter(shape, torch.bfloat16, seed=n).detach() for n in range(4)]
        forms = [x.to(memory_format=torch.channels_last) for x in starts[:2]] + starts[2:]
        params = [x.clone().requires_grad_() for x in forms]
        grads = [cases.gradients(shape, 3, torch.bfloat16, seed=9 + n) for n in range(4)]
        built = cases.build(
            name, params, lr=0.5, stochastic_rounding=rounding, update_proj_gap=2, **options
        )
        cases.run(built, params, [list(row) for row in zip(*grads, strict=True)])
        assert all(bool((p != x).any()) for p, x in zip(params, starts, strict=True))
        found.append([dict(built.state[p]) for p in params])
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[key]) for key, x in one.items())


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {}),
    ("GaLoreAdamW8bit", {"maximize": True}),
    ("GaLoreAdamW", {"state_dtype": "4bit", "stochastic_rounding": True}),
    ("GaLoreLion", {"state_dtype": "bfloat16"}),
    ("GaLoreAdafactor", {"scale_parameter": True}),
    ("GaLoreAdamW", {"lr": "tensor", "capturable": True}),
]


@pytest.mark.parametrize("shape", [(300,), (4, 70), ()], ids=str)
@pytest.mark.parametrize(("name", "options"), SMALL, ids=str)
def test_small_dense_parameters_together_are_as_each(
    name: str, options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, beside the run of each alone: weights, moments and counters.

    One begins later than the others; a gradient of another is not finite in a step, in which it
    keeps its weights.
    """
    cases.branching(monkeypatch, lambda x: True)
    options = {k: torch.tensor(0.01) if x == "tensor" else x for k, x in options.items()}
    grads = [cases.gradients(shape, 4, torch.bfloat16, seed=n) for n in range(3)]
    grads[2][2].view(-1)[0] = torch.nan

    def run(at: list[int]) -> list[list[torch.Tensor]]:
        params = [(cases.parameter(shape, torch.bfloat16) * (n + 1)).detach() for n in at]
        named = [(f"layer{n}", p.requires_grad_()) for n, p in zip(at, params, strict=True)]
        built = cases.build(name, [{"params": named, "rank": None}], weight_decay=0.1, **options)
        for row in range(4):
            for n, p in zip(at, params, strict=True):
                p.grad = None if n == 1 and row == 0 else grads[n][row].clone()
            before = [p.detach().clone() for p in params]
            built.step()
            if 2 in at and row == 2:
                assert torch.equal(params[at.index(2)], before[at.index(2)])
        return [[p, *built.state[p].values()] for p in params]

    together = run([0, 1, 2])
    for n, own in enumerate(together):
        (alone,) = run([n])
        for x, y in zip(own, alone, strict=True):
            assert torch.equal(x, y)
        assert all(bool(x.isfinite().all()) for x in own if x.is_floating_point())
