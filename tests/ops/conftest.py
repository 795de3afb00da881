"""What Triton's interpreter lacks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

from tests.ops.interpreted import INTERPRETED


def mend(interpreter: Any) -> None:
    """Bounds of loops and masks are as those of a compiled kernel.

    A bound is an array of one element: up to Triton 3.6 the interpreter calls ``int`` on it, which
    NumPy 2.4 takes of arrays of no dimension alone. That of 3.2 has no type of one bit.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda x: int(x.handle.data.item())

    interpreter._patch_lang_tensor = patched
    builder, bit = interpreter.InterpreterBuilder, interpreter.tl.int1
    if not hasattr(builder, "get_int1_ty"):
        ones = builder.get_all_ones_value
        builder.get_int1_ty = lambda self: bit
        builder.get_all_ones_value = lambda self, x: self.get_int1(1) if x == bit else ones(self, x)


def patch_once(interpreter: Any) -> None:
    """The language is replaced once, and not at each launch and each call of a device function.

    Nothing is compiled in this process, so that it need not be put back; that took a quarter of
    the time.
    """
    patch, scopes = interpreter._patch_lang, dict[frozenset[int], Any]()
    of_module: dict[str, frozenset[int]] = {}

    def patched(fn: Any) -> Any:
        if fn.__module__ not in of_module:
            modules = filter(inspect.ismodule, fn.__globals__.values())
            own = (x for x in modules if x in (interpreter.tl, interpreter.tl.core))
            of_module[fn.__module__] = frozenset(map(id, own))
        seen = of_module[fn.__module__]
        if seen not in scopes:
            scopes[seen] = patch(fn)
            if scopes[seen] is not None:  # what is to be put back; older versions leave that
                scopes[seen]._changes.clear()
        return scopes[seen]

    interpreter._patch_lang = patched


def spare(interpreter: Any) -> None:
    """What is made anew for each value and is always the same is made once: most of the time.

    Checks of overflow are left out. Each asks for five operations more, and what they find is used
    with ``debug=True`` alone.
    """
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    core = interpreter.tl.core
    for kind in (core.pointer_type, core.block_type):  # equal ones have one name
        kind.__hash__ = core.dtype.__hash__
    made_once(core.tensor, lambda handle, type: type, lambda handle, type: {"handle": handle})
    made_once(core.block_type, lambda element_ty, shape: (element_ty, *map(int, shape)))
    equal = core.block_type.__eq__

    def alike(a: Any, b: Any) -> bool:
        shared = isinstance(b, core.block_type) and a.shape is b.shape
        return a.element_ty == b.element_ty if shared else equal(a, b)

    core.block_type.__eq__ = alike


def made_once(
    cls: Any,
    key: Callable[..., Hashable],
    own: Callable[..., dict[str, Any]] = lambda *_: {},
) -> None:
    """Objects of a class share attributes where their keys are equal, but for their ``own``."""
    first, known = cls.__init__, dict[Hashable, dict[str, Any]]()

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        of = key(*args, **kwargs)
        if of not in known:
            first(self, *args, **kwargs)
            known[of] = dict(vars(self))
        vars(self).update(known[of], **own(*args, **kwargs))

    cls.__init__ = init


if INTERPRETED:
    from triton.runtime import interpreter

    mend(interpreter)
    patch_once(interpreter)
    spare(interpreter)
