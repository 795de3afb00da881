"""Parameters seen as matrices: one canonical orientation, so that every formula is written once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lowrank_optim.ops import Noise


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are in the same storage, that of tensors without data included."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


class MatrixView(NamedTuple):
    """An n-d parameter as a batch of ``(m, n)`` matrices, **m the projected dimension**.

    A projection on the right is the same formula on the transposed view, so ``R = P^T G`` and
    ``dW = P N`` hold for both sides. The side is decided once, from the parameter's shape, and is
    never inferred from the shape of a projected tensor (the released code does, and crashes on
    ``reverse_std`` when the rank reaches the smaller dimension).
    """

    shape: tuple[int, ...]
    """Shape of the parameter."""
    batch: tuple[int, ...]
    """Leading dimensions: independent matrices, such as the experts of one layer."""
    m: int
    n: int
    flip: bool
    """Whether the canonical view is the transpose of the stored matrix."""

    def of(self, x: Tensor) -> Tensor:
        """``x`` in canonical orientation: a view wherever the strides allow one."""
        if len(self.shape) == 2:  # most are, and a reshape costs as much as a small launch
            return x.mT if self.flip else x
        rows, cols = (self.n, self.m) if self.flip else (self.m, self.n)
        x = x.reshape(*self.batch, rows, cols)
        return x.mT if self.flip else x

    def shares(self, x: Tensor, viewed: Tensor) -> bool:
        """Whether ``viewed``, which is ``of(x)``, is a view of it: of one matrix it always is."""
        return len(self.shape) == 2 or shares_memory(viewed, x)

    def noise(self, noise: Noise) -> Noise:
        """The positions of the entries of ``of(x)``, from those of x.

        Raises:
            ValueError: dimensions that the view merges are no interval of the whole.
        """
        first, strides = len(self.batch), noise.strides
        for d in range(first + 2, len(strides)):
            if strides[d - 1] != strides[d] * self.shape[d]:
                raise ValueError(f"{self.shape} with strides {strides} has no rows and columns")
        merged = noise._replace(strides=(*strides[: first + 1], strides[-1]))
        return merged.mT if self.flip else merged

    @staticmethod
    def share(part: int | float, size: int) -> int:
        """``floor(part size)`` of things counted, and one where that is none of a part above 0."""
        return max(int(part * size), int(part > 0))

    @property
    def full_rank(self) -> int:
        """``min(m, n)``, the largest rank a gradient can have."""
        return min(self.m, self.n)

    def directions(self, rank: int | float) -> int:
        """``rank`` as a number of directions: a fraction counts the projected dimension."""
        return max(1, round(rank * self.m)) if isinstance(rank, float) else rank


def row_view(shape: Sequence[int]) -> MatrixView | None:
    """A parameter of any shape as one row, a matrix as it is; None where it is empty."""
    size = math.prod(shape)
    rows, cols = shape if len(shape) == 2 else (1, size)
    return MatrixView(tuple(shape), (), rows, cols, False) if size else None


def matrix_view(
    shape: Sequence[int], proj_type: str = "std", flatten: bool = False
) -> MatrixView | None:
    """The matrix that a parameter of ``shape`` stands for, or None where there is none.

    ========================= =======================================
    shape                     seen as
    ========================= =======================================
    ``(m, n)``                one matrix
    ``(experts, m, n)``       a batch of matrices
    ``(out, in, k)``          with ``flatten``: one matrix ``(out, in * k)``
    ``(out, in, kh, kw)``, …  one matrix ``(out, in * kh * kw)``
    0-d, 1-d, a side of 1     None: nothing to project
    ========================= =======================================

    Args:
        shape: shape of the parameter.
        proj_type: ``"std"`` projects the smaller side (a square matrix on the right, as released),
            ``"reverse_std"`` the larger, ``"left"`` the rows, ``"right"`` the columns, ``"full"``
            both.
        flatten: see three dimensions as one matrix, as the kernel of a ``Conv1d`` (default: False).
    """
    shape = tuple(shape)
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    batch = shape[:1] if len(shape) == 3 and not flatten else ()
    rows, *rest = shape[len(batch) :]
    cols = math.prod(rest)
    if min(rows, cols) == 1:
        return None
    right = {
        "std": rows >= cols,
        "reverse_std": rows < cols,
        "left": False,
        "right": True,
        "full": False,
    }[proj_type]
    return MatrixView(shape, batch, cols if right else rows, rows if right else cols, right)
