"""LDAdam, one matrix at a time, from arXiv:2410.16103.

Nothing is inferred: what the mean loses is the difference of two lifted matrices, and B is formed.
Orientation is the stored one: ``P`` acts on the left, ``Q`` on the right. The paper has one side;
with both, each factor takes its own power step. Conventions are torch's: decay first.
"""

import torch

from tests.oracles.galore import side


def lift(x, P, Q):
    x = x if P is None else P @ x
    return x if Q is None else x @ Q.T


def lower(x, P, Q):
    x = x if P is None else P.T @ x
    return x if Q is None else x @ Q


def ldadam(W, grads, *, rank, rho, lr, betas, eps, gap=1, weight_decay=0.0, proj_type="std",
           error_feedback=True, scale=1.0):  # fmt: skip
    """The weights and the errors after each gradient."""
    where, P, Q, out, errors = side(W.shape, proj_type), None, None, [], []
    M, V, E = None, None, torch.zeros_like(W)
    b1, b2 = betas
    for s, G in enumerate(grads):
        A, lost = G + E, 0.0
        if s == 0:
            U, _, Vh = torch.linalg.svd(A, full_matrices=False)
            P = None if where == "right" else U[:, :rank]
            Q = None if where == "left" else Vh[:rank].T
            M = torch.zeros_like(lower(A, P, Q))
            V = M.clone()
        elif s % gap == 0:
            c1, c2 = 1 - b1**s, 1 - b2**s  # of the step before
            B = rho * lift(M / c1, P, Q) + (1 - rho) * A
            old_P, old_Q = P, Q
            P = None if P is None else torch.linalg.qr(B @ (B.T @ P)).Q
            Q = None if Q is None else torch.linalg.qr(B.T @ (B @ Q)).Q
            C = torch.eye(W.shape[0], dtype=W.dtype) if P is None else P.T @ old_P
            D = torch.eye(W.shape[1], dtype=W.dtype) if Q is None else Q.T @ old_Q
            turned = C @ M @ D.T
            V = c2 * ((C * C) @ (V / c2 - (M / c1) ** 2) @ (D * D).T + (turned / c1) ** 2).abs()
            lost = lift(M, old_P, old_Q) - lift(turned, P, Q)
            M = turned
        R = lower(A, P, Q)
        M, V, t = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R, s + 1
        N = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * scale * lift(N, P, Q)
        if error_feedback:
            E = A - lift(R, P, Q) + b1 / (1 - b1) * lost
        out.append(W)
        errors.append(E)
    return out, errors
