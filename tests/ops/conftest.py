"""What Triton's interpreter lacks."""

from __future__ import annotations

import inspect
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

    def patched(fn: Any) -> Any:
        modules = filter(inspect.ismodule, fn.__globals__.values())
        seen = frozenset(id(x) for x in modules if x in (interpreter.tl, interpreter.tl.core))
        if seen not in scopes:
            scopes[seen] = patch(fn)
            if scopes[seen] is not None:  # what is to be put back; older versions leave that
                scopes[seen]._changes.clear()
        return scopes[seen]

    interpreter._patch_lang = patched


if INTERPRETED:
    from triton.runtime import interpreter

    mend(interpreter)
    patch_once(interpreter)
