"""A plugin for axolotl: GaLore's names, or any optimizer of this package, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowrank_optim.groups.keys import METHODS
from lowrank_optim.integrations.released import as_apollo_torch, as_galore_torch
from lowrank_optim.integrations.transformers import TrainerOptimizer, trainer_optimizer

if TYPE_CHECKING:
    BasePlugin: Any = object
    BaseModel: Any = object
else:
    try:  # what axolotl brings, and nothing else here needs
        from axolotl.integrations.base import BasePlugin
        from pydantic import BaseModel
    except ImportError:
        BasePlugin = BaseModel = object

__all__ = ["LowRankArgs", "LowRankPlugin"]

SECTION = "lowrank_optim"
"""The key of the config."""

PLAIN = (None, "adamw_torch", "adamw_torch_fused")
"""Values of ``optimizer`` beside a section of this package's, which is the optimizer then."""

OWN_GROUPS = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
"""Arguments of axolotl that make groups, which those of this package would take the place of."""


class LowRankArgs(BaseModel):  # type: ignore[misc]
    """What the plugin adds to the config."""

    lowrank_optim: dict[str, Any] | None = None


class LowRankPlugin(BasePlugin):  # type: ignore[misc]
    """axolotl's optimizers by this package.

    ``plugins: [lowrank_optim.integrations.axolotl.LowRankPlugin]`` alone makes ``optimizer:
    galore_adamw`` and its like find this package, see
    :func:`lowrank_optim.integrations.as_galore_torch`. With a section ``lowrank_optim:`` in the
    config its ``method`` is trained with, and its other keys go to
    :func:`lowrank_optim.integrations.transformers.trainer_optimizer`.

    Raises:
        ValueError: a method or a key of the section is not known, or the config asks for another
            optimizer, or for groups of its own, too.
        RuntimeError: the config asks for GaLore, and galore-torch is installed.
    """

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Stand in for the released package that ``optimizer`` names, and check the section."""
        asked = str(cfg.get("optimizer") or "")
        for name, register in (("galore_", as_galore_torch), ("apollo_", as_apollo_torch)):
            if asked.startswith(name):
                register()
        if cfg.get(SECTION) is not None:
            self._section(cfg)

    def get_input_args(self) -> str:
        """Name of the model of the section."""
        return f"{__name__}.LowRankArgs"

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Any) -> list[Any]:
        """Give the trainer its optimizer; there are no callbacks."""
        if cfg.get(SECTION) is None:
            return []
        method, options = self._section(cfg)
        ours = [key for key in OWN_GROUPS if getattr(trainer.args, key, None) is not None]
        if ours:
            raise ValueError(
                f"{ours[0]} makes groups of axolotl's, and {SECTION} makes its own: leave it out, "
                f"and give {SECTION}.overrides, such as {{embed_tokens: {{lr: 1e-5}}}}"
            )
        _, choice = trainer_optimizer(trainer.args, METHODS[method], **options)
        trainer.optimizer_cls_and_kwargs = (_OfAxolotl, choice)
        return []

    def _section(self, cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The method, and the other keys.

        Raises:
            ValueError: the section is malformed, or the config names another optimizer.
        """
        section, asked = cfg[SECTION], cfg.get("optimizer")
        if not isinstance(section, Mapping):
            raise ValueError(f"{SECTION} must be a section of keys, such as rank, got {section!r}")
        options = dict(section)
        method = options.pop("method", "GaLoreAdamW")
        if method not in METHODS:
            raise ValueError(
                f"{SECTION}.method must be one of {', '.join(sorted(METHODS))}, got {method!r}"
            )
        if getattr(asked, "value", asked) not in PLAIN:
            raise ValueError(
                f"optimizer: {getattr(asked, 'value', asked)} and the section {SECTION} both name "
                "an optimizer: write optimizer: adamw_torch, or leave the section out"
            )
        return method, options


class _OfAxolotl:
    """The factory as axolotl calls it, which hands its arguments on too."""

    def __call__(self, model: Any, training_args: Any = None, /, **choice: Any) -> Any:
        return TrainerOptimizer()(model, **choice)
