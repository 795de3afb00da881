"""Moments in 4 bits: what is kept, what an update computes, and how it survives a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.allocations import allocations
from lowrank_optim import GaLoreAdamW, SwitchLoRAAdamW, attach_in_backward, memory, ops
from lowrank_optim.nn import convert
from lowrank_optim.ops import Noise, quant, quant4
from lowrank_optim.rules.base import Slot
from lowrank_optim.stores import STORES
from lowrank_optim.tensors.alive import Alive
from tests import cases, runs
from tests.compare import assert_close
from tests.oracles import four_bits
from tests.stores.shapes import SHAPES
from tests.stores.test_8bit import ALIKE, CLAUSES, matrices, regression

STORE = STORES["4bit"]
KINDS = {"signed": Slot("m", signed=True), "squares": Slot("v", signed=False)}


def kept(x: Tensor, slot: Slot, seed: int = 0) -> dict[str, Tensor]:
    """A moment of these values."""
    state: dict[str, Tensor] = {}
    STORE.alloc(state, slot.name, slot, x.shape, x)
    STORE.write_(state, slot.name, slot, x, Noise.over(seed, x.shape))
    return state


def decoded(state: dict[str, Tensor], slot: Slot, shape: Any) -> Tensor:
    x = STORE.read(state, slot.name, slot, shape, torch.zeros(1), dense=True)
    assert isinstance(x, Tensor) and x.is_contiguous()
    return x.double()


def values(shape: Any, slot: Slot, seed: int = 0) -> Tensor:
    """Over four decades, some of them 0, and a block that is all 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= 10 ** (4 * torch.rand(shape, generator=generator) - 4)
    x *= torch.rand(shape, generator=generator) > 0.1
    x.view(-1, shape[-1])[0, :128] = 0
    return x if slot.signed else x.square()


@pytest.mark.parametrize("cols", [1024, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_take_what_is_followed(kind: str, cols: int) -> None:
    """torch's allocator counts what estimates do, and a write no more than is asked for before.

    To index with int32 is to copy all places in int64, within an operation that nobody looks into.
    """
    slot = KINDS[kind]
    x = values((256, cols), slot)
    state = kept(x, slot)

    def write() -> None:
        STORE.write_(state, slot.name, slot, x, Noise.over(0, x.shape))

    def read() -> None:
        STORE.read(state, slot.name, slot, x.shape, x)

    taken = []
    for work in (write, read):
        alive = Alive()
        alive.leave_out([x, *state.values()])
        with alive:
            work()
        taken.append(allocations(work).peak)
        assert taken[-1] == pytest.approx(alive.most, rel=0.01)
    _, asked = STORE.passing(slot, x.shape, x)
    assert taken[0] <= 4 * asked + 1024


def test_the_maps_are_those_of_the_paper() -> None:
    """Zero is a signed value and no square."""
    for signed, want in ((True, four_bits.SIGNED), (False, four_bits.SQUARES)):
        assert_close(quant4.four_bit_map(signed, torch.device("cpu")), want.float())
    assert (four_bits.SQUARES > 0).all() and (four_bits.SIGNED == 0).sum() == 1


def beside(x: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """The two values that may be kept of each entry, the lesser first."""
    table = four_bits.SIGNED if slot.signed else four_bits.SQUARES
    ends = [four_bits.kept(x.double(), table, way) for way in (torch.floor, torch.ceil)]
    return torch.minimum(*ends), torch.maximum(*ends)


def assert_beside(got: Tensor, x: Tensor, slot: Slot) -> None:
    """Each entry is one of the two, up to float32's rounding."""
    low, high = beside(x, slot)
    near = [(got - end).abs() <= 1e-5 * end.abs() for end in (low, high)]
    # float32 may see a value that is a code's on the other side of it
    level, _ = four_bits.levels(x.double(), four_bits.SIGNED if slot.signed else four_bits.SQUARES)
    at_a_code = (level - level.round()).abs() < 1e-4
    assert bool((near[0] | near[1] | at_a_code).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_value_takes_one_of_the_two_codes_beside_it(shape: tuple[int, ...], kind: str) -> None:
    """Zeros that are signed, and the largest of a block, are exact; no positive square is 0."""
    slot = KINDS[kind]
    x = values(shape, slot)
    got = decoded(kept(x, slot), slot, shape)
    _, scale = four_bits.levels(x.double(), four_bits.SQUARES)
    assert_beside(got, x, slot)
    # the widest gap of a map: from one square to the next, or from 0.2125 to 0.4375
    assert bool(((got - x).abs() <= (0.2251 if slot.signed else 0.0626) * scale.abs()).all())
    assert torch.equal(got[x == scale], x[x == scale].double())
    assert not bool(got[scale == 0].any())
    if slot.signed:
        assert not bool(got[x == 0].any())
    else:
        assert bool((got[x > 0] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_what_is_kept_is_the_value(kind: str) -> None:
    """Between the ends of the map, over 400 draws: within five and a half standard errors."""
    slot = KINDS[kind]
    x = torch.rand(8, 600).clamp_(min=0.07)
    if slot.signed:
        x *= torch.where(torch.rand(x.shape) < 0.5, -0.88, 1.0)
    x[:, ::128] = 1
    every = torch.stack([decoded(kept(x, slot, seed), slot, x.shape) for seed in range(400)])
    low, high = beside(x, slot)
    error = every.mean(0) - x
    spread = ((x - low) * (high - x)).clamp(min=0).sqrt()
    assert bool((error.abs() <= 5.5 * spread / 20 + (high - low) / 150 + 1e-6).all())
    assert float(error.mean().abs()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales(kind: str) -> None:
    """Denormals and infinities: nothing becomes NaN, and no square 0."""
    slot = KINDS[kind]
    for scale in (1e-45, 1e-42, 1e-38, 1e38, math.inf):
        x = torch.rand(32, 128).add_(0.5)
        x[:, 0] *= scale
        x[:, 1:] *= min(scale, 1e38)
        got = decoded(kept(x, slot), slot, x.shape)
        assert bool(got.isfinite().all())
        assert slot.signed or bool((got > 0).all())
    lost = kept(torch.full((32, 128), math.nan), slot)
    assert bool(decoded(lost, slot, (32, 128)).isnan().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_kept_is_kept_again(shape: tuple[int, ...], kind: str) -> None:
    """To the bit, whatever the noise; several tensors and tiles of them as one by one."""
    slot = KINDS[kind]
    xs = [values(shape, slot, seed) for seed in range(3)]
    states = [kept(x, slot, seed) for seed, x in enumerate(xs)]
    for state in states:
        x = decoded(state, slot, shape).float()
        again = kept(x, slot, 17)
        assert all(torch.equal(again[key], state[key]) for key in state)
    with pytest.MonkeyPatch.context() as patch:
        for size in (700, 1 << 24):
            patch.setattr(ops.tiles, "TILE_ELEMENTS", size)
            others = [{k: v.clone() for k, v in kept(x, slot, 9).items()} for x in xs]
            noises = [Noise.over(seed, shape) for seed in range(3)]
            STORE.write_all_(others, slot.name, slot, xs, noises)
            read = STORE.read_all(others, slot.name, slot, shape, xs)
            for other, state, x in zip(others, states, read, strict=True):
                assert all(torch.equal(other[key], state[key]) for key in state)
                assert isinstance(x, Tensor)
                assert torch.equal(x.double(), decoded(state, slot, shape))


def formula(shape: tuple[int, ...], slots: int) -> int:
    """Bytes: half a one per element, and four for each 128 of a row."""
    numel, cols = math.prod(shape), shape[-1]
    if numel < 4096 or cols < 2:
        return slots * 4 * numel
    return slots * numel // cols * (-(-cols // 2) + 4 * -(-cols // 128))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bytes_are_the_formula(shape: tuple[int, ...]) -> None:
    """By storage, projected and dense; the estimate and the report say the same."""
    assert formula((1024, 4096), 1) == 0.53125 * 1024 * 4096

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))
            self.small = nn.Parameter(torch.randn(15, 17))
            self.column = nn.Parameter(torch.randn(5000, 1))

    model = Model()
    for options in ({"rank": None}, {"rank": 13}, {"rank": 0.9, "proj_type": "full"}):

        def groups(m: nn.Module, options: dict[str, Any] = options) -> list[dict[str, Any]]:
            return [{"params": list(m.parameters()), **options}]

        found = memory.estimate(model, GaLoreAdamW, groups=groups, state_dtype="4bit")
        optimizer = GaLoreAdamW(groups(model), state_dtype="4bit")
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        held = memory.report(optimizer)
        assert (found.basis, found.moments, found.other) == held
        want = 0
        for item in optimizer._items(optimizer.param_groups[0]):
            coords = {"": tuple(item.param.shape)}
            if item.subspace is not None:
                assert item.view is not None
                coords = item.subspace.coord_shapes(item.view)
            want += sum(formula(s, 2) for s in coords.values())
        assert held.moments == want


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_is_decode_update_encode(shape: tuple[int, ...]) -> None:
    """Dense AdamW beside the oracle: weights, and both moments up to the draw."""
    param = nn.Parameter(torch.randn(shape))
    group = {"params": [param], "rank": None}
    optimizer = GaLoreAdamW([group], lr=0.01, weight_decay=0.0, state_dtype="4bit")
    slots = Slot("exp_avg", signed=True), Slot("exp_avg_sq", signed=False)
    m = v = torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 4):
        before, grad = param.detach().double(), torch.randn(shape)
        param.grad = grad.clone()
        optimizer.step()
        w, m, v = four_bits.adamw(before, grad.double(), m, v, step, 0.01)
        assert_close(param.detach().double(), w, torch.float32)
        got = [decoded(optimizer.state[param], slot, shape) for slot in slots]
        for x, own, slot in zip(got, (m, v), slots, strict=True):
            assert_beside(x, own, slot)
        m, v = got


# ---------------------------------------------------------------- what the choices are for


def ended(**patched: Any) -> tuple[float, float]:
    """Last loss of 100 steps in float32 and in 4 bits, of projected moments."""
    options = {"lr": 3e-3, "scale": 1.0, "update_proj_gap": 20}

    def make(state_dtype: str) -> Callable[..., Any]:
        def cls(params: Any, **own: Any) -> GaLoreAdamW:
            group = {"params": list(params), "rank": 40}
            return GaLoreAdamW([group], state_dtype=state_dtype, **own)

        return cls

    first, full = regression(make("float32"), 0, **options)
    assert full < 0.5 * first
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patched.items():
            patch.setattr(quant4, name, value)
        return full, regression(make("4bit"), 0, **options)[1]


@pytest.mark.slow  # of 8 bits the default run has it, and of 4 bits what follows
def test_training_ends_near_float32() -> None:
    """Within 15 %; far from it where squares may become 0, as in a map that has a 0."""
    full, low = ended()
    assert low == pytest.approx(full, rel=0.15) and low != full
    pairs, packed = quant4._pairs, quant4._pairs(False, torch.device("cpu"))
    with_zero = (packed - 1 / 16) * 16 / 15
    full, low = ended(_pairs=lambda signed, device: pairs(True, device) if signed else with_zero)
    assert not low < 1.5 * full


def test_second_moments_follow_gradients_that_change() -> None:
    """From several sizes to one, over 300 steps of beta2 = 0.99: squared logarithm in the mean.

    To the nearest code nothing that one step adds is seen, but of the largest of a block: the
    others keep their proportion to the first gradients.
    """

    def found(draw: Any = None) -> float:
        torch.manual_seed(0)
        param = nn.Parameter(torch.zeros(32, 128))
        group = {"params": [param], "rank": None}
        optimizer = GaLoreAdamW([group], betas=(0.9, 0.99), state_dtype="4bit")
        sizes = 0.3 + torch.rand(32, 128)
        with pytest.MonkeyPatch.context() as patch:
            if draw is not None:
                patch.setattr(quant4, "put_all_", draw)
            for step in range(350):
                param.grad = torch.randn(32, 128).sign() * (sizes if step < 50 else 1.0)
                optimizer.step()
        v = decoded(optimizer.state[param], Slot("exp_avg_sq", signed=False), (32, 128))
        return float((v / (1 - 0.99**350)).log().square().mean())

    def nearest(outs: list[Tensor], xs: list[Tensor], noises: Any) -> None:
        torch._foreach_copy_(outs, [x.round() for x in xs])

    assert found() < 0.05
    assert found(nearest) > 0.2


def test_a_momentum_of_one_sign_is_kept_whichever_it_is() -> None:
    """With scales that have no sign its largest would lose 11 % at each write: there is no -1."""
    x = torch.linspace(0.1, 1, 4096).view(32, 128)
    slot = KINDS["signed"]
    up, down = (decoded(kept(sign * x, slot), slot, x.shape) for sign in (1, -1))
    assert torch.equal(up, -down)


# ---------------------------------------------------------------- rows, refreshes, runs


def test_rows_begin_again_as_zeros_and_no_other_changes() -> None:
    """Of both moments: each block lies in one row, so that a scale of 0 makes it 0."""
    for slot in KINDS.values():
        x = values((64, 99), slot, 3)
        state = kept(x, slot)
        before = decoded(state, slot, x.shape)
        for kept_rows, zero in STORE.restarting(state, slot.name, slot):
            kept_rows[..., 5:9, :].fill_(zero)
        after = decoded(state, slot, x.shape)
        assert not bool(after[5:9].any()) and bool(before[5:9].any())
        assert torch.equal(after[:5], before[:5]) and torch.equal(after[9:], before[9:])


def test_switched_candidates_begin_with_moments_of_zero() -> None:
    """SwitchLoRA resets rows of moments in the middle of a run; it ends near float32's."""
    ends = {}
    for state_dtype in ("float32", "4bit"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 64))
        convert(net, "switchlora", rank=32)
        optimizer = SwitchLoRAAdamW(net.parameters(), lr=5e-3, interval=10, state_dtype=state_dtype)
        x = torch.randn(64, 128)
        y = torch.tanh(x[:, :64])
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
        ends[state_dtype] = float(loss.detach())
    assert ends["4bit"] == pytest.approx(ends["float32"], rel=0.1)
    assert ends["4bit"] != ends["float32"]


@pytest.mark.parametrize("method", ["GaLoreAdamW", "FiraAdamW"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_nan_gradient_leaves_codes_and_scales(
    method: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's path and on an accelerator's, which selects."""
    if forced:
        cases.branching(monkeypatch, lambda tensor: True)
    params = matrices(torch.float32)
    optimizer = cases.build(method, params, state_dtype="4bit", rank=16, weight_decay=0.1)
    runs.train(params, optimizer, range(2))
    before = [{k: v.clone() for k, v in e.items()} for e in runs.entries(optimizer)]
    weights = runs.copies(params)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    runs.assert_same(params, weights)
    for old, new in zip(before, runs.entries(optimizer), strict=True):
        assert int(new["step"]) == int(old["step"]) + 1
        assert all(torch.equal(new[k], old[k]) for k in old if k != "step")


@pytest.mark.parametrize(
    ("clause", "name"),
    [
        pytest.param(
            clause,
            name,
            id=f"{name}-{clause.__name__}",
            marks=pytest.mark.slow
            if (i + j) % 4
            or name in ALIKE[1:]
            or (clause.__name__ == "descends" and name != "GaLoreSGD")
            else (),
        )
        for i, clause in enumerate(CLAUSES)
        for j, name in enumerate(cases.method_names())
        if not name.endswith("8bit")
    ],
)
def test_the_contract_in_4_bits(
    clause: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, with every moment in codes, however small."""
    build = cases.build
    monkeypatch.setattr(quant, "MIN_SIZE", 1)
    monkeypatch.setattr(
        cases, "build", lambda *args, **kw: build(*args, **{"state_dtype": "4bit", **kw})
    )
    clause(name)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_inside_backward_in_4_bits(mode: Any) -> None:
    """The weights and codes of ``step()`` after it."""
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 64), nn.Tanh(), nn.Linear(64, 300))
        optimizer = GaLoreAdamW(
            net.named_parameters(), rank=32, update_proj_gap=2, state_dtype="4bit"
        )
        if attached:
            attach_in_backward(optimizer, mode)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(4, 300)).square().mean().backward()
            optimizer.step()
        found.append((list(net.parameters()), runs.entries(optimizer)))
    (weights, states), (others, those) = found
    assert any(x.dtype == torch.uint8 for entry in states for x in entry.values())
    runs.assert_same(others, weights)
    runs.assert_same_state(those, states)


def test_what_is_refused() -> None:
    """A format that is not known."""
    weight = nn.Parameter(torch.zeros(64, 512))
    with pytest.raises(ValueError, match=r"state_dtype must be one of .*'4bit'.*got '2bit'"):
        GaLoreAdamW([weight], rank=16, state_dtype="2bit")


def test_a_checkpoint_in_8_bits_is_not_read_as_4() -> None:
    """Where its group says so: the format is named."""
    params = matrices(torch.float32)
    optimizer = cases.build("GaLoreAdamW8bit", params, rank=16)
    runs.train(params, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "4bit"
    with pytest.raises(ValueError, match=r"format of low\.exp_avg is 8bit there and 4bit here"):
        cases.build("GaLoreAdamW", params, rank=16).load_state_dict(saved)


# ---------------------------------------------------------------- beside torchao


def test_codes_are_those_of_torchao() -> None:
    """Where a block's largest is positive: the one beside a value that it takes is the nearest."""
    torchao = pytest.importorskip("torchao.optim.subclass_4bit")
    theirs = pytest.importorskip("torchao.optim.quant_utils")
    x = torch.randn(32, 256)
    x[:, ::128] = x.abs().amax() + 1
    for slot, table in (
        (KINDS["signed"], torch.tensor(torchao.get_qmap_signed())),
        (KINDS["squares"], torch.tensor(torchao.get_qmap_unsigned())),
    ):
        own = x if slot.signed else x.square()
        state = kept(own, slot)
        scaled, scales = theirs.scale_tensor(own, quant4.BLOCK)
        codes = theirs.quantize_4bit_with_qmap(scaled, table).int()
        mine = quant4.unpacked(state[slot.name], 256).int()
        assert torch.equal(state[f"{slot.name}_scale"].view(-1), scales)
        assert torch.equal(quant4.four_bit_map(slot.signed, x.device), table)
        assert int((mine - codes).abs().max()) == 1
        grid = table[torch.arange(32 * 256).view(32, 256) % 16] * 3  # what has codes takes them
        grid[:, ::128] = 3
        scaled, _ = theirs.scale_tensor(grid, quant4.BLOCK)
        exact = quant4.unpacked(kept(grid, slot)[slot.name], 256).int()
        assert torch.equal(exact, theirs.quantize_4bit_with_qmap(scaled, table).int())
