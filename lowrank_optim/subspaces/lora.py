"""What is known of two factors of a weight: how to start them, and how to balance them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def published_stds(rows: int, cols: int, rank: int, alpha: float) -> tuple[float, float]:
    r"""Standard deviations of A and of B for a weight of ``rows`` outputs and ``cols`` inputs.

    .. math::
        \sigma_A = (\sqrt{m} r / n^{3/2})^{1/4} g^{1/2}, \quad
        \sigma_B = (r / \sqrt{m n})^{1/4} g^{1/2}, \quad g = 3^{-1/2}

    so that s B A has the deviation of a default ``nn.Linear`` and both factors move it alike; both
    divided by :math:`\sqrt{\alpha}`, so that this holds for any α.
    """
    gain = 3**-0.25 / math.sqrt(alpha)
    return (
        (math.sqrt(rows) * rank / cols**1.5) ** 0.25 * gain,
        (rank / math.sqrt(rows * cols)) ** 0.25 * gain,
    )


def balance_(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Refactorise B A in place: :math:`B \leftarrow U S^{1/2}`, :math:`A \leftarrow S^{1/2} V^T`.

    Exact, and without an m x n factorisation: with :math:`B = Q_b R_b` and :math:`A^T = Q_a R_a`
    the SVD of the small :math:`R_b R_a^T` is that of B A. Then :math:`B^T B = A A^T`.

    Args:
        a: A ``(..., r, in)``.
        b: B transposed ``(..., r, out)``.

    Returns:
        What turns gradients of the old A and of the old B transposed into those of the new.

    References:
        Scalable Parameter and Memory Efficient Pretraining (2025), arXiv:2505.22922.
    """
    new_a, new_b, *turns = balanced(a, b)
    b.copy_(new_b)
    a.copy_(new_a)
    return turns[0], turns[1]


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New A, new B transposed, and what turns gradients: :func:`balance_`, of several at once."""
    qa, ra = torch.linalg.qr(a.mT)
    qb, rb = torch.linalg.qr(b.mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT)
    # drivers differ in signs, and what later comes in the place of a direction does not share them:
    # the largest entry of each column of B is positive
    columns = qb @ u
    peak = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    signs = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    u, vh = u * signs, signs.mT * vh
    root = s.sqrt().unsqueeze(-2)
    new_a, new_b = (qa @ (vh.mT * root)).mT, (qb @ (u * root)).mT
    # new B = B M and new A = M^-1 A with M = Ra^T V S^-1/2; a direction that B A lacks has no part
    tiny = torch.finfo(s.dtype).eps * s[..., :1] * s.shape[-1]
    inverse = torch.where(s > tiny, s.rsqrt(), 0.0).unsqueeze(-1)
    return new_a, new_b, inverse * (vh @ ra), inverse * (u.mT @ rb)
