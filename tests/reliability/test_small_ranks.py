"""A share that rounds to none of a matrix's rows, entries or blocks keeps one of them."""

from __future__ import annotations

import pytest
import torch

from tests import cases


@pytest.mark.parametrize(("name", "projector"), cases.params(cases.pairs()))
def test_a_small_share_trains_with_state(name: str, projector: str) -> None:
    """Rows of 0.05 of 16 were none: no step moved the weights, or the residual alone did."""
    start = cases.parameter((16, 24), torch.float32)
    param = torch.nn.Parameter(start.detach().clone())
    optimizer = cases.build(
        name, [{"params": [param], "rank": 0.01}], projector=projector, weight_decay=0.0
    )
    cases.run(optimizer, [param], [[g] for g in cases.gradients((16, 24), 3, torch.float32)])
    assert not torch.equal(param.detach(), start.detach())
    moments = [x for k, x in optimizer.state[param].items() if "exp_avg" in k or "momentum" in k]
    assert len(moments) == len(
        [*optimizer.rule_class.from_group(optimizer.param_groups[0]).slots((16, 24))]
    )
    assert all(x.numel() and x.isfinite().all() and x.count_nonzero() for x in moments)


def test_a_share_of_nothing_is_nothing() -> None:
    """Of FRUGAL, where it is asked for: no weight has moments."""
    param = torch.nn.Parameter(cases.parameter((16, 24), torch.float32).detach())
    optimizer = cases.build("FrugalAdamW", [{"params": [param], "rank": 0.0}], projector="columns")
    cases.run(optimizer, [param], [cases.gradients((16, 24), 1, torch.float32)])
    assert optimizer.state[param]["low.exp_avg"].numel() == 0
