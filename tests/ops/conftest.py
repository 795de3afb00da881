"""Triton's interpreter, where it is older than NumPy."""

from __future__ import annotations

from typing import Any

from tests.ops.interpreted import INTERPRETED


def mend(interpreter: Any) -> None:
    """Let a bound of a loop be an array of one element, as it is in the interpreter.

    Up to Triton 3.6 it calls ``int`` on it, which NumPy 2.4 takes of arrays of no dimension alone.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda x: int(x.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    from triton.runtime import interpreter

    mend(interpreter)
