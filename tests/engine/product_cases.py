"""Compositions of roles as data, and one of them beside the oracle.

Methods of the package compose some; the others are composed here, as a user may. A case runs one
matrix and a batch of experts over a refresh.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import PROJECTORS, LowRankOptimizer
from lowrank_optim.engine.draws import mixed
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.ops import quant, reference
from lowrank_optim.residuals import Drop, Free, Residual, Scaled
from lowrank_optim.residuals.error_feedback import FORMATS, ErrorFeedback
from lowrank_optim.rules import SGD, Adafactor, AdamW, Lion, Rule
from lowrank_optim.stores import STORES, scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.entries import RandK
from lowrank_optim.tensors.matrix import PROJ_TYPES, MatrixView
from lowrank_optim.transports import TRANSPORTS
from tests import cases
from tests.compare import assert_close, assert_mostly_close
from tests.oracles import four_bits
from tests.oracles.product import product

RULES: dict[str, type[Rule]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD, "adafactor": Adafactor}
SLOTS = {"adamw": ("m", "v"), "lion": ("m",), "sgd": ("m",), "adafactor": ("row", "col", "m")}
"""The oracle's names of the slots of each rule, in their order."""

GAIN = 0.7
RESIDUALS: dict[str, dict[str, Any]] = {
    "dropped": {"kind": "drop"},
    **{
        f"scaled, {('column', 'matrix')[matrix]}, {('release', 'paper')[paper]}, {limiter}": {
            "kind": "fira", "matrix": matrix, "paper": paper, "limiter": limiter,
        }
        for matrix, paper, limiter in itertools.product((False, True), (False, True), (1.01, None))
    },
    "free, sign": {"kind": "free", "rule": "sign", "gain": GAIN},
    "free, sgd": {"kind": "free", "rule": "sgd", "gain": GAIN},
    **{f"feedback, {x}": {"kind": "feedback", "memory": x} for x in FORMATS if x is not None},
}  # fmt: skip
"""Each as the oracle has it."""

SUBSPACES: dict[str, dict[str, Any]] = {
    **{name: {"projector": name} for name in cases.projector_names() if name != "dct"},
    **{f"dct, {how}": {"projector": "dct", "transform": how} for how in ("fft", "matmul")},
}
AXES: dict[str, Sequence[Any]] = {
    "shape": ((5, 7), (9, 4), (6, 6), (4, 3, 2, 2)),
    "proj_type": PROJ_TYPES,
    "backend": ("native", "reference", "float64"),
    "maximize": (False, True),
    "lr": (float, torch.tensor),
    "waits": (True, False),
    "rounding": (False, True),
    "stored": ("rows", "columns", "apart"),
    "scale": (1.0, 0.5, 0.25),
    "lr_scale": (1.0, 0.5),
    "aged": (False, True),
    "basis": ("dct2", "dct3"),
    "ranking": ("l2", "l1"),
    "rank": (2, 3),
}
"""What is drawn; where the host may not wait, steps run as on a device whose queue would stall."""
EXPERTS = (2, 5, 7)
STEPS, GAP, LR, DECAY = 3, 2, 0.0625, 0.125  # numbers that float32 has

REFUSED = {
    "a block and error feedback": "a block uses all of a gradient or nothing",
    "factors of a weight and a residual": "its coordinates are of factors of the weight",
    "rows with steps of their own and a rule by the step": "rows cannot count steps of their own",
}
"""Pairs that are not supported, and what the error says (docs/algorithms/index.md has the same)."""


def refusal(subspace: str, residual: str, case: dict[str, Any]) -> str | None:
    """Which of :data:`REFUSED` a case is, if any."""
    if subspace == "block" and RESIDUALS[residual]["kind"] == "feedback":
        return REFUSED["a block and error feedback"]
    if case["aged"] and case["rule"] == "adafactor":
        return REFUSED["rows with steps of their own and a rule by the step"]
    return None


def crossed(subspace: str, residual: str) -> Iterator[tuple[str, str, str]]:
    """Every rule, and the transports and the stores in turn, each with each."""
    s, r = [*SUBSPACES].index(subspace), [*RESIDUALS].index(residual)
    for i, rule in enumerate(RULES):
        on_refresh = [*TRANSPORTS][(s + r + i) % len(TRANSPORTS)]
        yield rule, [*STORES][(s + r + 3 * i) % len(STORES)], on_refresh


def drawn(subspace: str, residual: str, times: int = 0) -> Iterator[dict[str, Any]]:
    """The cases of a subspace and a residual; with ``times``, so many of each store."""
    several = itertools.product(RULES, STORES, TRANSPORTS)
    every = (
        itertools.product(range(times), several)
        if times
        else enumerate(crossed(subspace, residual))
    )
    for n, (rule, store, on_refresh) in every:
        generator = random.Random(f"{subspace}/{residual}/{rule}/{store}/{on_refresh}/{n}")
        yield one(subspace, generator, rule=rule, store=store, on_refresh=on_refresh)


def one(subspace: str, generator: random.Random, **fixed: Any) -> dict[str, Any]:
    """A case with all that is not fixed drawn."""
    case = {key: generator.choice(values) for key, values in AXES.items()} | fixed
    case["aged"] &= subspace != "block"  # a dense step counts the steps of its tensor
    projector = PROJECTORS[SUBSPACES[subspace]["projector"]]
    diagonal = projector.fitted and case["proj_type"] == "full"
    if diagonal and case["rule"] == "lion":
        case["proj_type"] = generator.choice(PROJ_TYPES[:-1])
    # the core of a matrix in its own singular vectors is zero outside the diagonal but for
    # rounding, which Lion makes full steps of and AdamW divides by eps (docs/algorithms/galore.md)
    case["eps"] = 0.1 if diagonal else 1e-8
    return case


def residual_of(spec: dict[str, Any], maximize: bool) -> Residual:
    if spec["kind"] == "fira":
        return Scaled(columns=not spec["matrix"], limiter=spec["limiter"], paper=spec["paper"])
    if spec["kind"] == "free":
        return Free({"sign": "sign", "sgd": "raw"}[spec["rule"]], spec["gain"])  # type: ignore[arg-type]
    if spec["kind"] == "feedback":
        return ErrorFeedback(spec["memory"], maximize)
    return Drop()


def composed(rule: str, residual: Residual, aged: bool) -> type[LowRankOptimizer]:
    """An optimizer that no one has released."""

    class Composed(LowRankOptimizer):
        rule_class = RULES[rule]

        def residual(self, group: Group) -> Residual:
            return residual

        def _strategies(self, group: Group) -> Strategies:
            return replace(super()._strategies(group), aged=aged)

    return Composed


def hyper(case: dict[str, Any]) -> dict[str, Any]:
    """Group keys of a rule; the oracle reads the same."""
    if case["rule"] == "adafactor":
        unused = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        own = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": 0.9}
        return {**own, **unused}
    if case["rule"] == "sgd":
        return {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
    return {"betas": (0.8, 0.95), "eps": case["eps"]}


def built(subspace: str, residual: str, case: dict[str, Any], params: Any) -> LowRankOptimizer:
    options: Options = {
        "rank": cases.rank_for(SUBSPACES[subspace]["projector"], case["rank"]),
        "update_proj_gap": GAP,
        "stagger": False,
        "scale": case["scale"],
        "proj_type": case["proj_type"],
        "on_refresh": case["on_refresh"],
        "state_dtype": case["store"],
        "stochastic_rounding": case["rounding"],
        "maximize": case["maximize"],
        "projector": SUBSPACES[subspace]["projector"],
    }
    lr = case["lr"](LR) if case["lr"] is float else case["lr"](LR, dtype=params[0].dtype)
    own: Group = {"lr": lr, "weight_decay": DECAY, **hyper(case)}
    own |= {"proj_params_lr_scale": case["lr_scale"], "block_order": "ascending"}
    own |= {"basis": case["basis"], "ranking": case["ranking"]}
    own |= {"transform": SUBSPACES[subspace].get("transform", "auto")}
    cls = composed(case["rule"], residual_of(RESIDUALS[residual], case["maximize"]), case["aged"])
    return cls(params, {**own, **with_defaults(cls, options)})


def stored(x: Tensor, how: str) -> Tensor:
    """``x`` with strides that a kernel must follow."""
    if how == "columns":
        return (
            x.mT.contiguous().mT if x.dim() < 4 else x.contiguous(memory_format=torch.channels_last)
        )
    return torch.stack([x, x], -1)[..., 0] if how == "apart" else x


def start(shape: Sequence[int], dtype: torch.dtype, seed: int, small: bool) -> Tensor:
    """The weights at first; in narrow formats so small that their rounding hides no step."""
    w = cases.parameter(shape, torch.float64, seed).detach()
    return (w / 64 if small else w).to(dtype)


def part_of(item: ParamPlan, state: dict[str, Tensor], expert: int) -> Any:
    """The subspace that the optimizer found, as the oracle takes it."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None
    if isinstance(subspace, Block):
        idle = int(state["refresh_step"]) < 0
        return torch.empty(0, dtype=torch.long) if idle else (None, None)
    if isinstance(subspace, RandK):
        (tile,) = subspace.tiles(view.m, view.n, int(state["key"]), torch.empty(0))
        return tile.places.clone()
    found = [x.double().clone() for x in subspace.bases(state, view)]
    found = [x[expert] if x.dim() > 2 else x for x in found]
    return found[0], found[1] if len(found) > 1 else None


def kept(case: dict[str, Any], index: int, batch: bool, states: Sequence[dict[str, Tensor]]) -> Any:
    """What the store makes of the oracle's moments: the reference's arithmetic on all at once.

    Which sign a scale of 4 bits has is the optimizer's own where rounding decides it: all first
    coordinates of one row in Adafactor's direction, as of randk, are 1 or -1.
    """

    def keep(experts: list[dict[str, Tensor]], s: int, moved: bool) -> None:
        for n, name in enumerate(SLOTS[case["rule"]]):
            if name not in experts[0]:
                continue
            x = torch.stack([slots[name] for slots in experts]).float()
            x = x if batch else x[0]
            seed = mixed(0, index, s, 2, n) if moved else mixed(0, index, s + 1, 1, n)
            if case["store"] == "bfloat16":
                out = drawn_bfloat16(x, seed)
            elif case["store"] == "4bit":
                signs = None if moved or name != "m" else signs_of(states[s])
                out = through_4_bits(x, name == "m", seed, signs)
            else:
                out = through_8_bits(x, signed=name == "m")
            for slots, own in zip(experts, out if batch else [out], strict=True):
                slots[name] = own.double()

    return None if case["store"] == "float32" else keep


def remembered(
    spec: dict[str, Any], states: Sequence[dict[str, Tensor]], batch: bool
) -> Callable[[Tensor, int, int], Tensor] | None:
    """What is left of the oracle's error memory in the format that it is kept in.

    In bits it is the optimizer's own, once it is within half a level: where the middle of a row is
    midway between its ends, as of what fixed bases leave, either level is right.
    """
    memory = spec.get("memory")
    if memory == "bfloat16":
        return lambda E, expert, s: E.to(torch.bfloat16).to(E.dtype)
    if memory not in ("8bit", "4bit"):
        return None

    def remember(E: Tensor, expert: int, s: int) -> Tensor:
        parts = (states[s][key] for key in ("error", "error_low", "error_step"))
        codes, low, step = (x[expert] if batch else x for x in parts)
        if memory == "4bit":
            codes = torch.stack([codes % 16, codes // 16], -1).flatten(-2)[..., : E.shape[0]]
        got = (low.double()[:, None] + codes.double() * step.double()[:, None]).T
        assert bool(((got - E).abs() <= (0.5 + 1e-4) * step.double() + 1e-6).all())
        return got

    return remember


def drawn_bfloat16(x: Tensor, seed: int) -> Tensor:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    reference.stochastic_round_([x], [out], [seed & 0x7FFFFFFF], [0], [x.numel()], [0], [1])
    return out


def signs_of(state: dict[str, Tensor]) -> Tensor | None:
    """Those of the scales of a first moment."""
    ends = tuple(scale_key(name) for name in ("exp_avg", "momentum_buffer"))
    return next((x.sign() for key, x in state.items() if key.endswith(ends)), None)


def through_4_bits(x: Tensor, signed: bool, seed: int, signs: Tensor | None = None) -> Tensor:
    """Of one column nothing is in 4 bits."""
    if x.shape[-1] == 1:
        return x
    return four_bits.kept(
        x.double(),
        four_bits.SIGNED if signed else four_bits.SQUARES,
        # whole numbers are what bfloat16 has from 128 on
        lambda level: drawn_bfloat16((level + 128).float(), seed).double() - 128,
        signs,
    ).float()


def through_8_bits(x: Tensor, signed: bool) -> Tensor:
    where, table = quant.layout(x.shape), quant.dynamic_map(signed, x.device)
    codes, scales = torch.empty_like(x, dtype=torch.uint8), torch.empty(where.scales)
    shape = tuple([number] for number in where)
    reference.quantize_blockwise_([x], [codes], [scales], table, *shape)
    if not signed:
        reference.keep_positive_(x.reshape(-1), codes.view(-1), scales, where.cols, where.block)
    out = torch.empty_like(x)
    reference.dequantize_blockwise_([codes], [scales], [out], table, *shape)
    return out


def compare(
    subspace: str, residual: str, case: dict[str, Any], dtype: torch.dtype | None = None
) -> bool:
    """One case: the package's weights after each step are the oracle's.

    Returns:
        Whether a narrow moment was rounded the other way: once in 65536 of bfloat16.
    """
    flipped = False
    narrow = dtype is not None
    dtype = dtype or (torch.float64 if case["backend"] == "float64" else torch.float32)
    shapes = [case["shape"], EXPERTS]
    if subspace == "block":
        shapes = [(5, 7), EXPERTS]
    params = [
        torch.nn.Parameter(stored(start(x, dtype, seed=i, small=narrow), case["stored"]))
        for i, x in enumerate(shapes)
    ]
    grads = [cases.gradients(x, STEPS, dtype, seed=i) for i, x in enumerate(shapes)]
    refused = refusal(subspace, residual, case)
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            cases.run(built(subspace, residual, case, params), params, [[g[0] for g in grads]])
        return flipped
    optimizer = built(subspace, residual, case, params)
    (group,) = optimizer.param_groups
    before = [p.detach().double().clone() for p in params]
    found: list[list[list[Any]]] = [[], []]
    fresh: list[list[bool]] = [[], []]
    after: list[list[Tensor]] = [[], []]
    states: list[list[dict[str, Tensor]]] = [[], []]
    for s in range(STEPS):
        for param, own in zip(params, grads, strict=True):
            param.grad = stored(own[s], case["stored"])
        optimizer.step()
        for i, item in enumerate(optimizer._items(group)):
            state, experts = optimizer.state[item.param], shapes[i][0] if i else 1
            found[i].append([part_of(item, state, e) for e in range(experts)])
            fresh[i].append(int(state["refresh_step"]) == s)
            after[i].append(item.param.detach().clone())
            states[i].append({k: v.clone() for k, v in state.items()})
    for i, item in enumerate(optimizer._items(group)):
        view = item.view
        assert view is not None

        def experts(x: Tensor, view: MatrixView = view) -> list[Tensor]:
            x = view.of(x.double())
            return list(x) if view.batch else [x]

        wanted, undecided = product(
            experts(before[i]),
            [experts(g) for g in grads[i]],
            found[i],
            fresh[i],
            rule=case["rule"],
            residual=RESIDUALS[residual],
            lr=LR,
            weight_decay=DECAY,
            on_refresh=case["on_refresh"],
            scale=1.0 if subspace == "block" else case["scale"],
            maximize=case["maximize"],
            aged=case["aged"],
            lr_scale=case["lr_scale"],
            keep=kept(case, i, bool(view.batch), states[i]),
            remember=remembered(RESIDUALS[residual], states[i], bool(view.batch)),
            **hyper(case),
        )
        exact = dtype == torch.float64 and case["store"] == "float32"
        exact = exact and RESIDUALS[residual].get("memory") not in ("8bit", "4bit")
        for got, want in zip(after[i], wanted, strict=True):
            mine = (view.of(got) if view.batch else view.of(got)[None]).double()
            mine = torch.where(undecided, want, mine)
            if narrow:
                assert_mostly_close(mine, want, dtype, max_error_rate=0.05)
                continue
            if exact:
                assert_close(mine, want, torch.float64)
                continue
            try:  # a sign within rounding of zero
                assert_mostly_close(mine, want, torch.float32, max_error_rate=0.02)
            except AssertionError:
                if case["store"] == "float32":
                    raise
                assert_close(mine, want, torch.bfloat16)
                flipped = True  # a moment within rounding of where it is rounded to another
    return flipped
