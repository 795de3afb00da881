"""APOLLO, one matrix at a time, from arXiv:2412.05270, algorithm 1 and the norm-growth limiter.

Projections are given, as they were drawn: ``(P, Q)`` by the step from which on they are used, None
for a side that is not projected. Orientation is the stored one: ``P`` acts on the left, ``Q`` on
the right. Conventions are torch's: decay first, eps after bias correction, which multiplies the
step.
"""


def apollo(W, grads, projections, *, scale, lr, betas, eps, weight_decay=0.0, scale_type="channel",
           limiter=1.01, on_refresh="keep"):  # fmt: skip
    """The weights after each gradient. ``scale`` is the square of the paper's alpha."""
    M, V, last, before, out = 0, 0, 0, None, []
    b1, b2 = betas
    for s, G in enumerate(grads):
        if s in projections:
            P, Q = projections[s]
            if on_refresh == "reset":
                M, V, last = 0, 0, s
        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        t = s + 1 - last
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        N = M / (V.sqrt() + eps * (1 - b2**t) ** 0.5)
        if scale_type == "tensor" or (P is not None and Q is not None):
            factor = N.norm() / (R.norm() + 1e-8)
        else:  # one for every channel of the side that is not projected
            along = 0 if Q is None else 1
            factor = N.norm(dim=along, keepdim=True) / (R.norm(dim=along, keepdim=True) + 1e-8)
        S = factor * G
        norm = float(S.norm())
        if limiter is not None and before and norm > limiter * (before + 1e-8):
            S = S * (limiter * (before + 1e-8) / norm)
        before = float(S.norm())
        step = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
        W = (1 - lr * weight_decay) * W - step * scale**0.5 * S
        out.append(W)
    return out
