"""galore-torch checkpoints, written by galore-torch itself, continued by ours."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreLion,
    import_bitsandbytes,
    import_galore_torch,
)
from lowrank_optim.optimizer import LowRankOptimizer
from tests import runs
from tests.compare import assert_close

galore_torch = pytest.importorskip("galore_torch")

GAP, SAVED = 5, 7  # refreshes at 0 and 5: saved two steps after one, compared up to the next
RANK = 3
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (7, 7), "narrow": (2, 9), "bias": (5,)}
SIDES = ["std", "reverse_std", "left", "right", "full"]
ADAFACTOR = {"relative_step": False, "scale_parameter": False, "lr": 0.05}


def parameters(sides: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """``narrow`` has fewer rows than the rank; the release crashes on it under reverse_std."""
    torch.manual_seed(3)
    names = [n for n in SHAPES if not (n == "narrow" and sides == "reverse_std")]
    return [nn.Parameter(torch.randn(SHAPES[n]).to(dtype)) for n in names]


def groups(params: list[nn.Parameter], sides: str, scale: float = 0.7) -> list[dict[str, Any]]:
    """Matrices low-rank, then the last matrix and the bias dense."""
    low = {"rank": RANK, "update_proj_gap": GAP, "scale": scale, "proj_type": sides}
    return [{"params": params[:-2], **low}, {"params": params[-2:]}]


def theirs(params: list[nn.Parameter], sides: str, adafactor: bool = False, **options: Any) -> Any:
    if adafactor:
        return galore_torch.GaLoreAdafactor(groups(params, sides), **{**ADAFACTOR, **options})
    own = {"lr": 0.05, "eps": 1e-30, "no_deprecation_warning": True}
    return galore_torch.GaLoreAdamW(groups(params, sides), **{**own, **options})


def ours(params: list[nn.Parameter], sides: str, cls: type = GaLoreAdamW, **options: Any) -> Any:
    own: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.0, "projector": "svd", "stagger": False}
    if cls is GaLoreAdamW:
        own["eps"] = 1e-30
    return cls(groups(params, sides), **{**own, **options})


def continue_both(
    source: torch.optim.Optimizer,
    target: LowRankOptimizer,
    theirs: list[nn.Parameter],
    mine: list[nn.Parameter],
    steps: range,
) -> None:
    for step in steps:
        runs.set_grads(theirs, step)
        for p, q in zip(mine, theirs, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        source.step()
        target.step()


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize("sides", SIDES)
def test_adamw_goes_on_as_galore_torch_would(sides: str) -> None:
    """Equal up to the step before the next refresh, whose signs the release leaves to the driver.

    eps is 1e-30, because theirs stands before the bias correction, and decay is off, because
    theirs comes last: everything else is the same arithmetic.
    """
    params = parameters(sides)
    source = theirs(params, sides)
    runs.train(params, source, range(SAVED))
    mine = runs.copies(params)
    target = ours(mine, sides)
    target.load_state_dict(import_galore_torch(runs.to_file(source.state_dict()), target))
    continue_both(source, target, params, mine, range(SAVED, 2 * GAP))
    for a, e in zip(mine, params, strict=True):
        assert_close(a, e)
    for p in mine[:-2]:
        assert target.state[p]["refresh_step"] == GAP
    runs.train(mine, target, [2 * GAP])
    for p in mine[:-2]:  # the next refresh falls where theirs does
        assert target.state[p]["refresh_step"] == 2 * GAP


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("sides", SIDES)
def test_adafactor_goes_on_as_galore_torch_would(sides: str, beta1: float | None) -> None:
    params = parameters(sides)
    source = theirs(params, sides, adafactor=True, beta1=beta1)
    runs.train(params, source, range(SAVED))
    mine = runs.copies(params)
    target = ours(mine, sides, GaLoreAdafactor, **ADAFACTOR, beta1=beta1)
    target.load_state_dict(import_galore_torch(source.state_dict(), target))
    continue_both(source, target, params, mine, range(SAVED, 2 * GAP))
    for a, e in zip(mine, params, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("saved", [1, GAP - 1, GAP, GAP + 1, 2 * GAP])
def test_next_refresh_falls_where_theirs_does(saved: int) -> None:
    """They refresh at multiples of the gap, counted before the step."""
    params = parameters("std")[:1] + parameters("std")[-2:]
    source = theirs(params, "std")
    runs.train(params, source, range(saved))
    mine = runs.copies(params)
    target = ours(mine, "std")
    target.load_state_dict(import_galore_torch(source.state_dict(), target))
    for step in range(saved, 2 * GAP + 2):
        projector = source.state[params[0]]["projector"]
        before = projector.ortho_matrix
        last = float(target.state[mine[0]]["refresh_step"])
        continue_both(source, target, params, mine, range(step, step + 1))
        refreshed = projector.ortho_matrix is not before
        assert (float(target.state[mine[0]]["refresh_step"]) != last) == refreshed, step


@pytest.mark.filterwarnings("ignore:rank")
def test_a_run_beyond_float32_counts_refreshes_where_theirs_would() -> None:
    """At a multiple of the gap that float32 does not have."""
    params = parameters("std")[:1] + parameters("std")[-2:]
    source = theirs(params, "std")
    runs.train(params, source, [0])
    state_dict = copy.deepcopy(source.state_dict())
    last = next(n for n in range(2**24, 2**24 + 2 * GAP) if n % GAP == 0 and n % 2)
    for own in state_dict["state"].values():
        own["step"] = last + 1
    mine = runs.copies(params)
    target = ours(mine, "std")
    target.load_state_dict(import_galore_torch(state_dict, target))
    assert float(target.state[mine[0]]["refresh_step"]) == last
    runs.train(mine, target, range(GAP))
    assert float(target.state[mine[0]]["refresh_step"]) == last + GAP


def test_bfloat16_checkpoint_gets_float32_moments_and_the_weights_basis() -> None:
    params = parameters("std", torch.bfloat16)
    source = theirs(params, "std")
    runs.train(params, source, range(3))
    target = ours(runs.copies(params), "std")
    target.load_state_dict(import_galore_torch(runs.to_file(source.state_dict()), target))
    wide = target.param_groups[0]["params"][0]
    old = source.state[params[0]]
    assert old["exp_avg"].dtype == torch.bfloat16
    assert target.state[wide]["low.exp_avg"].dtype == torch.float32
    assert torch.equal(target.state[wide]["low.exp_avg"], old["exp_avg"].float())
    assert torch.equal(target.state[wide]["basis"], old["projector"].ortho_matrix)


def test_importing_copies_and_changes_neither_side() -> None:
    """The release's basis is a view that keeps the whole singular factor alive; ours is not."""
    params = parameters("std")[:1] + parameters("std")[-2:]
    source = theirs(params, "std")
    runs.train(params, source, range(2))
    state_dict = source.state_dict()
    reference = copy.deepcopy(state_dict)
    target = ours(runs.copies(params), "std")
    imported = import_galore_torch(state_dict, target)
    assert not target.state
    basis = imported["state"][0]["basis"]
    assert basis.untyped_storage().nbytes() == basis.numel() * 4
    for state in imported["state"].values():
        for value in state.values():
            value.fill_(9.0)
    assert state_dict["param_groups"] == reference["param_groups"]
    for i, state in reference["state"].items():
        assert torch.equal(state_dict["state"][i]["exp_avg"], state["exp_avg"])
    kept = state_dict["state"][0]["projector"].ortho_matrix
    assert torch.equal(kept, reference["state"][0]["projector"].ortho_matrix)


def test_a_file_is_read_without_galore_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where importing it fails; the checkpoint is nested as their script nests it."""
    params = parameters("std")[:1] + parameters("std")[-2:]
    source = theirs(params, "std")
    runs.train(params, source, range(2))
    torch.save({"optimizer": source.state_dict(), "update_step": 2}, tmp_path / "optimizer.pt")
    with monkeypatch.context() as patch:
        for name in [x for x in sys.modules if x.split(".")[0] == "galore_torch"]:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            torch.load(tmp_path / "optimizer.pt", weights_only=False)
        own = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 10), (2, 9), (5,))]
        optimizer = GaLoreAdamW([{"params": own[:1], "rank": 3}, {"params": own[1:]}])
        optimizer.load_state_dict(import_galore_torch(tmp_path / "optimizer.pt", optimizer))
    state = optimizer.state[own[0]]
    old = source.state[params[0]]
    assert torch.equal(state["basis"], old["projector"].ortho_matrix)
    assert torch.equal(state["low.exp_avg_sq"], old["exp_avg_sq"])
    assert state["step"] == 2 and state["refresh_step"] == 0


class Payload:
    """Unpickled by a loader that runs code, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    target = ours(parameters("std")[-3:], "std")
    bad = {"state": {0: {"step": Payload(tmp_path / "pwned")}}, "param_groups": []}
    torch.save(bad, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"refused to read .*bad\.pt.*neither a tensor"):
        import_galore_torch(tmp_path / "bad.pt", target)
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(bad, protocol=2))
    with pytest.raises(ValueError, match="refused to read"):
        import_galore_torch(tmp_path / "raw.pkl", target)
    assert not (tmp_path / "pwned").exists()


def test_reading_a_file_allows_the_projector_for_that_file_only() -> None:
    """torch's list of allowed classes is global: it must be as it was."""
    params = parameters("std")[:1] + parameters("std")[-2:]
    source = theirs(params, "std")
    runs.train(params, source, range(2))
    before = set(torch.serialization.get_safe_globals())
    import_galore_torch(runs.to_file(source.state_dict()), ours(runs.copies(params), "std"))
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="GaLoreProjector"):
        torch.load(runs.to_file(source.state_dict()), weights_only=True)


def trained(sides: str = "std") -> tuple[list[nn.Parameter], dict[str, Any]]:
    params = [parameters(sides)[0], *parameters(sides)[-2:]]
    source = theirs(params, sides)
    runs.train(params, source, range(2))
    return params, source.state_dict()


def mismatched(**keys: Any) -> LowRankOptimizer:
    params, _ = trained()
    made = groups(params, "std")
    made[0] |= keys
    return GaLoreAdamW(made, projector="svd")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 2}, r"galore_torch does not fit parameter 0 .*: rank is 3 there and 2 here"),
        ({"proj_type": "left"}, r"parameter 0 .*: proj_type is std there and left here"),
        ({"rank": None}, r"parameter 0 .*: the parameter is projected there and dense here"),
    ],
)
def test_a_misfit_names_the_parameter_and_both_values(keys: dict[str, Any], message: str) -> None:
    _, state_dict = trained()
    target = mismatched(**keys)
    with pytest.raises(ValueError, match=message):
        import_galore_torch(state_dict, target)
    assert not target.state


def test_other_shapes_methods_and_layouts_are_refused() -> None:
    params, state_dict = trained()
    taller = [nn.Parameter(torch.zeros(9, 10)), *runs.copies(params[1:])]
    with pytest.raises(ValueError, match=r"shape of basis is \(6, 3\) there and \(9, 3\) here"):
        import_galore_torch(state_dict, ours(taller, "std"))
    with pytest.raises(ValueError, match=r"low\.exp_avg_sq"):
        import_galore_torch(state_dict, ours(runs.copies(params), "std", GaLoreLion))
    with pytest.raises(ValueError, match=r"groups of \[1, 2\] parameters, the optimizer of \[3\]"):
        import_galore_torch(state_dict, GaLoreAdamW(runs.copies(params)))
    with pytest.raises(ValueError, match="not an optimizer checkpoint"):
        import_galore_torch({"model": {}}, ours(runs.copies(params), "std"))
    with pytest.raises(ValueError, match="not an optimizer checkpoint"):
        import_galore_torch(runs.to_file([1, 2]), ours(runs.copies(params), "std"))


def test_what_ours_cannot_continue_is_refused() -> None:
    params, state_dict = trained()
    target = ours(runs.copies(params), "std")
    uncorrected = theirs(params, "std", correct_bias=False).state_dict()
    with pytest.raises(ValueError, match="correct_bias=False is not supported"):
        import_galore_torch(uncorrected, target)
    eight = copy.deepcopy(state_dict)
    eight["state"][0] = {"step": 2, "state1": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter 0 has \['state1'\], not the 2 moments"):
        import_galore_torch(eight, target)
    with pytest.raises(ValueError, match=r"import_galore_torch"):
        target.load_state_dict(state_dict)  # the hint where it is needed


def test_group_keys_come_from_the_projectors_that_ignored_later_edits() -> None:
    """galore-torch copies its keys into each projector at the first step and never looks again."""
    params, _ = trained()
    source = theirs(params, "std")
    runs.train(params, source, range(1))
    source.param_groups[0].update(update_proj_gap=1, scale=9.0)
    target = ours(runs.copies(params), "std")
    target.load_state_dict(import_galore_torch(source.state_dict(), target))
    assert target.param_groups[0]["update_proj_gap"] == GAP
    assert target.param_groups[0]["scale"] == 0.7
    both = parameters("std")
    late = theirs(both, "std")
    runs.train(both[:1], late, range(1))
    late.param_groups[0]["scale"] = 9.0
    runs.train(both, late, range(1, 2))
    with pytest.raises(ValueError, match=r"scale of one group is 0\.7 for parameter 0 and 9\.0"):
        import_galore_torch(late.state_dict(), ours(runs.copies(both), "std"))


@pytest.mark.parametrize("read", [import_galore_torch, import_bitsandbytes])
@pytest.mark.parametrize("given", ["an optimizer", None])
def test_what_is_no_checkpoint_is_not_called_a_damaged_file(read: Any, given: Any) -> None:
    """The optimizer in the place of its state dict, say."""
    optimizer = GaLoreAdamW(parameters("std"), rank=2)
    said = r"a path, a file, or the state dict itself, as optimizer\.state_dict\(\) gives it, got "
    with pytest.raises(TypeError, match=said + ("AdamW" if given else "NoneType")):
        read(torch.optim.AdamW(parameters("std")) if given else None, optimizer)
