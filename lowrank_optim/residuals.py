"""What happens to the part of the gradient outside the subspace."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Term(NamedTuple):
    """The residual's share of the update, in the form the fused apply takes."""

    kind: str
    """``"scaled"``: ``(G - scale P R) o columns``."""
    columns: Tensor
    """One factor per column of the canonical view ``(..., 1, n)``."""


class Residual(Protocol):
    """Asked twice a step: for the gradient to project, and for the part to add back."""

    def before(self, state: dict[str, Tensor], grad: Tensor) -> Tensor:
        """The matrix ``(..., m, n)`` to project."""
        ...

    def after(
        self,
        state: dict[str, Tensor],
        grad: Tensor,
        low: Tensor,
        direction: Tensor,
        correction: float,
        scale: float,
    ) -> Term | None:
        """The term that joins the update; ``direction`` is before bias correction."""
        ...


class Drop:
    """GaLore: what the subspace does not see is not used."""

    def before(self, state: dict[str, Tensor], grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad

    def after(
        self,
        state: dict[str, Tensor],
        grad: Tensor,
        low: Tensor,
        direction: Tensor,
        correction: float,
        scale: float,
    ) -> Term | None:
        """Nothing."""
        return None
