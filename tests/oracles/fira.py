"""Fira, one matrix at a time, from the release (FiraAdamW of fira 1.0.2) and arXiv:2410.01623.

The residual is formed, column by column, and measured; nothing is inferred. Orientation is the
stored one: ``P`` acts on the left, ``Q`` on the right, and nothing is ever transposed.
"""

import torch

from tests.oracles.galore import side, signed


def fira(W, grads, *, rank, gap, scale, lr, proj_type="std", betas=(0.9, 0.999), eps=1e-8,
         weight_decay=0.0, alpha_mode="release", scaling="column", limiter=1.01, guard=True,
         on_refresh="keep", eps_first=False, align=True, norms=None):  # fmt: skip
    """The weights after each gradient; the norms of the limited residual go into ``norms``."""
    where, P, Q, M, V, last, q, out = side(W.shape, proj_type), None, None, 0, 0, 0, None, []
    b1, b2 = betas
    for s, G in enumerate(grads):
        if s % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            old_P, old_Q = P, Q
            if where != "right":
                P = U[:, :rank].clone()
                P = signed(P, old_P) if align else P
            if where != "left":
                Q = Vh[:rank].T.clone()
                Q = signed(Q, old_Q) if align else Q
            if on_refresh == "reset":
                M, V, last = 0, 0, s

        def back(x, P=P, Q=Q):
            x = x if P is None else P @ x
            return x if Q is None else x @ Q.T

        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        t = s + 1 - last
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t)
        N = M / (V.sqrt() + (eps if eps_first else eps * (1 - b2**t) ** 0.5))

        if scaling == "matrix" or where == "both":
            phi = N.norm() / (R.norm() + 1e-8)
        elif where == "left":  # one for every column
            phi = N.norm(dim=0, keepdim=True) / (R.norm(dim=0, keepdim=True) + 1e-8)
        else:  # one for every row
            phi = N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
        S = phi * (G - (1 if alpha_mode == "paper" else scale) * back(R))
        if limiter is not None and q is not None and not (guard and q == 0):
            rho = max(float(S.norm()) / (q + 1e-8), limiter) / limiter
            S = S / rho
        zero = guard and float(S.norm()) < 1e-7 * float((phi * G).norm())  # rounding is no residual
        q = 0.0 if zero else float(S.norm())
        if norms is not None:
            norms.append(q)
        U = scale * (back(N) + S) if alpha_mode == "paper" else scale * back(N) + S
        size = lr[s] if isinstance(lr, list) else lr
        W = (1 - size * weight_decay) * W - size * correction * U
        out.append(W)
    return out
