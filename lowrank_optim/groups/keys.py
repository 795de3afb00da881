"""Keys of parameter groups: which there are, who reads them, and what other packages call them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from lowrank_optim.groups.values import FREE_RULES, Group, density
from lowrank_optim.subspaces.base import PROJECTORS

ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "alpha": ("scale", lambda scale: scale),  # Fira
    "update_gap": ("update_proj_gap", lambda gap: gap),  # FRUGAL
    "proj_side": ("proj_type", lambda side: side),
    "reset_statistics": ("on_refresh", lambda reset: "reset" if reset else "keep"),
    "density": ("rank", lambda share: density(share)),
    "coord_choice": ("projector", lambda choice: choice),
    "inactive_update_rule": ("free_rule", lambda rule: _free_rule(rule)),
    "inactive_lr_scale": ("free_lr_scale", lambda scale: scale),
    "lora_alpha": ("scale", lambda alpha: alpha),  # SwitchLoRA
    "switch_lora_interval": ("interval", lambda interval: interval),
    "switch_lora_descent_rate": ("descent_ratio", lambda ratio: ratio),
    "switch_descend_type": ("descent", lambda name: name),
    "adam_warm_step": ("freeze_steps", lambda steps: steps),
    "projection_type": ("proj_type", lambda side: side),  # pytorch_optimizer's GaLore
}
"""Keys of the released packages, the key each stands for, and how its value reads."""

_MEMORY = {False: None, True: "float32", 8: "8bit", 4: "4bit"}
ALIASES |= {  # DCT-AdamW
    "rotate_subspace": ("on_refresh", lambda rotate: "project" if rotate else "keep"),
    "use_ef": (
        "error_feedback",
        lambda bits: _MEMORY.get(bits, bits) if isinstance(bits, int) else bits,
    ),
    "sim_type": ("transform", lambda how: "fft" if how == "makhoul" else how),
    "ell_norm": ("ranking", lambda norm: f"l{norm}"),
}

IGNORED = ("dim", "correct_bias", "no_deprecation_warning")
"""Released keys with no meaning here: n-d weights are seen as matrices whatever ``dim`` says."""

PLACES = ("params", "param_names", "targets", "method")
"""Keys that say what is in a group and who made it."""

SCHEDULED = (
    "initial_lr", "base_lr", "max_lr", "min_lr", "swa_lr",
    "base_momentum", "max_momentum", "min_momentum",
)  # fmt: skip
"""Keys that schedulers keep in a group."""

TRAINERS = (
    "name", "group_name", "layer_id", "layer_name", "is_last_layer",
    "lr_scale", "lr_mult", "lr_multiplier", "wd_mult", "wd_multiplier",
    "moe", "is_expert", "is_expert_parallel", "is_decoupled_lr",
)  # fmt: skip
"""Keys that trainers and their schedulers write and read themselves, such as timm's ``lr_scale``,
Lightning's ``name`` and Megatron's ``lr_mult``. A key of your own may begin with ``_``."""

TORCH_FLAGS: dict[str, tuple[bool, str]] = {
    "foreach": (False, "matrices of one shape are stepped together already, and dense parameters "
                "follow the single-tensor path"),
    "fused": (False, "kernels are chosen by LOWRANK_OPTIM_BACKEND, the fastest by default"),
    "amsgrad": (False, "no rule keeps a running maximum"),
    "differentiable": (False, "a step runs without gradients"),
    "decoupled_weight_decay": (True, "decay is always decoupled"),
}  # fmt: skip
"""Keyword arguments of ``torch.optim`` without an effect here, the only value that is true of these
optimizers beside None, and why."""

APOLLO = ("scale_type", "proj", "scale_front", "disable_nl")
"""Keys by which a group of APOLLO is known: all others are GaLore's too, and mean another update.

Hence they are no aliases, which groups for any optimizer would lose."""

FOREIGN: dict[str, str] = {
    "optim_bits": "it is bitsandbytes'; state_dtype='8bit' keeps moments in 8 bits",
    "min_8bit_size": "it is bitsandbytes'; moments under 4096 elements stay float32 always",
    "percentile_clipping": "it is bitsandbytes'; clip with torch.nn.utils.clip_grad_norm_",
    "block_wise": "it is bitsandbytes'; moments in 8 bits are always block-wise",
    "max_unorm": "it is bitsandbytes'; clip with torch.nn.utils.clip_grad_norm_",
    "is_paged": "it is bitsandbytes'; state_device='cpu' keeps moments in host memory",
    "use_muon": "it is Muon's; give those parameters to an optimizer of their own",
    "enable_lowrank": "it is LDAdam's; a group that names a rank is projected, others are dense",
    "proj_method": "it is LDAdam's; LDAdamW takes one power iteration, from an SVD at first",
    "weight_decouple": "it is pytorch_optimizer's; decay is always decoupled",
    "fixed_decay": "it is pytorch_optimizer's; decay is always multiplied by lr",
    "quant": "it is Q-GaLore's; state_dtype='8bit' keeps moments in 8 bits, projectors stay whole",
    "quant_group_size": "it is Q-GaLore's; state_dtype='8bit' has blocks of 256",
    "quant_n_bit": "it is Q-GaLore's; state_dtype='8bit' keeps moments in 8 bits",
    "cos_threshold": "it is Q-GaLore's; update_proj_gap sets when a basis is refreshed",
    "gamma_proj": "it is Q-GaLore's; update_proj_gap sets when a basis is refreshed",
    "queue_size": "it is Q-GaLore's; update_proj_gap sets when a basis is refreshed",
}
"""Keys of other packages that would mean nothing here, and what to do."""

METHODS: dict[str, type[Any]] = {}
"""Public optimizer classes by name, as they are defined: messages say which reads a key."""

_NOT_KEYS = (
    "rank", "scale", "two_sided", "shared", "columns",
    "frozen", "density", "position", "count", "first",
)  # fmt: skip
"""Fields of projectors that have another source than a group key of that name."""


def canonical(group: Mapping[str, Any]) -> Group:
    """A copy of a group with released keys renamed to ours, and numpy's scalars as Python's.

    A numpy scalar in a group makes its checkpoint one that ``weights_only=True`` refuses.

    Raises:
        ValueError: a key and its alias are both given, with different values, or a released key
            asks for something that no optimizer here does.
    """
    if not group.get("correct_bias", True):
        raise ValueError("correct_bias=False is not supported: moments are always corrected")
    group = {k: builtin(v) for k, v in group.items()}
    group = with_projector(group)
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


def with_projector(group: Group) -> Group:
    """A group whose ``proj_type`` is a side: FRUGAL calls the projector so.

    Raises:
        ValueError: a projector is given by both names, and not the same.
    """
    found = group.get("proj_type")
    if not isinstance(found, str) or found not in ("svd", "random"):
        return group
    if group.get("projector", found) != found:
        raise ValueError(
            f"projector={group['projector']!r} and proj_type={found!r}, which FRUGAL calls the "
            "projector, differ: give projector alone"
        )
    return {**{k: v for k, v in group.items() if k != "proj_type"}, "projector": found}


def builtin(value: Any) -> Any:
    """``value`` as Python numbers where it is a numpy scalar, or a pair of them."""
    if type(value) in (list, tuple):
        return type(value)(map(builtin, value))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _free_rule(rule: Any) -> Any:
    """Our name of one of FRUGAL's rules."""
    names = {theirs: ours for ours, theirs in FREE_RULES.items()}
    return names.get(rule, rule) if isinstance(rule, str) else rule


def projector_keys(name: Any) -> set[str]:
    """Group keys that the projector ``name`` reads: its fields."""
    if not isinstance(name, str) or name not in PROJECTORS:
        return set()
    return {f.name for f in fields(PROJECTORS[name])} - set(_NOT_KEYS)


def known_keys() -> set[str]:
    """Every key that some optimizer or projector reads, in our spelling."""
    read = {key for cls in METHODS.values() for key in cls.group_keys()}
    return read.union(*(projector_keys(name) for name in PROJECTORS))


def free_to_use(key: Any) -> bool:
    """Whether a group may hold ``key`` for somebody else."""
    return key in SCHEDULED or key in TRAINERS or (isinstance(key, str) and key.startswith("_"))


def without_torch_flags(group: Mapping[str, Any], owner: str) -> Group:
    """A copy without the keyword arguments of ``torch.optim`` that change nothing here.

    Raises:
        ValueError: one of them asks for something.
    """
    for key, (value, why) in TORCH_FLAGS.items():
        if key in group and group[key] is not None and group[key] is not value:
            raise ValueError(
                f"{owner}: {key} must be None or {value}, got {group[key]!r}: {why}; leave it out"
            )
    return {k: v for k, v in group.items() if k not in TORCH_FLAGS}


def check_known(given: Mapping[str, Any], allowed: Collection[str], owner: str, place: str) -> None:
    """Raise for a key that nothing reads.

    Args:
        given: a group, as it was written.
        allowed: the keys that are read.
        owner: name of the class or function.
        place: where the key stands, for the message, as "group 2".

    Raises:
        ValueError: what is wrong with it, and the nearest key that there is.
    """
    refuse_apollo(given, allowed, owner, place)
    key = unknown_key(given, allowed)
    if key is not None:
        raise ValueError(f"{owner}: unknown group key {key!r} in {place}{remedy(key, allowed)}")


def refuse_apollo(
    given: Mapping[str, Any], allowed: Collection[str], owner: str, place: str
) -> None:
    """Raise for a group of APOLLO where nothing reads it: its other keys look like GaLore's.

    Raises:
        ValueError: it is one.
    """
    found = [key for key in APOLLO if key in given and key not in allowed]
    if found:
        scale = f" {given['scale']}" if "scale" in given else ""
        raise ValueError(
            f"{owner}: {', '.join(map(repr, found))} in {place} "
            f"{'is' if len(found) == 1 else 'are'} APOLLO's, whose scale{scale} "
            "multiplies another update: train with ApolloAdamW, or drop these keys and give rank, "
            "update_proj_gap, proj_type and scale of GaLore (published: scale=0.25)"
        )


def unknown_key(given: Mapping[str, Any], allowed: Collection[str]) -> str | None:
    """The first key that is not allowed, nor a released name of one that is, nor a trainer's."""
    for key in given:
        known = key in allowed or (key in ALIASES and ALIASES[key][0] in allowed)
        if not (known or key in IGNORED or key in _CONVERTED or free_to_use(key)):
            return key
    return None


_CONVERTED = ("is_proj_params", "q_ef")
"""Released keys that :func:`canonical` reads without an alias."""


def remedy(given: Any, allowed: Iterable[str]) -> str:
    """What to do about a key that is not in ``allowed``: the end of a message."""
    allowed = sorted(allowed)
    if given in FOREIGN:
        return f": {FOREIGN[given]}"
    key = ALIASES[given][0] if given in ALIASES else given
    if key != given and key in allowed:
        return f"; here it is {key!r}"
    readers = [name for name, cls in METHODS.items() if key in cls.group_keys()]
    if readers:
        more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
        return f": {', '.join(readers[:3])}{more} read{'s' * (len(readers) == 1)} {key!r}"
    projectors = [name for name in PROJECTORS if key in projector_keys(name)]
    if projectors:
        return f": projector={projectors[0]!r} reads {key!r}"
    near = difflib.get_close_matches(str(key), allowed, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; keys are {', '.join(allowed)}, and any that begins with '_' is your own"
