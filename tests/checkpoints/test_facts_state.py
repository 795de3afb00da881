"""Facts about what is kept: 11, 12 and 13."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from lowrank_optim import GaLoreAdamW, memory
from tests import cases


@pytest.mark.parametrize("projector", cases.projector_names())
@pytest.mark.parametrize("shape", [(32, 86), (86, 32)])
def test_fact_11_state_holds_k_r_and_2_l_r_numbers_by_storage(
    shape: tuple[int, int], projector: str
) -> None:
    """``std``: a basis of k r and two moments of l r, and no storage behind them that is larger.

    The release keeps a slice of the whole SVD factor: 16 times the basis at 512x1376, rank 32.
    Indices are r numbers, entries a key of 8 bytes, and a block has the moments of its tensor. A
    fixed basis is there once for all matrices.
    """
    k, l, r = min(shape), max(shape), 4
    _, optimizer = cases.train(
        "GaLoreAdamW", cases.parameter(shape, torch.float32),
        cases.gradients(shape, 5, torch.float32), projector=projector, rank=r,
    )  # fmt: skip
    (state,) = optimizer.state.values()
    other = {"rows": shape[1], "columns": shape[0]}.get(projector, l)
    low = 4 * (k * l if projector == "block" else other * r)
    prefix = "" if projector == "block" else "low."
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[prefix + key].untyped_storage().nbytes() == low
    (item,) = optimizer._items(optimizer.param_groups[0])
    fixed = {"dct": (4 * r, 4 * k * k), "hadamard": (4 * r, 4 * k * k)}
    if projector == "dct" and item.subspace.fast(k, state["basis_index"].float()):
        fixed["dct"] = 4 * r, 36 * k + 24 * (k // 2 + 1)  # factors of the transform
    basis, shared = fixed.get(projector, (4 * k * r, 0))
    basis = basis if projector in cases.basis_names() else 0
    counters = 12 + {"rows": 4 * r, "columns": 4 * r, "randk": 8}.get(projector, 0)
    assert memory.report(optimizer) == (basis + shared, 2 * low, counters)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in state.values()}
    assert sum(x.nbytes() for x in storages.values()) == basis + 2 * low + counters


SIZES: dict[str, Any] = {
    # elements of basis, of moments for (m, n) = (8, 20) at rank 3
    "std": (3 * 8, 2 * 3 * 20),
    "reverse_std": (3 * 20, 2 * 3 * 8),
    "left": (3 * 8, 2 * 3 * 20),
    "right": (3 * 20, 2 * 3 * 8),
    "full": (3 * 28, 2 * 3 * 3),
}


@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
@pytest.mark.parametrize(
    "dtype, state_dtype, moment_size",
    [
        (torch.float32, "float32", 4),
        (torch.bfloat16, "float32", 4),
        (torch.bfloat16, "bfloat16", 2),
        (torch.float64, "float32", 8),
    ],
)
def test_fact_12_bytes_of_the_whole_optimizer_are_the_formula(
    dtype: torch.dtype, state_dtype: str, moment_size: int, proj_type: str
) -> None:
    """The sum of every storage is basis + moments + dense moments + counters, to the byte."""
    low = [torch.nn.Parameter(cases.parameter((8, 20), dtype).detach()) for _ in range(3)]
    dense = [torch.nn.Parameter(cases.parameter(s, dtype).detach()) for s in [(), (5,), (7, 9)]]
    optimizer = GaLoreAdamW(
        [{"params": low, "rank": 3}, {"params": dense}],
        proj_type=proj_type,
        state_dtype=state_dtype,
    )
    params = [*low, *dense]
    cases.run(optimizer, params, [[torch.randn_like(p) for p in params]])
    basis, moments = SIZES[proj_type]
    want = 3 * (basis * dtype.itemsize + moments * moment_size) + 2 * (1 + 5 + 63) * moment_size
    counters = 3 * 3 * 4 + 3 * 4
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in state.values()
    }
    assert sum(held.values()) == want + counters
    assert memory.report(optimizer).total == want + counters


DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(6, 11), (13, 7), (3, 6, 10), (5,)]


PAIRS = [
    (name, projector)
    for name, projector in [
        *cases.pairs(),
        *((name, "svd") for name in cases.method_names() if name not in cases.projecting_names()),
    ]
    if not name.endswith("8bit")  # the run asks for bfloat16 moments, of any class
]


@pytest.mark.parametrize(
    "name, projector, dtype",
    [
        pytest.param(
            *row,
            marks=pytest.mark.slow
            # test_state.py resumes with every projector
            if cases.is_beyond(*row[:2]) or (row[0] == "GaLoreAdamW" and i % 3)
            else (),
        )
        for i, row in enumerate(cases.in_turn(PAIRS, DTYPES))
    ],
)
def test_fact_13_a_resumed_run_is_bit_identical(
    name: str, projector: str, dtype: torch.dtype
) -> None:
    """Saved at some of six steps, loaded with ``weights_only=True``: the same bits at the end.

    A projected matrix refreshes at every third step: three steps in turn are before, on and after
    one, wherever its own falls. ``test_state.py`` resumes at every step. bfloat16 parameters
    keep float32 moments through the load, and stochastic rounding resumes its random numbers. The
    release pickles a Python object, which ``weights_only`` refuses.
    """
    start = [cases.parameter(s, dtype).detach() for s in SHAPES]
    grads = [[g[i] for g in (cases.gradients(s, 6, dtype) for s in SHAPES)] for i in range(6)]

    def make() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(x.clone()) for x in start]
        options: dict[str, Any] = {"stochastic_rounding": True, "on_refresh": "project"}
        options |= {"stagger": True, "projector": projector, "state_dtype": "bfloat16"}
        return params, cases.build(name, [{"params": params, "rank": 4}], **options)

    params, optimizer = make()
    checkpoints = []
    for row in grads:
        file = io.BytesIO()
        torch.save(([p.detach() for p in params], optimizer.state_dict()), file)
        checkpoints.append(file.getvalue())
        cases.run(optimizer, params, [row])
    for i in (2, 3, 4):
        weights, state = torch.load(io.BytesIO(checkpoints[i]), weights_only=True)
        again, resumed = make()
        for p, w in zip(again, weights, strict=True):
            p.data.copy_(w)
        resumed.load_state_dict(state)
        cases.run(resumed, again, grads[i:])
        assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))


@pytest.mark.parametrize("name", cases.method_names())
def test_fact_13_loading_does_not_alias(name: str) -> None:
    """``load_state_dict(other.state_dict())`` in one process: the two share nothing.

    In the release they share the projector, and the second to refresh changes the first.
    """
    start, grads = cases.parameter((6, 11)), cases.gradients((6, 11), 5)
    _, source = cases.train(name, start, grads[:2])
    before = copy.deepcopy(source.state_dict()["state"])
    param = torch.nn.Parameter(start.detach().clone())
    target = cases.build(name, [{"params": [param], "rank": cases.RANK}])
    target.load_state_dict(source.state_dict())
    cases.run(target, [param], [[g] for g in grads[2:]])
    after = source.state_dict()["state"]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
