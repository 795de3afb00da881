"""The part of a parameter that is here, and of its state, as plain tensors for the engine."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.forms import forms_of
from lowrank_optim.engine.state import init_state, moment_shapes, on_host, resting_keys
from lowrank_optim.engine.tracing import fake_mode, real_entries
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import pinned
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.sharding.regions import corner
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.matrix import MatrixView


class LocalState(MutableMapping[str, Tensor]):
    """The state of a parameter as this rank has it; what is put in becomes a DTensor outside.

    An entry is split where it grows with what the ranks divide among them, and is else the same
    on all of them. What is the same and on the host, as counters, stays a plain tensor. What is
    kept in blocks is a DTensor of blocks (:mod:`lowrank_optim.engine.sharded.forms`).
    """

    def __init__(self, outer: dict[str, Tensor], item: ParamPlan, chosen: Strategies) -> None:
        self.outer = outer
        """What the optimizer keeps."""
        assert item.part is not None
        self._part = item.part
        self._forms = forms_of(item, chosen)
        self._moments = moment_shapes(item, chosen)
        self._slots = {slot.name: slot for slot in chosen.rule.slots(item.part.shape)}
        self._lead = tuple(local(item.param).shape[:-1])
        self._resting = frozenset(resting_keys(item, chosen))

    def __getitem__(self, key: str) -> Tensor:
        """The part that is here."""
        x = local(self.outer[key])
        form = self._forms.get(key)
        if form is None:
            return x
        return form.seen(x, 0 if self._part.stepped is None else self._part.stepped.n)

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Keep a part as one of the whole."""
        self.outer[key] = self._whole(key, value)

    def __delitem__(self, key: str) -> None:
        """As of any dict."""
        del self.outer[key]

    def __iter__(self) -> Iterator[str]:
        """Keys."""
        return iter(self.outer)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.outer)

    def noise(self, key: str, seed: int | Tensor) -> Noise | None:
        """Seed and positions, in the whole moment, of what is here; None where every rank has it.

        Of the moment as one process has it, whatever it is kept in: blocks and bytes have others.
        """
        x: Any = self.outer[key]
        if not is_sharded(x):
            return None
        first, form = list(corner(x.shape, x.device_mesh, x.placements)), self._forms.get(key)
        if form is not None and form.block is not None:  # a rank begins with a block
            first[form.block : form.block + 2] = [first[form.block] * self._part.unit]
        return Noise.over(seed, self._moments[key], first)

    def load(self, key: str, x: Tensor) -> None:
        """Take in a whole entry, or a DTensor however it lies."""
        if not is_sharded(x) and key in self._forms:
            x = self._forms[key].kept(x)
        if not self.is_plain(key):
            places = self._placements(key)
            if not is_sharded(x):  # every rank has it: none need send any
                x = as_dtensor(x, self._part.mesh, self._part.placed(None), x.shape)
            if tuple(x.placements) != places:  # type: ignore[attr-defined]
                x = x.redistribute(placements=places)  # type: ignore[attr-defined]
            if not local(x).is_contiguous():
                x = as_dtensor(local(x).contiguous(), self._part.mesh, places, x.shape)
            if on_host(key) or key in self._resting:  # a mesh of devices may have taken it there
                own = pinned(local(x).cpu(), torch.device(self._part.mesh.device_type))
                x = as_dtensor(own, self._part.mesh, places, x.shape)
        self.outer[key] = x

    def is_plain(self, key: str) -> bool:
        """Whether an entry is on the host and the same on all ranks."""
        form = self._forms.get(key)
        return on_host(key) and (form is None or form.dim is None)

    def _placements(self, key: str) -> tuple[Any, ...]:
        if self._part.side == "entries":
            slot = self._slots.get(key)
            if slot is None or slot.averaged is None:
                return self._part.placements
            return without(self._part.placements, slot.averaged % len(self._part.shape))
        return self._part.placed(self._forms[key].dim if key in self._forms else None)

    def _whole(self, key: str, x: Tensor) -> Tensor:
        """A part as a DTensor of the parameter's mesh; nobody else is asked."""
        if is_sharded(x):
            return x
        form, dense = self._forms.get(key), self._part.side == "entries"
        if form is not None:
            copied_from = x.is_cpu and x.is_pinned()
            x = x.view(*self._lead, form.shape[-1]) if dense else form.blocked(x)
            if copied_from and not x.is_pinned():  # what has been filled up is a copy
                x = x.pin_memory()
            return (
                x
                if self.is_plain(key)
                else as_dtensor(x, self._part.mesh, self._placements(key), form.shape)
            )
        if self.is_plain(key):
            return x
        shape, slot = tuple(x.shape), self._slots.get(key)
        if dense:
            shape = self._part.shape if slot is None else slot.shape(self._part.shape)
        return as_dtensor(x, self._part.mesh, self._placements(key), shape)


def as_dtensor(x: Tensor, mesh: Any, places: tuple[Any, ...], shape: Sequence[int]) -> Tensor:
    """A DTensor of ``shape`` of which ``x`` is here, where it is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    size, stride = torch.Size(shape), torch.empty(tuple(shape), device="meta").stride()
    if x.device.type in (mesh.device_type, "meta"):
        whole: Tensor = DTensor.from_local(
            x, mesh, places, run_check=False, shape=size, stride=stride
        )
        return whole
    # from_local would move it to the mesh's device, away from a weight that is offloaded
    spec = DTensorSpec(mesh, places, tensor_meta=TensorMeta(size, stride, x.dtype))
    make: Any = DTensor
    kept: Tensor = make(x, spec, requires_grad=False)
    return kept


def without(placements: Sequence[Any], dim: int) -> tuple[Any, ...]:
    """Where a tensor lies of which one dimension is averaged away, on all ranks together."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def moved(place: Any) -> Any:
        if not hasattr(place, "dim"):
            return place
        if place.dim == dim:
            return Replicate()
        kept = place.dim - (place.dim > dim)
        factor = int(getattr(place, "split_factor", 1))
        return Shard(kept) if factor == 1 else _StridedShard(kept, split_factor=factor)

    return tuple(moved(place) for place in placements)


def kept_as(item: ParamPlan, chosen: Strategies, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved state as the optimizer keeps it: as it is, or as DTensors that lie as they should."""
    if item.part is None or not item.part.sharded:
        return entries
    state = LocalState({}, item, chosen)
    for key, x in entries.items():
        state.load(key, x)
    return state.outer


def local_state(item: ParamPlan, outer: dict[str, Tensor], chosen: Strategies) -> State:
    """The state of a parameter that lies on several ranks, made if there is none."""
    kept = item.local
    if not isinstance(kept, LocalState) or kept.outer is not outer:
        kept = item.local = LocalState(outer, item, chosen)
    if not outer:
        like = local(item.param)
        plan = stepped(item, like)
        kept.update(init_state(plan, chosen, like))
        if fake_mode() is not None:  # counters and draws need data
            real = real_entries(partial(init_state, plan, chosen), like)
            kept.update({key: x for key, x in real.items() if kept.is_plain(key)})
    return kept


def here(item: ParamPlan) -> ParamPlan:
    """What stands for the part of a parameter that is here: its weights, its gradient."""
    twin = weights_here(item)  # one of this step: its gradient must not outlive it
    if twin is not item and item.param.grad is not None:
        assert item.part is not None
        twin.param.grad = item.part.of(item.param.grad)
    return twin


def weights_here(item: ParamPlan) -> ParamPlan:
    """The same without a gradient."""
    if item.part is None or not item.sharded:
        return item
    weight = local(item.param).detach()
    return replace(item, param=weight, view=_view_here(item, weight), subspace=subspace_here(item))


def summed_coords(subspace: Subspace, view: MatrixView) -> list[str]:
    """Coordinates that belong to no column: they are the sum of what each rank's columns give."""
    wider = subspace.coord_shapes(view._replace(n=view.n + 1))
    return [name for name, shape in subspace.coord_shapes(view).items() if shape == wider[name]]


def subspace_here(item: ParamPlan) -> Subspace | None:
    """The subspace as a step of the columns that are here needs it."""
    part, view, subspace = item.part, item.view, item.subspace
    if part is None or not part.summed or view is None or subspace is None:
        return subspace
    return subspace.of_columns(*part.spans[part.rank], view.n)


def stepped(item: ParamPlan, weight: Tensor) -> ParamPlan:
    """What stands for the part that is stepped: columns, where other blocks are here."""
    assert item.part is not None
    if item.part.mesh is None:
        return item
    if item.part.stepped is None:
        return replace(item, param=weight, view=_view_here(item, weight))
    return replace(item, param=weight, view=item.part.stepped, subspace=subspace_here(item))


def _view_here(item: ParamPlan, weight: Tensor) -> MatrixView | None:
    assert item.part is not None
    if item.view is None or item.part.here is not None:
        return item.part.here
    shape = tuple(weight.shape)  # of a block, whose entries are alike: any matrix of them will do
    if len(shape) == 3:  # a cut of any dimension leaves rows and columns
        return MatrixView(shape, shape[:1], *shape[1:], False)
    n = 1
    for size in shape[1:]:
        n *= size
    return MatrixView(shape, (), shape[0], n, False)


def meta_state(item: ParamPlan, chosen: Strategies, active: bool | None = None) -> State:
    """The state of a parameter as it will be on this rank, of tensors without data."""
    if item.part is None or not item.part.sharded:
        return init_state(item, chosen, torch.empty_like(item.param, device="meta"), active)
    like, state = torch.empty_like(local(item.param), device="meta"), LocalState({}, item, chosen)
    state.update(init_state(stepped(item, like), chosen, like, active))
    return state.outer
