"""What a step sends and what it allocates, seen below every tensor subclass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")
WAITS = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")

KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
    "send": "send",
    "recv": "recv",
}
"""How ops of torch begin, and one name for each kind of collective."""


class Collective(NamedTuple):
    """One of them."""

    kind: str
    bytes: int
    """What this rank puts in: of a broadcast or a scatter what it gets, of the others its own."""
    op: str


class New(NamedTuple):
    """A storage that came into being."""

    bytes: int
    op: str
    shape: tuple[int, ...]


@dataclass(eq=False)
class Meter(TorchDispatchMode):
    """Records while it is entered: ``with Meter() as meter: optimizer.step()``."""

    collectives: list[Collective] = field(default_factory=list)
    news: list[New] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, DTensor) for x in leaves) or any(
            issubclass(t, DTensor) for t in types
        ):
            return NotImplemented  # DTensor makes local ops of it, and those come here
        name = func._schema.name
        space, _, op = name.partition("::")
        known = {_storage(x) for x in leaves}
        out = func(*args, **kwargs)
        if space in NAMESPACES and op not in WAITS:
            self.collectives.append(Collective(kind_of(op), sent(op, args, kwargs), op))
        for x in tree_leaves(out):
            # a tensor of torch.distributed's own may stand for one that is under way
            if not isinstance(x, Tensor) or type(x) is not Tensor or x.is_meta:
                continue
            if _storage(x) not in known:
                self.news.append(New(x.untyped_storage().nbytes(), name, tuple(x.shape)))
        return out

    @property
    def largest(self) -> int:
        """Bytes of the largest new storage."""
        return max((new.bytes for new in self.news), default=0)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(Counter(c.kind for c in self.collectives))

    @property
    def bytes(self) -> dict[str, int]:
        """How much of each kind."""
        found: Counter[str] = Counter()
        for c in self.collectives:
            found[c.kind] += c.bytes
        return dict(found)


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def kind_of(op: str) -> str:
    """Which kind of collective an op of torch is.

    Raises:
        AssertionError: none that is known here.
    """
    plain = op.lstrip("_").replace("reducescatter", "reduce_scatter")
    for start in sorted(KINDS, key=len, reverse=True):
        if plain.startswith(start):
            return KINDS[start]
    raise AssertionError(f"a collective that the meter does not know: {op}")


def sent(op: str, args: Any, kwargs: Any) -> int:
    """Bytes of the input of a collective; its output comes first where it is an argument."""
    tensors = [x for x in (*args, *kwargs.values()) if _holds_tensors(x)]
    output_first = not op.startswith("all_") and any(
        word in op for word in ("gather", "scatter", "alltoall")
    )
    given = tensors[1] if output_first and len(tensors) > 1 else tensors[0]
    return sum(x.numel() * x.element_size() for x in tree_leaves(given) if isinstance(x, Tensor))


def _holds_tensors(x: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(x))
