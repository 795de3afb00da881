"""What a registry is given: what is inside, and the wheel alone where there is no compiler.

`make test-wheel` takes a folder with sdist and wheel (WHEEL, else `make wheel` fills one), the
release of torch (TORCH, else this environment's) and the interpreter (PYTHON, else this one's).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_optim
from lowrank_optim.ops import native
from lowrank_optim.ops.native import loader

ROOT = Path(__file__).parents[2]
NAME = f"lowrank_optim-{lowrank_optim.__version__}"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make", "nvcc")
QUICK = ("test_native", "test_8bit", "test_fake", "test_compile", "test_torch_conventions")
TRAIN = """
import hashlib, json, torch, lowrank_optim
from lowrank_optim.ops import native
torch.set_num_threads(1)
torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
optimizer = lowrank_optim.GaLoreAdamW8bit(
    model.named_parameters(), lr=1e-2, rank=32, update_proj_gap=5
)
x, y = torch.randn(64, 256), torch.randn(64, 256)
losses = []
for _ in range(20):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
codes = sum(t.numel() for t in tensors if t.dtype == torch.uint8)
kernels = native.available("cpu")[0]
print(json.dumps([lowrank_optim.__file__, kernels, losses, digest, codes]))
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Its output; where it fails, all it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=None if env is None else dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and a wheel; made by a build that says no warning."""
    if given := os.environ.get("WHEEL"):
        return (ROOT / given).resolve()
    if shutil.which("make") is None or not sys.platform.startswith("linux"):
        pytest.skip("make wheel needs make and Linux")
    folder = tmp_path_factory.mktemp("dist")
    said = run("make", "wheel", f"DIST={folder}", cwd=ROOT)
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    assert not warnings, "the build warns:\n" + "\n".join(warnings)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob(f"{NAME}-*.whl")
    return path


def test_sdist_has_what_builds_and_tests(dist: Path) -> None:
    """csrc, the package, tests and what they read; nothing that a build left behind."""
    with tarfile.open(dist / f"{NAME}.tar.gz") as file:
        names = {name.removeprefix(f"{NAME}/") for name in file.getnames()}
    for folder in ("csrc", "lowrank_optim", "tests", "benchmarks", "docs", ".github"):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.is_file() and not {"__pycache__", "_native"} & set(relative.parts):
                assert str(relative) in names, f"the sdist lacks {relative}"
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile"} <= names
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc", ".whl"))]


def test_wheel_is_what_a_registry_takes(wheel: Path) -> None:
    """A manylinux tag; csrc's library, and no other library beside it.

    `py3-none` holds as the library is opened by ctypes and knows no Python: no symbol of Python's,
    no dependency on libpython. Of OpenMP it knows names alone, which torch's runtime gives: were
    libgomp a dependency, or in the wheel, there would be two runtimes in a process.
    """
    from elftools.elf.elffile import ELFFile  # comes with auditwheel

    *_, python, abi, platforms = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert all(p.startswith("manylinux_") for p in platforms.split(".")), wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        libraries = {n for n in names if ".so" in Path(n).name}
        assert "lowrank_optim/_native/liblowrank_optim.so" in libraries
        assert libraries <= {
            f"lowrank_optim/_native/liblowrank_optim{half}.so" for half in ("", "_cuda")
        }
        assert {n.split("/")[0] for n in names} == {"lowrank_optim", f"{NAME}.dist-info"}
        for name in libraries:
            with file.open(name) as opened:
                dynamic: Any = ELFFile(opened).get_section_by_name(".dynamic")
                needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
            assert not [n for n in needed if n.startswith(("libgomp", "libomp", "libpython"))]
            with file.open(name) as opened:
                symbols: Any = ELFFile(opened).get_section_by_name(".dynsym")
                unknown = {s.name for s in symbols.iter_symbols() if s["st_shndx"] == "SHN_UNDEF"}
            assert not [s for s in unknown if s.startswith(("Py", "_Py"))]
            if name.endswith("optim.so"):
                assert "GOMP_parallel" in unknown, "built without OpenMP: one thread"
        assert file.read("lowrank_optim/py.typed") == b""
        assert f"{NAME}.dist-info/licenses/LICENSE" in names


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, torch and what tests need."""
    base = os.environ.get("PYTHON") or getattr(sys, "_base_executable", sys.executable)
    release = os.environ.get("TORCH") or torch.__version__.partition("+")[0]
    folder = tmp_path_factory.mktemp("environment")
    run(base, "-m", "venv", folder, cwd=folder)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    tools = [p for p in pins if p.split("==")[0] in {"pytest", "hypothesis", "numpy", "scipy"}]
    path = folder / "bin" / "python"
    pip = (path, "-m", "pip", "install", "-q", "--only-binary", ":all:")
    run(*pip, wheel, f"torch=={release}", *tools, cwd=folder)
    return path


@pytest.fixture(scope="module")
def bare(python: Path) -> dict[str, str]:
    """The environment of a process that finds that interpreter and no compiler."""
    env = {k: v for k, v in os.environ.items() if k not in {"CC", "CXX", "CUDA_HOME", "PYTHONPATH"}}
    env = {k: v for k, v in env.items() if not k.startswith("LOWRANK_OPTIM_")}
    env |= {"PATH": str(python.parent), "OMP_NUM_THREADS": "1"}
    assert not [c for c in COMPILERS if shutil.which(c, path=env["PATH"])]
    return env


def test_kernels_are_there(python: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """`python -m lowrank_optim.ops` says that native serves the CPU."""
    said = run(python, "-m", "lowrank_optim.ops", cwd=tmp_path, env=bare).splitlines()
    assert "cpu, float32: native" in said
    assert any(line.split()[:2] == ["native", "yes"] for line in said)


def test_command_is_there(python: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """`lowrank-optim`, with nothing but what the wheel requires: a known model needs no more.

    Its figures are README's, which `tests/memory/test_memory.py` recomputes.
    """
    command = python.parent / "lowrank-optim"
    arguments = ("memory", "--model", "llama-7b", "--rank", "1024", "--json")
    said = json.loads(run(command, *arguments, cwd=tmp_path, env=bare))
    row = next(row for row in said["rows"] if row["name"] == "GaLore 8-bit")
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = [x for x in table.splitlines() if x.startswith("| GaLore 8-bit |")]
    peaks = [x.strip(" *") for x in shown.strip("|").split("|")[3:]]
    assert [f"{x['peak'] / 2**30:.2f}" for x in row["peaks"]] == peaks
    assert "cpu, float32: native" in run(command, "ops", cwd=tmp_path, env=bare)


def test_trains_as_the_tree_does(python: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """20 steps of 8-bit GaLore: weights and state bit for bit those of these sources and library.

    Both with the torch of that environment, whose matrix products are its own.
    """
    (folder,) = {p.parent for p in loader._paths("liblowrank_optim.so") if p.is_file()}
    tree = {"PYTHONPATH": str(ROOT), "LOWRANK_OPTIM_LIBRARY": str(folder)}
    installed, *of_wheel = json.loads(run(python, "-c", TRAIN, cwd=tmp_path, env=bare))
    source, *of_tree = json.loads(run(python, "-c", TRAIN, cwd=tmp_path, env=bare | tree))
    assert Path(installed).is_relative_to(python.parents[1]) and Path(source).is_relative_to(ROOT)
    assert native.available("cpu")[0]
    kernels, losses, _, codes = of_wheel
    assert kernels and codes > 0 and losses[-1] < 0.8 * losses[0]
    assert of_wheel == of_tree


def test_suite_on_the_installed_package(python: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """Some of the suite from a folder where the sources are not."""
    for folder in ("tests", "benchmarks"):  # which tests measure with
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    where = run(
        python, "-c", "import lowrank_optim as l; print(l.__file__)", cwd=tmp_path, env=bare
    )
    assert Path(where.strip()).is_relative_to(python.parents[1])
    found = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    files = [str(found[name].relative_to(ROOT)) for name in QUICK]
    options = ("-p", "no:cacheprovider", "-W", "ignore", "-rs", *files)
    said = run(python, "-m", "pytest", *options, cwd=tmp_path, env=bare)
    assert " passed" in said
    print(said.splitlines()[-1])
