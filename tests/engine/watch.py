"""What a step would make the host of an accelerator wait for, and what it launches; on the CPU.

Under :class:`Watch` the package takes the CPU for an accelerator (:data:`lowrank_optim.ops.devices.
HOSTS` is empty), and a tensor is one of the host or one of the device by where it comes from: what
is made without a device is the host's, as are the counters and the ``host.`` entries of a state;
parameters, gradients, all other state, and all that is computed from a tensor of the device, are
the device's.

Hooks of autograd run without torch's function modes: what they do with values is seen there, and
copies between the host and the device are not.

    with Watch(optimizer) as seen:
        optimizer.step()
    seen.looks       # Counter of (what, where in the package)
    seen.launches    # Counter of kernels by name; seen.gemms of matrix products

What a call launches is in one table, :mod:`benchmarks.op_costs` for the package's ops and
:mod:`benchmarks.counting` for torch's. The lifts hold their products inside one kernel; the native
CUDA backend has a GEMM and a pass for each matrix in their place. The copy of a table of pointers
from pinned memory, one for a list, is no kernel, and nobody waits for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import lowrank_optim
from benchmarks.counting import FREE, launches_of
from lowrank_optim import LowRankOptimizer
from lowrank_optim.engine import answers
from lowrank_optim.engine.state import on_host
from lowrank_optim.ops import devices

aten = torch.ops.aten
PACKAGE = Path(lowrank_optim.__file__).parent

LOOKS: dict[Any, str] = {
    aten._local_scalar_dense: "a value is read",
    aten.equal: "a value is read",
    aten.nonzero: "the size of the result depends on values",
    aten.masked_select: "the size of the result depends on values",
    aten._unique2: "the size of the result depends on values",
    aten.unique_dim: "the size of the result depends on values",
    aten.unique_consecutive: "the size of the result depends on values",
    aten.bincount: "the size of the result depends on values",
    aten.repeat_interleave: "the size of the result depends on values",
    # torch reads the solver's status: _linalg_check_errors
    aten._linalg_check_errors: "the status of a factorisation is read",
    aten._linalg_eigh: "the status of a factorisation is read",
    aten._linalg_svd: "the status of a factorisation is read",
    aten.linalg_eig: "the status of a factorisation is read",
    aten.linalg_cholesky: "the status of a factorisation is read",
    aten.linalg_inv: "the status of a factorisation is read",
    aten._linalg_det: "the status of a factorisation is read",
    aten._linalg_solve_ex: "",  # the _ex forms return it
}
"""Ops for which the host waits until the device has done all that was asked of it."""

VALUES = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""What reads the memory of a tensor without asking an op; on an accelerator it is copied."""

INDEXING = {Tensor.__getitem__, Tensor.__setitem__}

FACTORIES = {
    torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange,
    torch.eye, torch.linspace, torch.randn, torch.rand, torch.randint, torch.randperm,
    torch.from_numpy,
}  # fmt: skip
"""Made on the host, unless a device is given."""

_COPIED = {torch.tensor, torch.as_tensor, torch.from_numpy}
"""Those whose numbers are the host's, whatever the device."""

GEMMS = {
    aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.matmul, aten.mv,
    aten.addmv, aten.addmv_, aten.dot, torch.ops.lowrank_optim.addmm_,
}  # fmt: skip


class Watch:
    """Records the looks and the launches of its ``with`` block.

    Args:
        optimizer: whose state tells counters from what is on the device.
        host: tensors beside its counters that are the host's.
    """

    def __init__(self, optimizer: LowRankOptimizer | None = None, *host: Tensor) -> None:
        self.looks: Counter[tuple[str, str]] = Counter()
        """What a host would wait for: (what, "file:line function" of the package)."""
        self.launches: Counter[str] = Counter()
        self.gemms: Counter[str] = Counter()
        """Those of :attr:`launches` that are matrix products."""
        self.answers = 0
        """What was asked of the device a step ago (:mod:`lowrank_optim.engine.answers`)."""
        self._hosts = WeakTensorKeyDictionary()
        self._given = host
        self._optimizer = optimizer
        self._inside = self._of_host = False
        self._stack = ExitStack()

    @property
    def where(self) -> Counter[str]:
        """Looks by file and function, without their lines."""
        found: Counter[str] = Counter()
        for (_, place), count in self.looks.items():
            file, _, function = place.partition(":")
            found[f"{file} {function.split()[-1]}"] += count
        return found

    def __enter__(self) -> Self:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(devices, "HOSTS", frozenset())
        patch.setattr(answers.Told, "read", self._counted(answers.Told.read))
        for x in self._given:
            self._hosts[x] = True
        if self._optimizer is not None:  # what is the host's of a state is known by its keys
            self._optimizer._make_state()
        for group in () if self._optimizer is None else self._optimizer.param_groups:
            for param in group["params"]:
                for key, x in self._optimizer.state.get(param, {}).items():
                    if isinstance(x, Tensor) and on_host(key, group["capturable"]):
                        self._hosts[x] = True
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Ops(self))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def _counted(self, read: Callable[[answers.Told], Tensor]) -> Callable[[answers.Told], Tensor]:
        def counted(told: answers.Told) -> Tensor:
            if told.here is not None:
                self._hosts[told.here] = True
                self.answers += 1
            return read(told)

        return counted

    def is_host(self, x: Tensor) -> bool:
        """Whether a tensor is one of the host."""
        return x in self._hosts

    def look(self, what: str) -> None:
        """Count one, with the innermost place of the package that is not a wrapper of an op."""
        place = "?"
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
                place = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
                break
            frame = frame.f_back
        self.looks[what, place] += 1

    # ---------------------------------------------------------------- what the modes report

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """One function of torch as the package wrote it."""
        if func in FACTORIES and isinstance(out, Tensor):
            if kwargs.get("device") is None:
                self._hosts[out] = True
            elif func is not torch.empty:
                self.launches[func.__name__] += 1
            if kwargs.get("device") is not None and func in _COPIED:
                self.look("numbers of the host are copied to the device")
        elif func in INDEXING and not self.is_host(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                self.look("indices of the host are copied to the device")
            indexed = any(isinstance(i, Tensor) and i.dtype != torch.bool for i in index)
            if indexed and func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
                self.look("a number is copied to the device")  # as a tensor of the host
        elif func in VALUES and not self.is_host(args[0]):
            self.look("a value is read")
            if isinstance(out, Tensor):
                self._hosts[out] = True
        elif func is Tensor.to and self.is_host(args[0]) and isinstance(out, Tensor):
            self._moved(args, kwargs, out)

    def _moved(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A tensor of the host that is asked for by a device, or by another tensor."""
        targets = [*args[1:2], kwargs.get("device"), kwargs.get("other")]
        onto = any(
            isinstance(t, torch.device) or (isinstance(t, Tensor) and not self.is_host(t))
            for t in targets
        )
        if not onto:
            return
        if not kwargs.get("non_blocking") or not args[0].numel():
            self.look("a tensor of the host is copied to the device")
        if out is args[0]:  # on the CPU nothing moves: what is kept of it counts as the device's
            self._hosts.pop(out)
        else:
            self._hosts.pop(out, None)

    def dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """One op before it runs; whether its results are the host's."""
        given = _tensors(args, kwargs)
        hosts = [x for x in given if self.is_host(x)]
        if given and (len(hosts) == len(given) or self._of_host):
            return True
        packet = func.overloadpacket
        if LOOKS.get(packet):
            self.look(LOOKS[packet])
        elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.look("the size of the result depends on values")
        if packet is aten.copy_ and any(map(self.is_host, given)):
            to_host = self.is_host(given[0])
            if not (args[2:3] or [kwargs.get("non_blocking")])[0]:
                ways = ("host is copied to the device", "device is copied to the host")
                self.look(f"a tensor of the {ways[to_host]}")
            if to_host:
                return True
        elif any(x.dim() for x in hosts):
            self.look("a tensor of the host among those of the device")
        self._launched(func, given, args, kwargs)
        return False

    def _launched(
        self, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        packet, name = func.overloadpacket, func._opname
        if func.namespace == "lowrank_optim" or (given and not func.is_view and packet not in FREE):
            launches = launches_of(func, args, kwargs)
            self.launches[name] += launches
            if packet in GEMMS:
                self.gemms[name] += launches


class _Functions(TorchFunctionMode):
    """Which tensors are made on the host, and what reads memory without an op."""

    def __init__(self, seen: Watch) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, seen = kwargs or {}, self.seen
        if seen._inside or func.__name__ == "__get__":  # attributes; views among them are ops
            return func(*args, **kwargs)
        # numbers and lists become tensors of the host on the way
        given = _tensors(args, kwargs)
        seen._of_host = bool(given) and all(map(seen.is_host, given))
        try:
            out = func(*args, **kwargs)
        finally:
            seen._of_host = False
        seen.called(func, args, kwargs, out)
        return out


class _Ops(TorchDispatchMode):
    """Every op; those of the package as one."""

    def __init__(self, seen: Watch) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, seen = kwargs or {}, self.seen
        host = seen.dispatched(func, args, kwargs)
        if func.overloadpacket is aten.lift_fresh and _get_current_function_mode() is None:
            host = True  # numbers, within a hook of autograd
        seen._inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            seen._inside = False
        if host:
            for x in _tensors(out):
                seen._hosts[x] = True
        return out


def _tensors(*trees: Any) -> list[Tensor]:
    """All of arguments or results, in lists too."""
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict) and tree:
            found += _tensors(*tree.values())
    return found
