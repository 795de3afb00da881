"""What older versions of Triton's interpreter lack."""

from __future__ import annotations

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


if INTERPRETED:
    from triton.runtime import interpreter

    mend(interpreter)
