"""What an estimate says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowrank_optim.engine.summary import binary

WASTE = 0.06
"""Share of a peak that torch's allocator took beyond it, at most, of what was measured on a GPU."""
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
"""The setting of torch with which it was a hundredth."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that training will hold."""

    weights: int
    """Parameters, tied ones once; buffers are not counted."""
    gradients: int
    """One gradient of every trainable parameter."""
    largest_gradient: int
    """The largest of them: all that lives at once when each is stepped inside backward."""
    live_gradients: int
    """What of them lives at the worst moment of the worst backward.

    All, the largest, or coordinates with those that stay whole. One that is on its way to where it
    is added up, or to its coordinates, counts too.
    """
    basis: int
    moments: int
    other: int
    """Counters, indices, the maps of quantised formats, SwitchLoRA's pools."""
    in_backward: Literal["project", "step"] | None = None
    """What happens to gradients inside backward; decides :attr:`live_gradients`."""
    host: int = 0
    """The part of the state in host memory: moments with ``state_device="cpu"``, SwitchLoRA's
    pools. It is not in the peak."""
    pinned: int = 0
    """What these take of the host beside a GPU: torch rounds each pinned moment up to a power of
    two."""
    staging: int = 0
    """Two buffers on the device, through which moments in host memory pass in a step."""
    rounding: int = 0
    """What the allocator takes for weights, state and staging beyond their bytes. On a GPU it gives
    blocks, of multiples of 512 bytes, and a weight has the rest of its segment up to 1 MiB. In
    figures of gradients, activations and steps a tensor counts as its block."""
    activations: int | None = None
    """What forward and backward need beside the live gradients; None where nobody asked."""
    step_transients: int | None = None
    """What a step needs in passing beyond all that is held, where no basis is due: of all
    parameters, or with ``in_backward="step"`` of the one that needs most. None where the optimizer
    cannot step without memory, and of DTensors."""
    refresh_transients: int | None = None
    """The same of the worst step that finds bases, the first included; 0 where there are none."""
    beside: Mapping[str, int] = field(default_factory=dict, hash=False)
    """What is alive beside weights and state at the worst moment of ``"backward"``, of a ``"step"``
    without a refresh, and of a ``"refresh"``; the last two may be inside backward. Where layers
    or tensors take turns, each is the worst of all turns; of several GPUs, of all of them."""
    world_size: int | None = None
    """GPUs among which FSDP2 shards the model: all figures but :attr:`beside` are of the first,
    whose weights and state are the most. None of a model that nobody shards, or that came
    sharded."""
    rank: int | None = None
    """The GPU with the highest peak, which is :attr:`peak`: the first, or one that finds larger
    bases. None without ``world_size``."""
    least: int | None = None
    """Weights and state of the GPU that holds the least; None without ``world_size``."""
    turn: tuple[str, ...] | None = None
    """Of layers that train a few at a time, those of the turn with the highest peak, of which all
    figures are but :attr:`beside`; None where all train."""
    gathered: int | None = None
    """What FSDP2 gathers and reduces at the worst moment of a backward without activations, beside
    the shards of gradients; None without ``world_size``."""

    @property
    def state(self) -> int:
        """What :func:`report` will say once the optimizer has stepped."""
        return self.basis + self.moments + self.other

    @property
    def held(self) -> int:
        """Weights, state and staging buffers, on the device: what is there all the time."""
        return self.weights + self.state - self.host + self.staging + self.rounding

    @property
    def peak(self) -> int:
        """What is alive on the device at the worst moment."""
        return self.held + max(self.beside.values(), default=0)

    @property
    def peak_at(self) -> str:
        """Which moment that is: ``"backward"``, ``"step"`` or ``"refresh"``."""
        return max(self.beside, key=self.beside.__getitem__)

    def fits(self, budget: float) -> bool:
        """Whether the peak is within ``budget`` bytes; activations count if they are known."""
        return self.peak <= budget

    def is_tight(self, budget: float) -> bool:
        """Whether it fits, but leaves less than the allocator of a GPU may waste.

        Not where activations are not known. Nor on a CPU, whose allocator has no blocks.
        """
        known = self.activations is not None and self.rounding != 0
        return known and self.peak <= budget < (1 + WASTE) * self.peak

    def __str__(self) -> str:
        """One figure a line."""
        note = "  (coordinates, dense ones, those whose basis is due, and one in flight)"
        if self.in_backward != "project":
            freed = self.in_backward is not None and self.live_gradients == self.largest_gradient
            note = "  (the largest: freed inside backward)" if freed else ""
        rows = [
            ("weights", self.weights, ""),
            ("gradients", self.live_gradients, note),
            ("basis", self.basis, ""),
            ("moments", self.moments, ""),
            ("other state", self.other, ""),
        ]
        if self.staging:
            rows += [("on the host", self.host, "  (of these, not in the peak)")]
            rows += [("staging", self.staging, "  (two buffers that they pass through)")]
        if self.gathered is not None:
            rows.append(("gathered", self.gathered, "  (weights, and gradients to be reduced)"))
        if self.rounding > 0:
            rows.append(("in blocks", self.rounding, "  (what the allocator takes beyond these)"))
        if self.activations is not None:
            rows.append(("activations", self.activations, ""))
        if self.step_transients is not None:
            rows.append(("a step", self.step_transients, "  in passing"))
        if self.refresh_transients:
            rows.append(("a refresh", self.refresh_transients, "  in passing"))
        turn = "" if self.turn is None else f", in the turn of {', '.join(self.turn)}"
        rank = f" of rank {self.rank}" if self.rank else ""
        at = f"  at the {self.peak_at}{rank}{turn}{self._not_counted()}"
        rows.append(("peak", self.peak, at))
        return "\n".join(f"{name:<12}{binary(size):>12}{note}" for name, size, note in rows)

    def _not_counted(self) -> str:
        missing = ["activations"] * (self.activations is None)
        missing += ["what a step needs in passing"] * (self.step_transients is None)
        return f", without {' or '.join(missing)}" if missing else ""
