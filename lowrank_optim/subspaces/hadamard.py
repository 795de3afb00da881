"""The Walsh-Hadamard basis: the documented example of a fixed basis in one file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim.ops.cosine import cosine_rows
from lowrank_optim.subspaces.base import register
from lowrank_optim.subspaces.fixed import FixedBasis


@register("hadamard")
@dataclass(frozen=True)
class Hadamard(FixedBasis):
    """Rows of ±1, and for lengths with an odd factor q their Kronecker product with q cosines."""

    def vectors(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Sylvester's matrix ``(n, n)``, orthonormal: H doubles as ``[[H, H], [H, -H]]``."""
        odd = n // (n & -n)
        rows = cosine_rows(odd, "dct2", dtype, device)
        while rows.shape[0] < n:
            rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
            rows *= 0.5**0.5
        return rows
