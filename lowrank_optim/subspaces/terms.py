"""What a residual adds to an update, in a form that a subspace applies in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from torch import Tensor

Wants = Literal["nothing", "term", "memory"]
"""What a residual wants of the gradient outside the subspace: to drop it, to add a term of it to
the update, or to keep it and project it with the next gradient."""


class Term(NamedTuple):
    """The residual's share of the update, in a form that a fused apply takes.

    With a the subspace's scale and R the coordinates of G:

    ============ ==================================
    ``"scaled"`` ``(G - a P R) o columns``
    ``"sign"``   ``gain sign(G - P R)``
    ``"raw"``    ``gain (G - P R)``
    ============ ==================================

    All are multiplied by the learning rate and by the bias correction of the direction.
    """

    kind: Literal["scaled", "sign", "raw"]
    columns: Tensor | None = None
    """One factor per column of the canonical view, ``(..., 1, n)`` in float32."""
    gain: float | Tensor = 1.0

    def times(self, factor: Tensor) -> Term:
        """The term times a 0-d tensor: a learning rate that lives on the device."""
        if self.columns is not None:
            return self._replace(columns=self.columns * factor.to(self.columns.dtype))
        return self._replace(gain=self.gain * factor)

    def of_(self, rest: Tensor) -> Tensor:
        """``gain f(rest)`` in place, for ``rest = G - P R``: a term that has no columns.

        Raises:
            ValueError: it has, or is of a kind that no one knows.
        """
        if self.kind not in FREE:
            raise unknown_kind(self.kind, FREE)
        return FREE[self.kind](rest).mul_(self.gain)


FREE: dict[str, Callable[[Tensor], Tensor]] = {"sign": Tensor.sign_, "raw": lambda rest: rest}
"""f of each kind of term that has no columns, in place."""


KINDS = ("scaled", *FREE)
"""Every kind of term."""


def unknown_kind(kind: str, allowed: Iterable[str]) -> ValueError:
    """The error of a subspace that is given a term which it cannot apply."""
    names = ", ".join(repr(name) for name in allowed)
    return ValueError(f"the kind of a residual's term must be one of {names}, got {kind!r}")


def without_rest(wants: Wants) -> str | None:
    """Why factors of a weight do not go with a residual: all but those that drop; else None."""
    if wants == "nothing":
        return None
    return "its coordinates are of factors of the weight, and leave nothing outside them"
