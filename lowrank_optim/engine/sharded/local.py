"""The part of a parameter that is here, and of its state, as plain tensors for the engine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies, init_state, on_host
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.matrix import MatrixView


class LocalState(MutableMapping[str, Tensor]):
    """The state of a parameter as this rank has it; what is put in becomes a DTensor outside.

    An entry is split where it grows with what the ranks divide among them, and is else the same
    on all of them. Counters stay plain tensors on the host.
    """

    def __init__(self, outer: dict[str, Tensor], item: ParamPlan, chosen: Strategies) -> None:
        self.outer = outer
        """What the optimizer keeps."""
        assert item.part is not None
        self._part = item.part
        self._dims = split_dims(item, chosen)

    def __getitem__(self, key: str) -> Tensor:
        """The part that is here."""
        return local(self.outer[key])

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

    def load(self, key: str, x: Tensor) -> None:
        """Take in a whole entry, or a DTensor however it lies."""
        if not on_host(key):
            places = self._placements(key)
            if not is_sharded(x):  # every rank has it: none need send any
                x = as_dtensor(x, self._part.mesh, self._part.placed(None), x.shape)
            if tuple(x.placements) != places:  # type: ignore[attr-defined]
                x = x.redistribute(placements=places)  # type: ignore[attr-defined]
        self.outer[key] = x

    def _placements(self, key: str) -> tuple[Any, ...]:
        if self._part.side == "entries":
            return self._part.placements
        return self._part.placed(self._dims[key][0] if key in self._dims else None)

    def _whole(self, key: str, x: Tensor) -> Tensor:
        """A part as a DTensor of the parameter's mesh; nobody else is asked."""
        if on_host(key) or is_sharded(x):
            return x
        shape = list(self._part.shape if self._part.side == "entries" else x.shape)
        if key in self._dims:
            dim, size = self._dims[key]
            shape[dim] = size
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
        kept.update(init_state(stepped(item, like), chosen, like))
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
    n = 1
    for size in shape[1:]:
        n *= size
    return MatrixView(shape, (), shape[0], n, False)


def split_dims(item: ParamPlan, chosen: Strategies) -> dict[str, tuple[int, int]]:
    """The dimension along which each entry of a state is split, and its size in all."""
    part, view, subspace = item.part, item.view, item.subspace
    assert part is not None
    if view is None or subspace is None or part.side in ("whole", "entries"):
        return {}
    return _split_dims(view, subspace, chosen, part.side == "batch", item.param.dtype)


@functools.lru_cache(maxsize=1024)
def _split_dims(
    view: MatrixView, subspace: Subspace, chosen: Strategies, batch: bool, dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Found by what a state would be of one column, or one matrix, more."""
    larger = view._replace(batch=(view.batch[0] + 1,)) if batch else view._replace(n=view.n + 1)
    shapes = []
    for own in (view, larger):
        like = torch.empty(view.shape, dtype=dtype, device="meta")
        item = ParamPlan(like, "", 0, 0, own, subspace)
        shapes.append({k: tuple(x.shape) for k, x in init_state(item, chosen, like).items()})
    found = {}
    for key, shape in shapes[0].items():
        grown = [i for i, (a, b) in enumerate(zip(shape, shapes[1][key], strict=True)) if a != b]
        if grown:
            found[key] = grown[0], shape[grown[0]]
    return found


def meta_state(item: ParamPlan, chosen: Strategies, active: bool | None = None) -> State:
    """The state of a parameter as it will be on this rank, of tensors without data."""
    if item.part is None or not item.part.sharded:
        return init_state(item, chosen, torch.empty_like(item.param, device="meta"), active)
    like = torch.empty_like(local(item.param), device="meta")
    return init_state(stepped(item, like), chosen, like, active)


def whole_meta_state(item: ParamPlan, chosen: Strategies, active: bool | None = None) -> State:
    """The same of all ranks together: the shapes that DTensors say they have."""
    like = torch.empty(item.param.shape, dtype=item.param.dtype, device="meta")
    return init_state(item, chosen, like, active)
