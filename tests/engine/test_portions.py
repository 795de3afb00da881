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
