"""GaLore, one matrix at a time, from arXiv:2403.03507 algorithm 2 and the papers of the rules.

Conventions are torch's: decoupled decay first, eps after bias correction. Orientation is the
stored one: ``P`` acts on the left, ``Q`` on the right, and nothing is ever transposed.
"""

import torch


def side(shape, proj_type):
    m, n = shape
    small, large = ("right", "left") if m >= n else ("left", "right")
    return {"std": small, "reverse_std": large, "full": "both"}.get(proj_type, proj_type)


def signed(new, old):
    """Signs of the old columns; where a column is new, its largest entry is positive."""
    for j in range(new.shape[1]):
        cosine = 0.0 if old is None else float(old[:, j] @ new[:, j])
        if abs(cosine) <= 1e-3:
            cosine = float(new[:, j][new[:, j].abs().argmax()])
        if cosine < 0:
            new[:, j] *= -1
    return new


def adamw(R, slots, t, h):
    """Loshchilov and Hutter, arXiv:1711.05101."""
    b1, b2 = h["betas"]
    slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * R
    slots["v"] = b2 * slots.get("v", 0) + (1 - b2) * R * R
    eps = h["eps"] / (1 - b2**t) ** 0.5 if h.get("eps_first") else h["eps"]  # the release's place
    return slots["m"] / (1 - b1**t) / ((slots["v"] / (1 - b2**t)).sqrt() + eps)


def lion(R, slots, t, h):
    """Chen et al., arXiv:2302.06675."""
    b1, b2 = h["betas"]
    m = slots.get("m", torch.zeros_like(R))
    slots["m"] = b2 * m + (1 - b2) * R
    return torch.sign(b1 * m + (1 - b1) * R)


def sgd(R, slots, t, h):
    slots["m"] = h["momentum"] * slots.get("m", 0) + R
    return slots["m"]


def adafactor(R, slots, t, h):
    """Shazeer and Stern, arXiv:1804.04235, algorithm 4; clip at an RMS of 1."""
    b2 = 1 - t**-0.8
    sq = R * R + 1e-30
    slots["row"] = b2 * slots.get("row", 0) + (1 - b2) * sq.mean(1)
    slots["col"] = b2 * slots.get("col", 0) + (1 - b2) * sq.mean(0)
    U = R / (torch.outer(slots["row"], slots["col"]) / slots["row"].mean()).sqrt()
    U = U / max(1.0, float((U * U).mean().sqrt()))
    if h.get("beta1") is None:
        return U
    slots["m"] = h["beta1"] * slots.get("m", 0) + (1 - h["beta1"]) * U
    return slots["m"]


RULES = {"adamw": adamw, "lion": lion, "sgd": sgd, "adafactor": adafactor}


def rotate(slots, C, D, t, h):
    """LDAdam, arXiv:2410.16103: moments of coordinates that turn by ``x -> C x D^T``."""
    m = slots.get("m")
    if m is not None:
        slots["m"] = C @ m @ D.T
    if "v" in slots:
        b1, b2 = 1 - h["betas"][0] ** t, 1 - h["betas"][1] ** t
        variance = slots["v"] / b2 - (m / b1) ** 2
        slots["v"] = b2 * ((C * C) @ variance @ (D * D).T + (slots["m"] / b1) ** 2).abs()
    if "row" in slots:
        V = (C * C) @ (torch.outer(slots["row"], slots["col"]) / slots["row"].mean()) @ (D * D).T
        slots["row"], slots["col"] = V.mean(1), V.mean(0)


def galore(W, grads, *, rank, gap, scale, proj_type, rule, lr, weight_decay=0.0,
           on_refresh="keep", align=True, relative_step=False, **h):  # fmt: skip
    """The weights after each gradient; ``lr`` may be a list, one for each."""
    where, P, Q, slots, last, out = side(W.shape, proj_type), None, None, {}, 0, []
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
            if s and on_refresh == "project":
                C = P.T @ old_P if P is not None else torch.eye(W.shape[0], dtype=W.dtype)
                D = Q.T @ old_Q if Q is not None else torch.eye(W.shape[1], dtype=W.dtype)
                rotate(slots, C, D, s, h)
            if on_refresh == "reset":
                slots, last = {}, s
        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        N = RULES[rule](R, slots, s + 1 - last, h)
        N = N if P is None else P @ N
        N = N if Q is None else N @ Q.T
        size = lr[s] if isinstance(lr, list) else lr
        if relative_step:
            size = min(1e-2, (s + 1) ** -0.5) * max(1e-3, float((W * W).mean().sqrt()))
        W = (1 - size * weight_decay) * W - size * scale * N
        out.append(W)
    return out
