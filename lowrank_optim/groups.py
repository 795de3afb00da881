"""Parameter groups: what their keys mean, and how to make them from a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lowrank_optim.matrix import PROJ_TYPES
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import PROJECTORS
from lowrank_optim.subspaces.block import BLOCK_ORDERS
from lowrank_optim.subspaces.factors import SAMPLING
from lowrank_optim.targets import no_match, spelled
from lowrank_optim.transports import TRANSPORTS

logger = logging.getLogger(__name__)
Group = dict[str, Any]

ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "alpha": ("scale", lambda scale: scale),  # Fira
    "update_gap": ("update_proj_gap", lambda gap: gap),  # FRUGAL
    "proj_side": ("proj_type", lambda side: side),
    "reset_statistics": ("on_refresh", lambda reset: "reset" if reset else "keep"),
    "density": ("rank", lambda density: _density(density)),
    "coord_choice": ("projector", lambda choice: choice),
    "inactive_update_rule": ("free_rule", lambda rule: _free_rule(rule)),
    "inactive_lr_scale": ("free_lr_scale", lambda scale: scale),
    "lora_alpha": ("scale", lambda alpha: alpha),  # SwitchLoRA
    "switch_lora_interval": ("interval", lambda interval: interval),
    "switch_lora_descent_rate": ("descent_ratio", lambda ratio: ratio),
    "switch_descend_type": ("descent", lambda name: name),
    "adam_warm_step": ("freeze_steps", lambda steps: steps),
}
"""Keys of the released packages, the key each stands for, and how its value reads."""

_MEMORY = {False: None, True: "float32", 8: "8bit", 4: "4bit"}
ALIASES |= {  # DCT-AdamW
    "rotate_subspace": ("on_refresh", lambda rotate: "project" if rotate else "keep"),
    "use_ef": ("error_feedback", lambda bits: _MEMORY.get(bits, bits)),
    "sim_type": ("transform", lambda how: "fft" if how == "makhoul" else how),
    "ell_norm": ("ranking", lambda norm: f"l{norm}"),
}

IGNORED = ("dim", "correct_bias", "no_deprecation_warning")
"""Released keys with no meaning here: n-d weights are seen as matrices whatever ``dim`` says."""

FREE_RULES = {"sign": "sign_sgd", "sgd": "sgd", "none": "no"}
"""What moves the part of a gradient that has no state, and FRUGAL's names for it."""

CHOICES: dict[str, Collection[str | None]] = {
    "proj_type": PROJ_TYPES,
    "projector": PROJECTORS,
    "on_refresh": TRANSPORTS,
    "block_order": BLOCK_ORDERS,
    "free_rule": FREE_RULES,
    "state_dtype": STORES,
    "alpha_mode": ("release", "paper"),
    "scaling": ("column", "matrix"),
    "basis": ("dct2", "dct3"),
    "ranking": ("l2", "l1"),
    "transform": ("auto", "matmul", "fft"),
    "error_feedback": (None, "float32", "bfloat16", "8bit", "4bit"),
    "sampling": SAMPLING,
    "factors": ("exact", "active"),
    "factor_dtype": ("float32", "bfloat16"),
    "negative": ("clamp", "flip"),
    "descent": ("exponential", "Z"),
    "order": ("fifo", "random"),
    "pool_device": ("cpu", "param"),
    "decay_on": ("factors", "weight"),
}
"""Keys whose value is a name, and the names; registries grow."""

COUNTS = {
    "update_proj_gap": 1,
    "steps_per_iteration": 1,
    "iterations_per_round": 1,
    "warmup_steps": 0,
}
"""Keys that are whole numbers, and the least each may be."""

SCALES = ("scale", "free_lr_scale", "proj_params_lr_scale")
"""Keys that are factors, not negative."""

FLAGS = (
    "stagger",
    "stochastic_rounding",
    "maximize",
    "slot_bias_correction",
    "enhanced",
    "offload_inactive",
    "freeze_step_counter",
    "fan_in_fan_out",
)
"""Keys that are True or False."""

EMBEDDING_OR_HEAD = re.compile(
    r"(^|\.)(\w*embed\w*|\w*_emb|emb|wte|wpe|lm_head|output_projection|classifier|score|head)\."
    r"|^(output|decoder)\.weight$|predictions\.decoder\."
)
"""Names of embeddings and output heads, which stay dense unless a group asks for them."""


def canonical(group: Mapping[str, Any]) -> Group:
    """A copy of a group with released keys renamed to ours, and numpy's scalars as Python's.

    A numpy scalar in a group makes its checkpoint one that ``weights_only=True`` refuses.

    Raises:
        ValueError: a key and its alias are both given, with different values, or a released key
            asks for something that no optimizer here does.
    """
    if not group.get("correct_bias", True):
        raise ValueError("correct_bias=False is not supported: moments are always corrected")
    group = {k: _builtin(v) for k, v in group.items()}
    if group.get("proj_type") in ("svd", "random"):  # FRUGAL's name of the projector
        group["projector"] = group.pop("proj_type")
    if not group.pop("is_proj_params", True):  # FRUGAL: a group of dense parameters
        group = {k: v for k, v in group.items() if k != "density"} | {"rank": None}
    bits = group.pop("q_ef", False)  # of DCT-AdamW: use_ef says whether, q_ef in how many bits
    if bits and group.get("use_ef", True):
        group["use_ef"] = bits
    out = {k: v for k, v in group.items() if k not in ALIASES and k not in IGNORED}
    for alias, (key, read) in ALIASES.items():
        if alias in group:
            value = read(group[alias])
            if out.setdefault(key, value) != value:
                raise ValueError(f"{key}={out[key]!r} and its alias {alias}={value!r} differ")
    return out


def _builtin(value: Any) -> Any:
    """``value`` as a Python number if it is a numpy scalar."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _density(density: Any) -> float | None:
    """The fraction that a rank is, of everything: 0 and 1 are allowed.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if density is None:
        return None
    if not (_number(density) and 0 <= density <= 1):
        raise ValueError(f"density must be in [0, 1], got {_shown(density)}")
    return float(density)


def _free_rule(rule: Any) -> Any:
    """Our name of one of FRUGAL's rules."""
    return {theirs: ours for ours, theirs in FREE_RULES.items()}.get(rule, rule)


def _number(value: Any) -> bool:
    """Whether ``value`` compares with numbers; a config file's ``"1e-3"`` does not."""
    return isinstance(value, Tensor) or (isinstance(value, Real) and not isinstance(value, bool))


def _shown(value: Any) -> str:
    """``value`` for a message: as torch prints numbers and tensors, strings with their quotes."""
    return repr(value) if isinstance(value, str) else f"{value}"


def _choice(group: Group, key: str, allowed: Collection[str | None]) -> None:
    if key in group and group[key] not in tuple(allowed):
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(f"{key} must be one of {names}, got {group[key]!r}")


def check_rank(rank: Any, closed: bool = False) -> None:
    """Raise unless ``rank`` is a positive int or a fraction in (0, 1).

    Args:
        rank: of a group.
        closed: whether it may be a density, for which 0 and 1 mean something.

    Raises:
        ValueError: it is neither.
    """
    if closed and isinstance(rank, float) and rank in (0.0, 1.0):
        return
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise ValueError(f"rank must be a positive int or a fraction in (0, 1), got {_shown(rank)}")


def check(group: Group, closed: bool = False) -> None:
    """Raise for values no step could use, in torch's words where torch has them.

    Args:
        group: the keys to look at.
        closed: whether a rank may be a density of 0 or 1; so it may in any group of FRUGAL.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    _check_rule(group)
    if group.get("rank") is not None:
        check_rank(group["rank"], closed or "free_rule" in group)
        if group.get("projector") == "block" and not isinstance(group["rank"], float):
            raise ValueError(
                "projector='block' takes a density (or a fraction as its rank), got "
                f"rank={group['rank']}"
            )
    if group.get("projector") == "block" and group.get("error_feedback") is not None:
        raise ValueError(
            "error_feedback does not go with projector='block': a block uses all or nothing"
        )
    for key, least in COUNTS.items():
        count = group.get(key, 1)
        if count is None and key == "iterations_per_round":
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            kind = "a positive int" if least else "an int, not negative"
            raise ValueError(f"{key} must be {kind}, got {_shown(count)}")
    for key in SCALES:
        scale = group.get(key, 1.0)
        if not (_number(scale) and scale >= 0):
            raise ValueError(f"Invalid {key} value: {_shown(scale)}")
    limiter = group.get("limiter")
    if limiter is not None and not (_number(limiter) and limiter >= 1):
        raise ValueError(f"limiter must be None or a number >= 1, got {_shown(limiter)}")
    seed = group.get("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    for key in FLAGS:
        if not isinstance(group.get(key, False), bool):  # bool("false") is True
            raise ValueError(f"{key} must be True or False, got {group[key]!r}")
    for key, allowed in CHOICES.items():
        _choice(group, key, allowed)


def _check_rule(group: Group) -> None:
    """The hyper-parameters that torch's optimizers have too, in torch's words.

    Raises:
        ValueError: one is out of range.
    """
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr is not None and not (_number(lr) and lr >= 0):
        raise ValueError(f"Invalid learning rate: {_shown(lr)}")
    betas = group.get("betas", (0.0, 0.0))
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    for i, beta in enumerate(betas):
        if not (_number(beta) and 0 <= beta < 1):
            raise ValueError(f"Invalid beta parameter at index {i}: {_shown(beta)}")
    eps = group.get("eps", 0.0)
    if not all(_number(e) and e >= 0 for e in (eps if isinstance(eps, list | tuple) else [eps])):
        raise ValueError(f"Invalid epsilon value: {_shown(eps)}")
    for key in ("weight_decay", "momentum", "vector_lr_scale", "s_lr_scale"):
        value = group.get(key, 0.0)
        if not (_number(value) and value >= 0):
            raise ValueError(f"Invalid {key} value: {_shown(value)}")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def _matcher(what: str, target: str, model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter is meant by ``target``.

    The full name of a module or a parameter means all that is in it, and only that: ``layers.1`` is
    not ``layers.10``. Anything else is a regular expression, searched in the parameter's name and
    in its module's, so that ``q_proj$`` finds ``q_proj.weight``.

    Raises:
        ValueError: it is not a regular expression.
    """
    if target and any(target == name for name, _ in _named(model)):
        return lambda name: name == target or name.startswith(f"{target}.")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(f"{what} {target!r} is not a regular expression: {error}") from None
    return lambda name: any(pattern.search(x) for x in (name, name.rpartition(".")[0]))


def _named(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Modules and parameters by every name they have."""
    yield from model.named_modules(remove_duplicate=False)
    yield from model.named_parameters(remove_duplicate=False)


def _head_parameters(model: nn.Module) -> set[int]:
    """Parameters of input and output embeddings, by module type and transformers' accessors."""
    modules: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    for accessor in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, accessor, None)
        try:
            found = get() if callable(get) else None
        except NotImplementedError:  # how transformers says that a model has none
            continue
        if isinstance(found, nn.Module):
            modules.append(found)
    return {id(p) for m in modules for p in m.parameters()}


def _targets(
    model: nn.Module, target_modules: str | Sequence[str], names: Mapping[int, list[str]]
) -> set[int]:
    """Parameters that ``target_modules`` selects; every part of it must select something."""
    targets = spelled(target_modules, {name for name, _ in _named(model)})
    if targets == ["all-linear"]:
        heads = _head_parameters(model)
        found = {
            id(m.weight)
            for m in model.modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        }
        chosen = {
            i
            for i in found & names.keys()
            if i not in heads and not any(EMBEDDING_OR_HEAD.search(n) for n in names[i])
        }
        if not chosen:
            raise ValueError("target_modules='all-linear' matches no trainable parameter")
        return chosen
    dims = {id(p): p.dim() for p in model.parameters()}
    chosen = set()
    for target in targets:
        if target == "all-linear":
            chosen |= _targets(model, target, names)
            continue
        matches = _matcher("target_modules", target, model)
        hit = {i for i, own in names.items() if dims[i] >= 2 and any(map(matches, own))}
        if not hit:
            raise ValueError(no_match(target, model))
        chosen |= hit
    return chosen


def lowrank_groups(
    model: nn.Module,
    *,
    rank: int | float = 128,
    target_modules: str | Sequence[str] = "all-linear",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: str | Sequence[str] = (),
    **options: Any,
) -> list[Group]:
    r"""Parameter groups of a model: targeted matrices get ``rank``, everything else stays dense.

    Args:
        model: its trainable parameters are each put in one group, tied ones once; frozen ones are
            left out. Names are kept (``param_names``).
        rank: number of directions, or a fraction of the projected dimension.
        target_modules: ``"all-linear"`` (every ``nn.Linear`` and ``Conv1D`` but embeddings and
            output heads; also ``"all_linear"`` and ``"all"``, in any case), a pattern, or a list of
            them. A pattern that is the full name of a module or a parameter means that one; any
            other is a regular expression, searched in the names of parameters and of the modules
            that hold them.
        overrides: pattern to group keys for the parameters it matches; the first that matches wins.
            ``rank=None`` makes them dense, a rank makes them low-rank.
        no_decay: patterns; parameters they match get ``weight_decay=0``. One without a match is
            fine here: not every model has biases.
        **options: further group keys for the targeted matrices, such as ``projector="svd"``;
            ``density`` in place of ``rank``.

    Raises:
        ValueError: a target or an override matches nothing, is not a regular expression, or a
            value is out of range.
        TypeError: a target is not a string.

    Example:
        >>> import torch
        >>> from lowrank_optim import lowrank_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> groups = lowrank_groups(model, rank=4, overrides={r"^1\.": dict(rank=2)})
        >>> [(g.get("rank"), g["param_names"]) for g in groups]
        [(4, ['0.weight']), (None, ['0.bias', '1.bias']), (2, ['1.weight'])]
    """
    asked, options = options, canonical(options)
    rank = _builtin(options.pop("rank", rank))
    closed = any("density" in keys for keys in (asked, *(overrides or {}).values()))
    check_rank(rank, closed)
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(id(param), []).append(name)
    targets = _targets(model, target_modules, names)
    rules = [
        (p, _matcher("override", p, model), canonical(keys))
        for p, keys in (overrides or {}).items()
    ]
    spared = [no_decay] if isinstance(no_decay, str) else no_decay
    undecayed = [_matcher("no_decay", pattern, model) for pattern in spared]
    unused = {pattern for pattern, _, _ in rules}
    buckets: dict[str, Group] = {}
    for name, param in model.named_parameters():
        own = names.get(id(param))
        if own is None:
            continue
        keys: Group = {"rank": rank if id(param) in targets else None}
        for pattern, matches, extra in rules:
            if any(map(matches, own)):
                unused.discard(pattern)
                keys |= extra
                break
        if param.dim() < 2:
            keys["rank"] = None
        keys = keys if keys["rank"] is None else {**options, **keys}
        if any(matches(n) for matches in undecayed for n in own):
            keys["weight_decay"] = 0.0
        bucket = buckets.setdefault(
            repr(sorted(keys.items())), {**keys, "params": [], "param_names": []}
        )
        bucket["params"].append(param)
        bucket["param_names"].append(name)
    if unused:
        raise ValueError(
            f"overrides {sorted(unused)} match no trainable parameter not taken already"
        )
    return _finished(list(buckets.values()), closed)


def _finished(groups: list[Group], closed: bool) -> list[Group]:
    """Groups checked and logged, and dense ones without ``rank``, as galore-torch has them.

    Only where none has a rank do all say ``rank=None``, or the optimizer's own would apply.
    """
    some = any(group["rank"] is not None for group in groups)
    for group in groups:
        check(group, closed)
        if some and group["rank"] is None:
            del group["rank"]
    logger.info("%s", describe(groups))
    return groups


def describe(groups: Sequence[Group]) -> str:
    """The split of parameters into groups, as a table."""
    lines = [f"{'rank':>6} {'tensors':>8} {'parameters':>14}  first"]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        rank = group.get("rank") or "dense"
        first = group.get("param_names", [""])[0]
        lines.append(f"{rank!s:>6} {len(group['params']):>8} {count:>14,}  {first}")
    return "\n".join(lines)
