"""``ZeroRedundancyOptimizer``: the optimizer of a rank has some parameters, in another order."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from traceback import walk_stack
from typing import Any

from torch import Tensor

from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.groups import Group, canonical
from lowrank_optim.subspaces.block import takes_blocks

MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
CALLERS = ("_init_local_optimizer", "add_param_group")
"""Its methods that give parameters to the optimizer of a rank."""


def enclosing() -> Any:
    """The ``ZeroRedundancyOptimizer`` whose call this is part of; None if there is none."""
    module = sys.modules.get(MODULE)
    for frame, _ in () if module is None else walk_stack(sys._getframe(1)):
        owner = frame.f_locals.get("self") if frame.f_code.co_name in CALLERS else None
        if issubclass(type(owner), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return owner
    return None


def places(owner: Any) -> dict[Tensor, int]:
    """The place of each parameter among those of all ranks: that of one process."""
    return {p: n for n, p in enumerate(p for g in owner.param_groups for p in g["params"])}


def check_whole(owner: Any, group: Group) -> None:
    """Raise if a rank cannot step its parameters of a group as one process would.

    Args:
        owner: what gave the group.
        group: a completed one.

    Raises:
        ValueError: what a step does depends on all parameters of the group, or on names.
    """
    name = "ZeroRedundancyOptimizer"
    if any(g.get("form") or g.get("factor_starts") for g in owner.param_groups):
        raise ValueError(
            f"{name} may give the factors of one layer to different ranks, and none could step "
            "it: train the weights themselves (lowrank_groups(model), and no convert), or use "
            "DistributedDataParallel alone"
        )
    if group.get("param_names") is not None:
        raise ValueError(
            f"{name} gives each rank some parameters of a group, in another order, and the names "
            "of all of them, so that a parameter would get the name of another: delete "
            "'param_names' from the groups, and set rank (None for dense) in each of them"
        )
    if takes_blocks(group) and group.get("rank") is not None:
        raise ValueError(
            f"{_turns(group)} among all tensors of a group, of which {name} shows "
            "each rank some: use projector='columns', or DistributedDataParallel alone"
        )
    asked = "rank" in canonical(owner.defaults) and not from_constructor(owner, group)
    if asked and not owner.initialized:  # of a later group it is known to be its own
        raise ValueError(
            f"rank={group['rank']} in a group, and another in the constructor, which {name} puts "
            "into every group that has none, where one process would leave them dense: set rank "
            "(None for dense) in each group, and not in the constructor"
        )


def _turns(group: Group) -> str:
    if group.get("layers") is not None:
        return f"layers={group['layers']!r} take turns"
    return "projector='block' takes turns"


def from_constructor(owner: Any, group: Group) -> bool:
    """Whether the rank of a group was that of the constructor, which is put into every group."""
    own = canonical(owner.defaults)
    return "rank" in own and own["rank"] == group.get("rank")


def check_loads(owner: Any, optimizer: PlannedOptimizer) -> None:
    """Let whatever its ``load_state_dict`` gives to a rank be checked and copied, as by ours.

    It writes into the state of the rank's optimizer by itself, what fits and what does not, and
    without a copy: the next step would change the checkpoint that the caller holds.
    """

    def loaded(_: Any, incoming: dict[str, Any]) -> None:
        try:
            optimizer.load_state_dict(own_part(optimizer, places(owner), incoming))
        except Exception as error:
            optimizer.state.clear()
            error.add_note(
                "ZeroRedundancyOptimizer had replaced the state before: that of this rank is empty "
                "now, and would start again"
            )
            raise

    owner.register_load_state_dict_pre_hook(loaded)


def own_part(
    optimizer: PlannedOptimizer, at: Mapping[Tensor, int], whole: Mapping[str, Any]
) -> dict[str, Any]:
    """What a rank's optimizer has of a consolidated state dict, whose keys are places."""
    groups = [
        {**saved, "params": [at[p] for p in mine["params"]]}
        for saved, mine in zip(whole["param_groups"], optimizer.param_groups, strict=True)
    ]
    own = [n for group in groups for n in group["params"]]
    state = {n: whole["state"][n] for n in own if whole["state"].get(n) is not None}
    return {"state": state, "param_groups": groups}
