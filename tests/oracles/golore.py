"""A problem on which singular vectors follow the noise: He et al., arXiv:2410.11289, section 4.

``f(X) = |A X|^2 / 2 + <B, X>``, with A the projection on all but the last r rows, and B zero in
those. A stochastic gradient is ``A X + B + xi sigma C``, with xi a fair sign and C the identity of
the last r coordinates. Where sigma is above the norm of the gradient of f, all r leading singular
vectors are those of C, in which f is flat.
"""

import torch


def gradient(X, B, r):
    """Of f."""
    G = B.clone()
    G[:-r] += X[:-r]
    return G


def noisy(X, B, r, sigma, generator):
    G = gradient(X, B, r)
    xi = 1.0 if float(torch.rand((), generator=generator)) < 0.5 else -1.0
    G.diagonal()[-r:] += xi * sigma
    return G


def slope(m, n, r):
    """B."""
    B = torch.zeros(m, n, dtype=torch.float64)
    B[: m - r, : n - r] = torch.randn(
        m - r, n - r, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return B
