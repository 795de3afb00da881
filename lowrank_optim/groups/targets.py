"""What ``target_modules`` may look like, and what is said of a target that matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

ALL_LINEAR = ("all-linear", "all")
"""Every linear layer: the word of transformers, and that of LLaMA-Factory."""

SHOWN = 10
"""Names that an error message lists."""


def spelled(target_modules: str | Sequence[str], known: Collection[str]) -> list[str]:
    """Targets as a list, with ``"all-linear"`` for each of its spellings.

    Args:
        target_modules: one target or several.
        known: names of the model's modules and parameters, which mean themselves.

    Raises:
        TypeError: a target is not a string.
        ValueError: there is none.
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(targets, Sequence) or not all(isinstance(x, str) for x in targets):
        raise TypeError(
            "target_modules must be 'all-linear', a pattern or a list of them, got "
            f"{target_modules!r}"
        )
    if not targets or not all(targets):
        raise ValueError(
            f"target_modules={target_modules!r} names nothing: give patterns, or 'all-linear'"
        )
    return [
        "all-linear" if x.lower().replace("_", "-") in ALL_LINEAR and x not in known else x
        for x in targets
    ]


def no_match(target: str, model: nn.Module) -> str:
    """What is said of a target that matches no trainable matrix: what there is, nearest first."""
    linears = [(name, weight) for name, weight in _linears(model) if weight.requires_grad]
    matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.dim() >= 2]
    there = [name for name, _ in linears or matrices]
    what = f"target_modules {target!r} matches no trainable matrix"
    if not there:
        return (
            f"{what}: no parameter with two dimensions has requires_grad. Unfreeze one, or give "
            "the optimizer model.named_parameters() with rank=None, which is dense"
        )
    # the same name in every layer is one kind, and its nearest layer speaks for it
    kinds: dict[str, str] = {}
    for name in sorted(there, key=lambda name: _likeness(target, name), reverse=True):
        kinds.setdefault(re.sub(r"\d+", "", name), name)
    nearest = list(kinds.values())[:SHOWN]
    more = f" and {len(there) - len(nearest)} more" if len(there) > len(nearest) else ""
    kind = "linear layers" if linears else "matrices"
    return f"{what}. Trainable {kind}: {', '.join(nearest)}{more}"


def _linears(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) or type(module).__name__ == "Conv1D":
            yield name, module.weight


def _likeness(target: str, name: str) -> tuple[float, float]:
    """How near a target is to a name or to its last part, from 0 to 1; then to the name."""

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    whole = ratio(target, name)
    return max(whole, ratio(target.rpartition(".")[2], name.rpartition(".")[2])), whole
