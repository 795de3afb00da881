"""Nothing that a file or a folder holds is run: plain state, restricted pickles, our own csrc."""

from __future__ import annotations

import ast
import ctypes
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import import_bitsandbytes, import_galore_torch
from lowrank_optim.ops.native import loader
from tests import cases, runs

PACKAGE = Path(lowrank_optim.__file__).parent
PLAIN = (Tensor, int, float, bool, str, type(None))


def leaves(x: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(x, dict):
        return [leaf for k, v in x.items() for leaf in leaves(v, f"{at}[{k!r}]")]
    if isinstance(x, list | tuple):
        assert type(x) in (list, tuple), at  # no named tuple either: it is a class to import
        return [leaf for i, v in enumerate(x) for leaf in leaves(v, f"{at}[{i}]")]
    return [(at, x)]


def globals_of(data: bytes) -> set[str]:
    """What a file that ``torch.save`` wrote asks to be imported."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as file:
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        text = file.read(name)
    assert b"lowrank_optim" not in text
    return set(found)


@pytest.mark.parametrize("name", cases.method_names())
def test_state_holds_no_object_of_the_package(name: str) -> None:
    """Tensors, numbers and strings: any reader can have it, and none has to run anything."""
    projectors = cases.projector_names() if name == "GaLoreAdamW" else ["svd"]
    for projector in projectors:
        params = [nn.Parameter(torch.randn(64, 80)), nn.Parameter(torch.randn(80))]
        own = {"projector": projector} if name in cases.projecting_names() else {}
        groups = [{"params": params[:1], "rank": 4}, {"params": params[1:], "rank": None}]
        optimizer = cases.build(name, groups, **own)
        runs.train(params, optimizer, range(2))
        for at, x in leaves(optimizer.state_dict()):
            assert type(x) in PLAIN, (at, type(x))
        data = runs.saved(optimizer)
        assert not globals_of(data)
        optimizer.load_state_dict(runs.loaded(data))


class Payload:
    """What an attacker pickles."""

    def __reduce__(self) -> Any:
        return os.system, ("touch run_by_a_pickle",)


def hostile(where: str) -> bytes:
    """A checkpoint of galore-torch's form with code in it."""
    entry: dict[Any, Any] = {"step": 1, "exp_avg": torch.zeros(2, 6)}
    state: dict[str, Any] = {"state": {0: entry}, "param_groups": [{"params": [0], "rank": 2}]}
    holder = {"state": entry, "group": state["param_groups"][0], "top": state}[where]
    holder["projector" if where == "state" else "extra"] = Payload()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["state", "group", "top"])
@pytest.mark.parametrize("read", [import_galore_torch, import_bitsandbytes])
def test_importers_run_nothing(
    read: Any, where: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unpickler knows tensors, containers and one class without its code, and no more."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "theirs.pt"
    data = hostile(where)
    file.write_bytes(pickle.dumps(Payload()) if legacy else data)
    optimizer = cases.build("GaLoreAdamW", [{"params": [nn.Parameter(torch.zeros(4, 6))]}])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="refused to read"):
        read(file, optimizer)
    assert not (tmp_path / "run_by_a_pickle").exists()
    assert optimizer.state_dict() == before


def test_the_package_unpickles_nothing_itself() -> None:
    """No call of ``pickle``, and every ``torch.load`` says ``weights_only=True``."""
    loads = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name.split(".")[0] not in ("pickle", "dill", "marshal", "shelve"), path
            assert name not in ("eval", "exec", "compile", "os.system"), path
            if name == "torch.load":
                loads += 1
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", path
    assert loads


def test_the_native_library_is_the_package_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole paths within the package, or in the folder of ``LOWRANK_OPTIM_LIBRARY``."""
    monkeypatch.delenv("LOWRANK_OPTIM_LIBRARY", raising=False)
    folders = [Path(p).resolve() for p in lowrank_optim.__path__]
    for path in loader._paths("liblowrank_optim.so"):
        assert path.is_absolute() and path.parent.name == "_native"
        assert path.parent.parent.resolve() in folders
    monkeypatch.setenv("LOWRANK_OPTIM_LIBRARY", "/elsewhere")
    assert list(loader._paths("a.so")) == [Path("/elsewhere/a.so")]


def test_nothing_is_loaded_from_the_working_folder(tmp_path: Path) -> None:
    """Libraries of our names where Python runs, and on ``LD_LIBRARY_PATH``, stay closed."""
    for name in ("liblowrank_optim.so", "liblowrank_optim_cuda.so"):
        (tmp_path / name).write_bytes(b"not a library")
    opened: list[str] = []
    real = ctypes.CDLL

    def watched(name: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(name))
        return real(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.delenv("LOWRANK_OPTIM_LIBRARY", raising=False)
        patch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        patch.setattr(ctypes, "CDLL", watched)
        library, reason = loader._load.__wrapped__("liblowrank_optim.so")
    assert library is not None or "not built" in reason or "another version" in reason
    assert not [name for name in opened if name.startswith(str(tmp_path)) or "/" not in name]
