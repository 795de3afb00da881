"""DCT-AdamW against straight-line code, and the facts about its memory, permutation and ages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import DCTAdamW, DCTAdamW8bit, lowrank_groups, memory
from lowrank_optim.ops.cosine import cosine_rows
from lowrank_optim.residuals.error_feedback import ErrorFeedback, Levels
from lowrank_optim.subspaces import DCT
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases, runs
from tests.compare import assert_close, relative
from tests.oracles.dct_adamw import dct_adamw
from tests.pairwise import in_turns, paired

CPU = torch.device("cpu")
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}
MEMORIES: dict[Any, str | None] = {None: None, 32: "float32", 8: "8bit", 4: "4bit"}


def train(start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, DCTAdamW]:
    weight = torch.nn.Parameter(start.clone())
    group = {"params": [weight], "rank": options.pop("rank", 4)}
    optimizer = DCTAdamW([group], **{"stagger": False, **HYPER, **options})
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        assert torch.equal(weight.grad, grad)
    return weight.detach(), optimizer


@pytest.mark.parametrize(
    ("shape", "gap", "feedback", "transform"),
    paired([(9, 14), (15, 7), (8, 8)], [1, 3], [*MEMORIES], ["matmul", "fft"]),
)
def test_the_oracle(shape: tuple[int, int], gap: int, feedback: Any, transform: str) -> None:
    """Seven steps of each side, gap, memory and evaluation, with both ranks of ages."""
    start, grads = cases.parameter(shape).detach(), cases.gradients(shape, 7)
    for own_age in (True, False):
        want, _ = dct_adamw(start, grads, rank=4, gap=gap, memory=feedback, own_age=own_age,
                            **HYPER)  # fmt: skip
        options = {"error_feedback": MEMORIES[feedback], "slot_bias_correction": own_age}
        got, _ = train(start, grads, update_proj_gap=gap, transform=transform, **options)
        # levels of 8 and 4 bits are kept in float32
        assert_close(got, want[-1], torch.float32 if feedback in (8, 4) else None)


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(2, 24),
    n=st.integers(2, 24),
    rank=st.integers(1, 30),
    gap=st.integers(1, 4),
    basis=st.sampled_from(["dct2", "dct3"]),
    ranking=st.sampled_from([1, 2]),
    side=st.sampled_from(["left", "right"]),
    transform=st.sampled_from(["matmul", "fft"]),
    seed=st.integers(0, 1000),
)
@pytest.mark.filterwarnings("ignore:rank")
def test_the_oracle_at_any_shape(
    m: int, n: int, rank: int, gap: int, basis: str, ranking: int, side: str, transform: str,
    seed: int,
) -> None:  # fmt: skip
    """Prime, odd and tiny lengths, ranks beyond the matrix, both bases, rankings and sides."""
    start, grads = cases.parameter((m, n)).detach(), cases.gradients((m, n), 5, seed=seed)
    want, _ = dct_adamw(start, grads, rank=rank, gap=gap, basis=basis, ranking=ranking, side=side,
                        **HYPER)  # fmt: skip
    got, _ = train(start, grads, rank=rank, update_proj_gap=gap, basis=basis,
                   ranking=f"l{ranking}", proj_type=side, transform=transform)  # fmt: skip
    assert_close(got, want[-1])


def test_the_settings_of_the_release() -> None:
    """Columns of the matrix, l1, moments that stay in their slots, the global step's bias."""
    for shape in [(9, 14), (15, 7)]:
        start, grads = cases.parameter(shape).detach(), cases.gradients(shape, 6)
        want, _ = dct_adamw(start, grads, rank=4, basis="dct3", ranking=1, carry=False,
                            own_age=False, **HYPER)  # fmt: skip
        weight = torch.nn.Parameter(start.clone())
        group = {"params": [weight], "rank": 4, "rotate_subspace": False, "use_ef": False,
                 "q_ef": False, "sim_type": "matmul", "ell_norm": 1, "basis": "dct3"}  # fmt: skip
        optimizer = DCTAdamW([group], slot_bias_correction=False, **HYPER)
        cases.run(optimizer, [weight], [[g] for g in grads])
        assert_close(weight, want[-1])


def test_keys_of_the_release() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    for use, bits, kept in [(True, False, "float32"), (True, 8, "8bit"), (True, 4, "4bit"),
                            (False, 8, None), (False, False, None)]:  # fmt: skip
        keys = {"use_ef": use, "q_ef": bits, "sim_type": "makhoul", "ell_norm": 2}
        group = DCTAdamW([{"params": [weight], "rank": 2, **keys}]).param_groups[0]
        assert group["error_feedback"] == kept
        assert (group["transform"], group["ranking"]) == ("fft", "l2")
    for key, value in [("q_ef", 3), ("sim_type", "dft"), ("ell_norm", 3), ("basis", "dct1"),
                       ("error_feedback", "2bit"), ("slot_bias_correction", 1)]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            DCTAdamW([{"params": [weight], "rank": 2, key: value}])


# ---------------------------------------------------------------- relations to AdamW


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_full_rank_is_adamw_in_cosine_coordinates(transform: str) -> None:
    """AdamW on Y = Q^T W with gradient Q^T G, and back."""
    start, grads = cases.parameter((8, 12)).detach(), cases.gradients((8, 12), 6)
    rows = cosine_rows(8, "dct2", torch.float64, CPU)
    y = torch.nn.Parameter(rows @ start)
    other = torch.optim.AdamW([y], foreach=False, **HYPER)
    for grad in grads:
        y.grad = rows @ grad
        other.step()
    got, _ = train(start, grads, rank=8, transform=transform)
    assert_close(got, rows.mT @ y.detach())


# ---------------------------------------------------------------- ages


def born(age_of_run: int, **options: Any) -> float:
    """The size of the update of a coefficient that appears after that many steps, over lr."""
    rows = cosine_rows(8, "dct2", torch.float64, CPU)
    quiet = torch.outer(rows[1], torch.ones(12, dtype=torch.float64))
    loud = 10 * torch.outer(rows[5], torch.ones(12, dtype=torch.float64))
    start = torch.zeros(8, 12, dtype=torch.float64)
    options = {"rank": 1, "betas": (0.9, 0.999), "weight_decay": 0.0, "lr": 1.0, **options}
    before, optimizer = train(start, [quiet] * age_of_run, **options)
    (weight,) = optimizer.param_groups[0]["params"]
    before = before.clone()
    weight.grad = loud
    optimizer.step()
    return float(((weight.detach() - before).mT @ rows[5]).abs().mean())


def test_an_index_corrects_the_bias_of_its_own_age() -> None:
    """Born at any step its first update has size 1; by the global step half at 10, 2.5 at 1000."""
    for age in (1, 10):
        assert born(age) == pytest.approx(1.0, rel=1e-6)
    t = 1001
    expected = 0.1 / (1 - 0.9**t) / (0.001 / (1 - 0.999**t)) ** 0.5
    assert expected == pytest.approx(2.5, abs=0.03)
    assert born(1000, slot_bias_correction=False) == pytest.approx(expected, rel=1e-5)


def test_moments_follow_their_index_as_stored() -> None:
    """Codes and scales of rows that stay are the same in a new place: nothing is rounded."""
    widths = {"float32": [300], "bfloat16": [300], "8bit": [300, 512], "4bit": [300, 301]}
    for dtype, width in ((dtype, width) for dtype, own in widths.items() for width in own):
        weight = torch.nn.Parameter(torch.zeros(40, width))
        group = {"params": [weight], "rank": 16, "proj_type": "left"}
        optimizer = DCTAdamW([group], state_dtype=dtype, betas=(1 - 2**-40, 1 - 2**-40))
        gen = torch.Generator().manual_seed(3)
        kept = []
        for _ in range(2):
            weight.grad = torch.randn(40, width, generator=gen)
            optimizer.step()
            kept.append({k: v.clone() for k, v in optimizer.state[weight].items()})
        (item,) = optimizer._items(optimizer.param_groups[0])
        chosen = optimizer._strategies(optimizer.param_groups[0])
        before, after = kept[0]["basis_index"].tolist(), kept[1]["basis_index"].tolist()
        assert 0 < len(set(before) & set(after)) < 16
        source = torch.tensor([before.index(i) if i in before else -1 for i in after])
        for slot in chosen.rule.slots((16, width)):
            key = f"low.{slot.name}"
            state = {k: v.clone() for k, v in kept[0].items()}
            assert chosen.store.move_rows_(state, key, slot, source)
            for name in (key, f"{key}_scale"):
                if name not in state:
                    continue
                old = kept[0][name].reshape(16, -1)
                for row, come in zip(state[name].reshape(16, -1), source.tolist(), strict=True):
                    if come >= 0:
                        assert torch.equal(row, old[come])
            read = chosen.store.read(state, key, slot, (16, width), item.param, dense=True)
            assert isinstance(read, Tensor)
            assert not bool(read[source < 0].any())


# ---------------------------------------------------------------- error feedback


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_nothing_of_a_gradient_is_lost(transform: str, rank: int) -> None:
    r"""``sum_t P_t P_t^T A_t + E_T = sum_t G_t``; at full rank the memory stays empty."""
    for shape in [(8, 13), (13, 8), (3, 8, 9)]:
        view = matrix_view(shape)
        assert view is not None
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        group = {"params": [weight], "rank": rank, "transform": transform}
        optimizer = DCTAdamW([group], error_feedback="float32", weight_decay=0.0)
        (item,) = optimizer._items(optimizer.param_groups[0])
        assert item.subspace is not None
        used = torch.zeros(*view.batch, view.m, view.n, dtype=torch.float64)
        total = used.clone()
        grads = cases.gradients(shape, 6)
        for grad in grads:
            error = optimizer.state[weight]["error"].mT.clone() if optimizer.state else 0 * used
            weight.grad = grad
            optimizer.step()
            (basis,) = item.subspace.bases(optimizer.state[weight], view)
            used += basis @ (basis.mT @ (view.of(grad) + error))
            total += view.of(grad)
        rest = optimizer.state[weight]["error"].mT
        assert_close(used + rest, total)
        assert (float(rest.abs().max()) < 1e-12) == (rank == 8)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "8bit", "4bit"])
def test_a_bad_gradient_does_not_poison_the_memory(kept: str) -> None:
    for shape, forced in [((6, 11), False), ((11, 6), True), ((2, 6, 8), True)]:
        with pytest.MonkeyPatch.context() as patch:
            if forced:
                cases.branching(patch, lambda tensor: True)
            weight = torch.nn.Parameter(cases.parameter(shape, torch.float32).detach())
            optimizer = DCTAdamW([{"params": [weight], "rank": 3}], error_feedback=kept)
            for grad in cases.gradients(shape, 3, torch.float32):
                weight.grad = grad
                optimizer.step()
            state = optimizer.state[weight]
            before = {k: v.clone() for k, v in state.items() if "step" not in k}
            old = weight.detach().clone()
            weight.grad = torch.full(shape, float("nan"))
            optimizer.step()
            assert torch.equal(weight, old)
            for key in before.keys() - {"postponed"}:
                assert torch.equal(state[key], before[key]), key


@pytest.mark.parametrize("on_device", [False, True])
def test_the_accelerators_path_of_the_memory(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without looking at values, on the CPU: the same memory and weights."""
    results = []
    for forced in (False, on_device):
        cases.branching(monkeypatch, lambda tensor, f=forced: f)
        for kept in ("float32", "8bit"):
            start, grads = cases.parameter((6, 11)).detach(), cases.gradients((6, 11), 6)
            grads[3] = grads[3] * float("nan")
            weight = torch.nn.Parameter(start.clone())
            optimizer = DCTAdamW([{"params": [weight], "rank": 3}], error_feedback=kept)
            for grad in grads:
                weight.grad = grad
                optimizer.step()
            results.append((weight.detach(), optimizer.state[weight]["error"].double()))
    for (a, e), (b, f) in zip(results[:2], results[2:], strict=True):
        assert_close(a, b)
        assert_close(e, f)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
    seed=st.integers(0, 100),
)
def test_levels(rows: int, k: int, bits: int, scale: float, seed: int) -> None:
    """Within half a step; in order; constant and zero rows exact; odd widths as even ones.

    The released 8-bit form divides by 15, and so uses 16 of 256 levels; its 4-bit form puts every
    value in another place.
    """
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * scale
    x[0] = x[0, 0]
    levels = Levels.zeros((rows, k), bits, CPU)
    assert not bool(levels.read(bits, k).any())
    levels.write_(x, bits)
    back = levels.read(bits, k)
    span = (x.amax(1) - x.amin(1)).unsqueeze(1)
    bound = span * (0.5 / (2**bits - 1)) + 4e-7 * x.abs().amax(1, keepdim=True)
    assert bool(((back - x).abs() <= bound).all())
    assert torch.equal(back[0], x[0])
    order = x.argsort(1)
    assert bool((back.gather(1, order).diff(dim=1) >= 0).all())
    assert levels.codes.numel() == rows * (k if bits == 8 else (k + 1) // 2)
    if bits == 8 and k > 30 and rows > 1:
        assert int(levels.codes[1].max()) == 255


@pytest.mark.parametrize("kept", ["bfloat16", "8bit", "4bit"])
def test_narrow_memories_follow_the_float32_one(kept: str) -> None:
    """What is lost in one step is what the format loses: the next steps make up for it."""
    start, grads = cases.parameter((24, 40)).detach(), cases.gradients((24, 40), 8)
    exact, _ = train(start, grads, error_feedback="float32", rank=6)
    none, _ = train(start, grads, rank=6)
    near, _ = train(start, grads, error_feedback=kept, rank=6)
    share = {"bfloat16": 0.15, "8bit": 0.15, "4bit": 0.6}[kept]
    assert relative(near, exact) < share * relative(none, exact)


def test_the_memory_holds_what_the_formula_says() -> None:
    """m n elements, and for levels two float32 a row of the projected dimension."""
    size = {"float32": 4 * 40 * 33, "bfloat16": 2 * 40 * 33}
    size |= {"8bit": 40 * 33 + 8 * 40, "4bit": 40 * 17 + 8 * 40}
    for kept, want in size.items():
        for shape in [(40, 33), (33, 40)]:
            view = matrix_view(shape)
            assert view is not None
            state = ErrorFeedback(kept).init(view, torch.empty(shape))
            assert memory.storage_bytes(state.values()) == want


# ---------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("state_dtype", "kept"),
    in_turns(["float32", "bfloat16", "8bit"], [None, "float32", "4bit"]),
)
def test_resumed_is_uninterrupted(kept: str | None, state_dtype: str) -> None:
    """Bit for bit, through ``torch.save`` and ``weights_only=True``, with bfloat16 weights too."""
    for dtype in (torch.float32, torch.bfloat16):
        shapes = [(24, 300), (300, 24), (2, 20, 40), (7,)]
        params = [torch.nn.Parameter(cases.parameter(s, dtype).detach()) for s in shapes]
        options: dict[str, Any] = {"error_feedback": kept, "state_dtype": state_dtype}
        options |= {"update_proj_gap": 2, "stochastic_rounding": dtype == torch.bfloat16}

        def optimizer_of(ps: list[Any], options: dict[str, Any] = options) -> DCTAdamW:
            return DCTAdamW([{"params": ps, "rank": 8, "transform": "fft"}], **options)

        rows = [[cases.gradients(s, 1, dtype, seed=i)[0] for s in shapes] for i in range(6)]
        first = optimizer_of(params)
        cases.run(first, params, rows[:3])
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        second = optimizer_of(others)
        second.load_state_dict(runs.through_a_file(first.state_dict()))
        copied = copy.deepcopy(first)
        assert copied.state_dict().keys() == first.state_dict().keys()
        for optimizer, ps in ((first, params), (second, others)):
            cases.run(optimizer, ps, rows[3:])
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        for p, q in zip(params, others, strict=True):
            for key, value in first.state[p].items():
                assert torch.equal(value, second.state[q][key]), key


def test_a_checkpoint_of_the_other_basis_is_refused() -> None:
    """Indices of cosines mean nothing among the columns."""
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.ones(8, 8)
    optimizer = DCTAdamW([{"params": [weight], "rank": 2}])
    optimizer.step()
    other = DCTAdamW([{"params": [weight], "rank": 2}], basis="dct3")
    with pytest.raises(ValueError, match="basis is dct2 there and dct3 here"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("cls", [DCTAdamW, DCTAdamW8bit])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_memory_by_storage_is_the_formula(cls: type[DCTAdamW], transform: str) -> None:
    """2 n r moments and r ages, r int32 indices, and one basis per width or O(m) for the FFT."""
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 768, bias=False), torch.nn.Linear(768, 512, bias=False),
        torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 256, bias=False),
    )  # fmt: skip
    rank = 64
    optimizer = cls(lowrank_groups(model, rank=rank, transform=transform))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = memory.report(optimizer)
    estimate = memory.estimate(
        model, cls, groups=lambda m: lowrank_groups(m, rank=rank, transform=transform)
    )
    assert (estimate.basis, estimate.moments, estimate.other) == held
    longer = [768, 768, 512, 512]
    each = [2 * rank * n * (4 if cls is DCTAdamW else 1) for n in longer]
    scales = [0 if cls is DCTAdamW else 2 * 4 * rank * -(-n // 256) for n in longer]
    assert held.moments == sum(each) + sum(scales) + 4 * 4 * rank
    widths = [512, 256]
    shared = sum(4 * n * n for n in widths)
    if transform == "fft":  # three int64, a sign, a root of unity; three complex factors of half
        shared = sum((3 * 8 + 4 + 8) * n + 3 * 8 * (n // 2 + 1) for n in widths)
    assert held.basis == 4 * 4 * rank + shared


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_mixed_widths_ranks_and_dtypes_in_one_model(transform: str) -> None:
    """The release has one basis, sized by the first matrix: any other width is an error there."""
    shapes = [(16, 64), (64, 64), (150, 64), (64, 16), (2, 12, 30), (6, 4, 3, 3), (9,), ()]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params = [torch.nn.Parameter(cases.parameter(s, dtype).detach()) for s in shapes]
        starts = [p.detach().clone() for p in params]
        grads = [[cases.gradients(s, 4, dtype, seed=i)[k] for i, s in enumerate(shapes)]
                 for k in range(4)]  # fmt: skip
        group = {"params": params, "rank": 5, "transform": transform}
        optimizer = DCTAdamW([group], **HYPER)
        cases.run(optimizer, params, grads)
        for k in range(4):
            if dtype == torch.bfloat16:
                continue
            want, _ = dct_adamw(starts[k].double(), [g[k].double() for g in grads], rank=5,
                                **HYPER)  # fmt: skip
            assert_close(params[k], want[-1], dtype)
        assert all(bool(p.isfinite().all()) for p in params)


def test_stochastic_rounding_of_the_fast_apply_has_no_bias() -> None:
    """Updates of a thousandth of an ulp move bfloat16 weights by their mean."""
    weight = torch.nn.Parameter(torch.full((64, 256), 1.0, dtype=torch.bfloat16))
    sub = DCT(64, transform="fft", update_proj_gap=1)
    assert sub.fast(64, weight)
    group = {"params": [weight], "rank": 64, "proj_type": "left", "transform": "fft"}
    optimizer = DCTAdamW([group], lr=1e-5, weight_decay=0.0, stochastic_rounding=True)
    rows = cosine_rows(64, "dct2", torch.float32, CPU)
    for _ in range(100):
        weight.grad = (rows.sum(0, keepdim=True).mT @ torch.ones(1, 256)).bfloat16()
        optimizer.step()
    # every coefficient moves by lr a step: the weights by lr times the sum of the rows
    want = 1.0 - 1e-3 * float(rows.sum(0).mean())
    assert float(weight.detach().double().mean()) == pytest.approx(want, abs=2e-4)
