"""Published settings as lines of Python, for who has a GPU and the data.

The study has neither C4 nor a tokenizer: it prints a setting and trains nothing. What a source
does not say is named, so that no default of ours goes for a published figure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowrank_optim import presets

Preset = Callable[..., dict[str, Any]]
NO_DATA = "Nothing is trained: the study has no C4 and no other data of these runs. Bring a model."


@dataclass(frozen=True)
class Recipe:
    """A preset, and what takes its arguments."""

    preset: Preset
    taker: str
    """A class of optimizers, or a method of :func:`lowrank_optim.nn.convert`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the preset."""
    dense: dict[str, Any] | None = None
    """For layers: the arguments of AdamW that were published with them. None for optimizers."""
    unsaid: tuple[str, ...] = ()
    """What no source that was read has: an optimizer is not complete without it."""

    def code(self) -> str:
        """Lines that make the optimizer of a ``model``."""
        settings = "".join(
            f"    {key}={value!r},\n" for key, value in self.preset(**self.arguments).items()
        )
        missing = "".join(
            f"    {key}=...,  # not in any source that was read\n" for key in self.unsaid
        )
        if self.dense is None:
            start = f"from lowrank_optim import {self.taker}\n\noptimizer = {self.taker}(\n"
            return f"{start}    model.named_parameters(),\n{settings}{missing})"
        adamw = ", ".join(f"{key}={value!r}" for key, value in self.dense.items()) or "lr=..."
        return (
            "from lowrank_optim import GaLoreAdamW  # AdamW of what is trained\n"
            "from lowrank_optim.nn import convert\n\n"
            f'groups = convert(\n    model,\n    "{self.taker}",\n{settings}{missing})\n'
            f"optimizer = GaLoreAdamW(groups, {adamw})"
        )

    def about(self) -> str:
        """Batches, steps, schedule and source: the preset's own words."""
        words = inspect.getdoc(self.preset) or ""
        kept = [part for part in words.split("\n\n") if not part.startswith(("Args:", "Raises:"))]
        return "\n\n".join(part for part in kept if not part.startswith("Example:"))

    def text(self) -> str:
        """All that the command prints."""
        return f"{self.code()}\n\n{self.about()}\n\n{NO_DATA}"


def _sizes(name: str, preset: Preset, taker: str, sizes: str, **more: Any) -> dict[str, Recipe]:
    """A recipe for each of the ``sizes``, the preset's first argument."""
    (first, *_) = inspect.signature(preset).parameters
    own = more.pop("arguments", {})
    return {
        f"{name}-{size}": Recipe(preset, taker, {first: size, **own}, **more)
        for size in sizes.split()
    }


ALL = "60m 130m 350m 1b 7b"
SST = "opt-125m opt-350m opt-1.3b llama-130m llama-1.3b"
FORGETS = {"error_feedback": False}
RECIPES: dict[str, Recipe] = {
    **_sizes("galore", presets.galore_pretrain, "GaLoreAdamW", ALL),
    **_sizes("golore", presets.golore_pretrain, "GaLoreAdamW", "60m",
             unsaid=("scale", "eps", "weight_decay")),
    **_sizes("fira", presets.fira_pretrain, "FiraAdamW", ALL),
    **_sizes("frugal", presets.frugal_pretrain, "FrugalAdamW", ALL),
    **_sizes("apollo", presets.apollo_pretrain, "ApolloAdamW", "60m 1b 7b"),
    **_sizes("apollo-mini", presets.apollo_pretrain, "ApolloAdamW", "60m 130m 7b",
             arguments={"mini": True}),
    **_sizes("ldadam", presets.ldadam_pretrain, "LDAdamW", "350m"),
    **_sizes("ldadam-no-errors", presets.ldadam_pretrain, "LDAdamW", "350m", arguments=FORGETS),
    "dct": Recipe(presets.dct_release, "DCTAdamW", unsaid=("lr", "weight_decay", "rank")),
    **_sizes("sst", presets.sst_pretrain, "SSTAdamW", SST, unsaid=("lr", "weight_decay")),
    **_sizes("switchlora", presets.switchlora_pretrain, "SwitchLoRAAdamW", "350m 1.3b"),
    **_sizes("sltrain", presets.sltrain_pretrain, "sltrain", "60m 130m 350m 1b",
             dense={"lr": 3e-3, "weight_decay": 0.0}),
    **_sizes("lost", presets.lost_pretrain, "lost", "130m", dense={},
             unsaid=("rank", "density")),
    **_sizes("lisa", presets.lisa_finetune, "LisaAdamW", "llama2-7b"),
    **_sizes("badam", presets.badam_finetune, "BAdamW", "llama2-7b llama3-8b"),
}  # fmt: skip
"""One or more for each paper that :mod:`lowrank_optim.presets` has; GLUE is not among them."""
