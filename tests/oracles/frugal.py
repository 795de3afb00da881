"""FRUGAL, one matrix at a time, from arXiv:2411.07837 algorithm 1 and the released optimizers.

The state-full part is given by ``parts``, one for each refresh: flat positions of its entries (for
rows, columns, single entries, whole tensors), or a pair of orthonormal bases (P, Q), either None.
"""

import torch

from tests.oracles.galore import RULES, rotate


def down(part, G):
    if isinstance(part, torch.Tensor):
        return G.flatten()[part]
    P, Q = part
    R = G if P is None else P.T @ G
    return R if Q is None else R @ Q


def up(part, x, like):
    if isinstance(part, torch.Tensor):
        full = torch.zeros_like(like).flatten()
        full[part] = x
        return full.view_as(like)
    P, Q = part
    x = x if P is None else P @ x
    return x if Q is None else x @ Q.T


def turn(new, old, m, n):
    """Rotations of rows and columns between two pairs of bases."""
    C = torch.eye(m, dtype=torch.float64) if new[0] is None else new[0].T @ old[0]
    D = torch.eye(n, dtype=torch.float64) if new[1] is None else new[1].T @ old[1]
    return C, D


FREE = {"sign": torch.sign, "sgd": lambda E: E, "none": torch.zeros_like}


def frugal(W, grads, parts, *, gap, rule, lr, free="sign", on_refresh="reset", weight_decay=0.0,
           scale=1.0, free_lr_scale=1.0, proj_params_lr_scale=1.0, exact=False, **h):  # fmt: skip
    """The weights after each gradient; ``exact``: the bases leave nothing out but rounding."""
    slots, born, part, out = {}, 0, None, []
    for s, G in enumerate(grads):
        if s % gap == 0:
            old, part = part, parts[s // gap]
            whole = isinstance(part, torch.Tensor) and len(part) in (0, G.numel())
            if on_refresh == "reset" or (whole and len(old if old is not None else part) == 0):
                slots, born = {}, s  # a tensor that comes back starts anew
            elif on_refresh == "project" and slots:
                if isinstance(part, torch.Tensor):
                    slots = {k: down(part, up(old, x, G)) for k, x in slots.items()}
                else:
                    rotate(slots, *turn(part, old, *G.shape), s - born, h)
            if whole and len(part) == 0:
                slots = {}
        W = (1 - lr * weight_decay) * W
        R = down(part, G)
        E = torch.zeros_like(G) if exact else G - up(part, R, G)
        step = lr * proj_params_lr_scale
        if R.numel():
            W = W - step * scale * up(part, RULES[rule](R, slots, s + 1 - born, h), G)
        W = W - step * free_lr_scale * FREE[free](E)
        out.append(W)
    return out
