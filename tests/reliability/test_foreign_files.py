"""Files that are cut off, have flipped bits, or are something else; and states of other libraries.

Whatever is in it: an error that says something and leaves the optimizer as it was, or a load that
can be stepped from.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit, import_bitsandbytes, import_galore_torch
from lowrank_optim.integrations.arguments import parse_optim_args
from lowrank_optim.optimizer import LowRankOptimizer
from tests.checkpoints.fuzz import mutated
from tests.engine.snapshots import everything, same

FEW, MANY = 10, 1000


def made(cls: type[LowRankOptimizer] = GaLoreAdamW) -> LowRankOptimizer:
    """A matrix and a vector, with and without a projection."""
    params = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6))]
    groups = [{"params": params[:1], "rank": 2}, {"params": params[1:], "rank": None}]
    return cls(groups, projector="svd", update_proj_gap=3, stagger=False)


def stepped(optimizer: LowRankOptimizer, steps: int = 1) -> LowRankOptimizer:
    for n in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                generator = torch.Generator().manual_seed(n)
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


class Projector:
    """Of galore-torch, as a file names it."""


Projector.__module__, Projector.__qualname__ = "galore_torch.galore_projector", "GaLoreProjector"


def written(state: Any) -> bytes:
    """A file: where galore-torch's class is asked for it is the one above."""
    package, module, file = ModuleType("galore_torch"), ModuleType(Projector.__module__), BytesIO()
    module.GaLoreProjector = Projector  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(state, file)
    return file.getvalue()


def of_galore_torch() -> dict[str, Any]:
    record = Projector()
    known = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    vars(record).update({**known, "ortho_matrix": torch.eye(4, 2)})
    low = {"step": 3, "exp_avg": torch.ones(2, 6), "exp_avg_sq": torch.ones(2, 6)}
    dense = {"step": 3, "exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}
    groups = [{"params": [n], "lr": 0.01} for n in (0, 1)]
    groups[0] |= {k: known[k] for k in ("rank", "update_proj_gap", "scale", "proj_type")}
    return {"state": {0: {**low, "projector": record}, 1: dense}, "param_groups": groups}


def of_bitsandbytes() -> dict[str, Any]:
    states = {n: {"step": 3, "state1": x, "state2": x.abs()} for n, x in enumerate(
        (torch.ones(4, 6), torch.ones(6))
    )}  # fmt: skip
    return {"state": states, "param_groups": [{"params": [0, 1], "lr": 0.01}]}


def dense() -> LowRankOptimizer:
    params = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6))]
    return GaLoreAdamW8bit([{"params": params, "rank": None}])


def own_state() -> dict[str, Any]:
    return stepped(made(), 2).state_dict()


def load(saved: Any, optimizer: LowRankOptimizer) -> None:
    """A file, or the state that is in one."""
    if isinstance(saved, BytesIO):
        try:
            saved = torch.load(saved, weights_only=True)
        except Exception as error:  # torch's, which may have no text
            raise ValueError("torch cannot read it") from error
    optimizer.load_state_dict(saved)


def imported(read: Callable[..., dict[str, Any]]) -> Callable[[Any, LowRankOptimizer], None]:
    return lambda saved, optimizer: optimizer.load_state_dict(read(saved, optimizer))


Reader = tuple[Callable[[Any, LowRankOptimizer], None], Callable[[], Any], Any]
READERS: dict[str, Reader] = {
    "its own": (load, own_state, made),
    "galore-torch": (imported(import_galore_torch), of_galore_torch, made),
    "bitsandbytes": (imported(import_bitsandbytes), of_bitsandbytes, dense),
}


def check(reader: Reader, saved: Any, errors: Any) -> bool:
    """Whether it was loaded; if not, nothing has changed and the error says something."""
    read, _, make = reader
    optimizer = stepped(make())
    before, groups = everything(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    try:
        read(saved, optimizer)
    except errors as error:
        assert str(error), repr(error)
        assert not same(everything(optimizer), before)
        assert optimizer.state_dict()["param_groups"] == groups
        return False
    stepped(optimizer)
    return True


def foreign() -> list[bytes]:
    zipped, array = BytesIO(), BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data.pkl", "no pickle")
    torch.save(torch.ones(3), array)
    text = json.dumps({"state": {}, "param_groups": []}).encode()
    return [b"", b"\x00", b"PK\x03\x04", text, b"\x80\x04N.", zipped.getvalue(), array.getvalue()]


@st.composite
def broken(draw: Any, whole: bytes) -> bytes:
    """Less of a file, or all of it with some bits flipped, or something else."""
    how = draw(st.sampled_from(["cut", "flipped", "foreign", "noise"]))
    if how == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if how == "flipped":
        data = bytearray(whole)
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(data)
    return draw(st.sampled_from(foreign()) if how == "foreign" else st.binary(max_size=64))


def quick(examples: int) -> Any:
    checks = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=checks,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", READERS)
def test_files_that_are_cut_off_flipped_or_foreign(of: str, examples: int) -> None:
    reader = READERS[of]
    whole = written(reader[1]())
    assert check(reader, BytesIO(whole), ())
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        assert not check(reader, BytesIO(whole[:cut]), (ValueError, TypeError))

    @quick(examples)
    @given(broken(whole))
    def run(data: bytes) -> None:
        check(reader, BytesIO(data), (ValueError, TypeError))

    logging.disable()  # of gradients that a wild moment has made infinite
    try:
        run()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", ["galore-torch", "bitsandbytes"])
def test_states_of_other_libraries_changed_at_random(of: str, examples: int) -> None:
    """In words, of whatever is wrong with it."""
    reader = READERS[of]
    good, counts = reader[1](), {True: 0, False: 0}

    @quick(examples)
    @given(st.data())
    def run(data: Any) -> None:
        counts[check(reader, mutated(good, data), (ValueError, TypeError))] += 1

    logging.disable()
    try:
        run()
    finally:
        logging.disable(logging.NOTSET)
    assert counts[False] > 0 and counts[True] > 0, counts


def test_a_sparse_moment_of_bitsandbytes_is_refused_in_words() -> None:
    """A RuntimeError of torch's, of a memory format, before."""
    saved = of_bitsandbytes()
    saved["state"][0]["state1"] = torch.eye(4, 6).to_sparse()
    with pytest.raises(ValueError, match="state1 of parameter 0 is a sparse tensor"):
        import_bitsandbytes(saved, stepped(dense()))


VALUES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False)
KEYS = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
PIECES = st.sampled_from([*"()[]{},=:'\"-+.0 1e", "rank", "None", "\\", "\n", "é", "{[]:1}"])


@given(st.text(max_size=40) | st.lists(PIECES, max_size=20).map("".join))
@example("x=" + "(" * 5000)
@example("x=" + "[" * 5000 + "]" * 5000)
@example("[" * 100_000)
@example("x={[]: 1}")
@example("x=" + "9" * 5000)
@example('{"x": ' + "9" * 5000 + "}")
@settings(deadline=None, database=None, derandomize=True, max_examples=40)
def test_text_of_arguments_is_read_or_refused_in_words(text: str) -> None:
    try:
        found = parse_optim_args(text)
    except (ValueError, TypeError) as error:
        assert "optim_args" in str(error), error
        return
    assert all(isinstance(key, str) for key in found)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
@settings(deadline=None, database=None, derandomize=True, max_examples=20)
def test_arguments_are_what_was_written(given: dict[str, Any]) -> None:
    text = ", ".join(f"{key}={value!r}" for key, value in given.items())
    finite = {k: v for k, v in given.items() if not isinstance(v, float) or abs(v) < 1e308}
    if given == finite:
        assert parse_optim_args(text) == given
    assert parse_optim_args(json.dumps(finite)) == finite
    assert parse_optim_args(given) == given
