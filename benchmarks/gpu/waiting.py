"""What a refresh may make the host of an accelerator wait for: the table of docs/performance.md.

Places are a file of the package and a function, or a file alone. No step without a refresh waits.
"""

from __future__ import annotations

from collections.abc import Collection

EIGH = "subspaces/randomized.py eigh"
SVD = "subspaces/svd.py _driven"
FACTORISATIONS = {
    EIGH: "torch has no eigh that keeps its status on the device",
    SVD: "torch has no svd that keeps its status there",
}
"""Once for all equal matrices of a step, for both of their sides."""
RESTART = {"subspaces/lora.py balanced": "torch has no svd that keeps its status there"}
"""Of SwitchLoRA with ``restart_every``."""
SPECTRAL = {"subspaces/factors.py _driven"}
"""Of SST at the beginning of a round: torch has no svd that keeps its status there."""
PROJECTORS = {"svd": {SVD}, "rsvd": {EIGH, SVD}}
"""Of others a refresh waits for nothing."""


def refresh_may_wait(name: str, projector: str) -> Collection[str]:
    """Where a refresh of a class may wait.

    Args:
        name: of the class.
        projector: of its groups.
    """
    if name.startswith("SST"):
        return SPECTRAL
    return PROJECTORS.get(projector, ())


def is_allowed(place: str, allowed: Collection[str]) -> bool:
    """Whether ``subspaces/svd.py:41 function`` is one of these places."""
    file, _, rest = place.removeprefix("lowrank_optim/").partition(":")
    return file in allowed or f"{file} {rest.partition(' ')[2]}" in allowed
