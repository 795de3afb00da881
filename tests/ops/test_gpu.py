"""What only an accelerator can show: kernels on it, graph capture, no waiting for it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from lowrank_optim import DCTAdamW, GaLoreAdamW, LowRankOptimizer, attach_in_backward
from lowrank_optim.memory import report
from lowrank_optim.ops import cosine, cublas, dispatch, fuses_cosine, mixed_matmul, reads_factors
from lowrank_optim.ops.schema import SCHEMAS
from tests.compare import assert_close
from tests.ops import ops_cases as cases
from tests.ops import ops_cosines, ops_factors
from tests.ops.checks import check, check_stored, run
from tests.runs import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
KERNELS = ["triton", "native"]
BITWISE = ["quantize_blockwise_", "stochastic_round_"]
"""Integer arithmetic, or float32 arithmetic without a sum: the same bits on every backend."""


def force(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend, or a skip with the reason why it is not there."""
    ready, reason = dispatch.available(backend, DEVICE)
    if not ready:
        pytest.skip(f"{backend}: {reason}")
    monkeypatch.setenv(dispatch.VARIABLE, backend)


@pytest.mark.parametrize("op", [op for op in SCHEMAS if op not in BITWISE])
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_ops(backend: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op on the device against float64 code, as on the CPU; gradients by columns, too."""
    force(backend, monkeypatch)
    run(op, cases.on(DEVICE, cases.example(op)))
    if op in cases.ELEMENTWISE + cases.BITS8:
        run(op, cases.on(DEVICE, cases.elementwise(op, torch.bfloat16, how="columns")))
    elif op in cases.APPLIES or op == "column_norms":
        unsound = None if op == "column_norms" else 3
        for dtype in (torch.float32, torch.bfloat16):
            a = cases.on(DEVICE, cases.matrices(op, dtype, how="columns", unsound=unsound))
            before = [w.clone() for w in a.get("params", [])]
            run(op, a)
            assert all(
                torch.equal(x, w) for x, w in zip(before[3:], a.get("params", [])[3:], strict=True)
            )


@pytest.mark.skipif(torch.version.hip is not None, reason="cuBLAS is NVIDIA's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["rows", "columns", "slice"])
def test_products_read_their_factors_there(
    how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By cuBLAS; those of a graph at its replay; and torch's next product reads its own."""
    force("triton", monkeypatch)
    assert cublas.available() == (True, "ok")
    a = cases.on(DEVICE, ops_factors.arguments("addmm_", dtype, how=how))
    full = [n for n, w in enumerate(a["params"]) if w.numel()]
    a = {k: [xs[n] for n in full] for k, xs in a.items()}
    assert all(reads_factors(w) for w in a["params"])
    run("addmm_", cases.on(DEVICE, a))
    before = [w.clone() for w in a["params"]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cases.call("addmm_", a)
    for w, old, step, decay in zip(a["params"], before, a["steps"], a["decays"], strict=True):
        w.copy_(old)
        step.mul_(-0.5)
        decay.mul_(0.25)
    want = cases.expected("addmm_", a)["params"]
    graph.replay()
    for w, one in zip(a["params"], want, strict=True):
        check(w, one, f"replayed: {tuple(w.shape)}")
    x = torch.randn(8, 8, device=DEVICE, dtype=dtype)
    assert torch.equal(torch.mm(x, torch.eye(8, device=DEVICE, dtype=dtype)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["rows", "columns", "slice"])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("op", ops_cosines.COSINES)
def test_cosines(
    op: str, basis: str, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of length, among them primes, of which cuFFT makes convolutions; several tiles."""
    force("triton", monkeypatch)
    for n in (1, 2, 12, 35, 64, 97, 131, 256, 509):
        flag = n % 2 == 0
        keys = {"by_row": flag, "moved": flag, "ranking": ("l1", "l2")[flag]}
        a = ops_cosines.arguments(op, dtype, n=n, how=how, basis=basis, **keys)
        with monkeypatch.context() as patch:
            if n == 131:  # as what is too large for one transform
                patch.setattr(cosine, "TILE_ELEMENTS", dict.fromkeys((False, True), 40 * n))
            run(op, cases.on(DEVICE, a))


def test_an_unsound_lift_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    force("triton", monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        for basis in ("dct2", "dct3"):
            own = ops_cosines.arguments("cosine_lift_add_", dtype, basis=basis, unsound=2)
            a = cases.on(DEVICE, own)
            before = [w.clone() for w in a["params"]]
            run("cosine_lift_add_", a)
            same = [torch.equal(w, old) for w, old in zip(a["params"], before, strict=True)]
            assert same == [False, False, True, False]


def test_scores_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No atomics: the order in which programs run changes no bit."""
    force("triton", monkeypatch)
    a = cases.on(DEVICE, ops_cosines.arguments("cosine_scores", torch.float32, n=384,
                                               widths=(3000, 1)))  # fmt: skip
    assert fuses_cosine(a["grads"][0], 384)
    first = cases.call("cosine_scores", a)
    assert first is not None
    for _ in range(10):
        again = cases.call("cosine_scores", a)
        assert again is not None
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("op", BITWISE)
@pytest.mark.parametrize("backend", KERNELS)
def test_bits_equal_those_of_the_reference(
    backend: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(backend, monkeypatch)
    arguments = cases.storage(op, torch.float32)
    here, there = cases.on("cpu", arguments), cases.on(DEVICE, arguments)
    cases.call(op, there)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    cases.call(op, here)
    for name in ("codes", "scales", "outs"):
        for a, b in zip(here.get(name, []), there.get(name, []), strict=True):
            assert torch.equal(a, b.cpu()), name
    if op == "quantize_blockwise_":
        for x, c, s in zip(here["xs"], here["codes"], here["scales"], strict=True):
            check_stored(c, s, x.double(), True, op)


@pytest.mark.parametrize("shape", [(64, 96), (301, 97), (3, 40, 70)])
def test_products_of_two_formats(shape: tuple[int, ...]) -> None:
    """By matrix units of bfloat16, and as good as those of float32."""
    grad = torch.randn(shape, device=DEVICE).bfloat16()
    a = torch.randn(*shape[:-2], 13, shape[-2], device=DEVICE)
    b = torch.randn(*shape[:-2], shape[-1], 13, device=DEVICE)
    for x, y in ((a, grad), (grad, b)):
        exact = x.double() @ y.double()
        found = mixed_matmul(x, y)
        assert found.dtype == torch.float32
        assert float((found - exact).norm()) < 2**-15 * float(exact.norm())


METHODS = {"svd": GaLoreAdamW, "cosines": DCTAdamW}


def training(
    method: str = "svd", **options: Any
) -> tuple[list[torch.nn.Parameter], LowRankOptimizer]:
    """One step past the refresh: the next ones only project, adapt and apply."""
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape in SHAPES.values():
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
        param.grad = torch.randn(shape, generator=generator).to(DEVICE)
        params.append(param)
    own = {"transform": "fft"} if method == "cosines" else {}
    options = {"lr": 1e-2, **options}
    optimizer = METHODS[method](params, rank=3, update_proj_gap=10**6, **own, **options)
    for _ in range(2):  # refreshes, then compiles and loads what a step without one needs
        optimizer.step()
    torch.cuda.synchronize()
    return params, optimizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", KERNELS)
def test_replay_of_a_captured_step_is_the_eager_step(
    backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several replays, each of the step that the device has counted, with the rate of the day.

    Gradients are read where they lie. ``tests/engine/test_capture.py`` is the same without a GPU.
    """
    force(backend, monkeypatch)
    lr = torch.tensor(1e-2, device=DEVICE)
    (params, optimizer), (others, eager) = (
        training(method, lr=lr, capturable=True),
        training(method),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        optimizer.step()
    for replay in range(3):
        eager.param_groups[0]["lr"] = 1e-2 / (1 + replay)
        lr.fill_(1e-2 / (1 + replay))
        for p, q in zip(params, others, strict=True):
            assert p.grad is not None and q.grad is not None
            q.grad.normal_()
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
        for a, b in zip(params, others, strict=True):
            assert_close(a.cpu(), b.cpu())
    assert optimizer.state[params[0]]["step"] == eager.state[others[0]]["step"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_a_step_without_a_refresh_never_waits(
    backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host runs ahead of the device: steps ask it nothing, non-finite gradients included."""
    force(backend, monkeypatch)
    params, optimizer = training(method)
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.nan
    before = [p.detach().clone() for p in params]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [False] + [True] * (len(params) - 1)


@pytest.mark.parametrize("projector", ["dct", "hadamard", "random", "rows", "columns"])
def test_a_refresh_never_waits_either(projector: str) -> None:
    """But for ``eigh`` and ``svd``; on a CPU ``tests/engine/test_waits.py`` counts those too."""
    params, _ = training()
    options = {"projector": projector, "rank": 3, "update_proj_gap": 1}
    optimizer = GaLoreAdamW(params, lr=1e-2, **options)
    for _ in range(3):  # compiles, and knows that there is a basis
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [None, "project", "step"])
def test_what_is_dropped_frees_its_memory(mode: Any) -> None:
    """A notebook makes one optimizer after another: none may hold what those before it held."""

    def train() -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4))).to(DEVICE)
        optimizer = GaLoreAdamW(model.named_parameters(), rank=8, update_proj_gap=2)
        if mode is not None:
            attach_in_backward(optimizer, mode, max_norm=1.0)
        for _ in range(4):
            model(torch.randn(8, 512, device=DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):  # loads kernels, and makes the workspaces of libraries
        train()
        gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        train()
        gc.collect()
    # of what launches keep, tables of addresses, there are 2 MiB at most; of weights here 4
    assert torch.cuda.memory_allocated() <= before + 2**21


@pytest.mark.parametrize("mode", [None, "project", "step"])
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_moments_in_host_memory(state_dtype: str, mode: Any) -> None:
    """Pinned between steps, the same bits as those on the device, and of it two buffers alone."""
    made = []
    for where in (None, "cpu"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(6)))
        model = model.to(DEVICE)
        optimizer = GaLoreAdamW(
            model.named_parameters(), lr=1e-2, rank=64, update_proj_gap=3, on_refresh="project",
            state_dtype=state_dtype, state_device=where,
        )  # fmt: skip
        if mode is not None:
            attach_in_backward(optimizer, mode)
        for number in range(8):
            generator = torch.Generator(DEVICE).manual_seed(number)
            x = torch.randn(64, 512, device=DEVICE, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append((model, optimizer))
    states = [[*optimizer.state.values()] for _, optimizer in made]
    for plain, hosted in zip(*states, strict=True):
        assert plain.keys() == hosted.keys()
        for key, x in hosted.items():
            assert torch.equal(x.to(plain[key].device), plain[key]), key
            if key.startswith("low.exp_avg"):
                assert x.is_cpu and x.is_pinned(), key
            else:
                assert x.device == plain[key].device, key
    for a, b in zip(*(model.parameters() for model, _ in made), strict=True):
        assert torch.equal(a, b)
    held = report(made[1][1])
    assert held.host == held.moments and held.staging > 0
