"""One step of any subspace, rule, residual and store together, a matrix at a time, in float64.

The subspace is given: for each step a pair of orthonormal bases (P, Q), either None, or a vector of
flat positions, and whether it was found at that step. What is in the basis, how a rule makes a
direction of it and how moments turn are those of the oracles beside this one; here they are put
together. Weights are canonical, ``W (m, n)`` with P on the left; experts are lists of matrices.
"""

import torch

from tests.oracles.frugal import FREE, down, turn, up
from tests.oracles.galore import RULES, rotate


def coordinates(part, G):
    """``P^T G Q``, or the chosen entries as a matrix of one row."""
    R = down(part, G)
    return R[None] if isinstance(part, torch.Tensor) else R


def lifted(part, x, like):
    """``P x Q^T``, or the entries in their places."""
    return up(part, x.flatten() if isinstance(part, torch.Tensor) else x, like)


def corrected(rule, t, h):
    """The factor in an Adam direction that undoes the bias of its moments."""
    if rule != "adamw":
        return 1.0
    b1, b2 = h["betas"]
    return (1 - b2**t) ** 0.5 / (1 - b1**t)


class Matrix:
    """The state of one matrix, and its step."""

    def __init__(self, W, *, rule, residual, on_refresh, aged, h):
        self.W, self.rule, self.residual, self.h = W, rule, dict(residual), h
        self.on_refresh, self.aged = on_refresh, aged
        self.slots, self.born, self.part, self.age = {}, 0, None, None
        self.E, self.S_norm = torch.zeros_like(W), None
        self.open = torch.zeros_like(W, dtype=torch.bool)  # where a sign was one of rounding

    def refresh(self, part, s):
        """The moments move from the old part to the new one."""
        old, self.part = self.part, part
        idle = old is None or not down(old, self.W).numel()  # a block that comes back starts anew
        if idle or self.on_refresh == "reset":
            self.slots, self.born, self.age = {}, s, 0
        elif self.on_refresh == "project" and isinstance(part, torch.Tensor):
            for k in {"m", "v", "col"} & self.slots.keys():  # its one row has one mean
                x = coordinates(part, lifted(old, self.slots[k], self.W))
                self.slots[k] = x.reshape(self.slots[k].shape)
        elif self.on_refresh == "project":
            C, D = turn(part, old, *self.W.shape)
            if self.fixed(C):
                C, D = C.round(), D.round()
            row, col = self.slots.pop("row", None), self.slots.pop("col", None)
            rotate(self.slots, C, D, s - self.born, self.h)
            if row is not None:  # of the turned ``row col^T / mean(row)``, in its own proportions
                new_row, new_col = (C * C) @ row, (D * D) @ col
                self.slots["row"] = new_row * new_col.mean() / col.mean()
                self.slots["col"] = new_col * new_row.mean() / row.mean()
            if self.aged and self.fixed(C):
                self.age = C @ self.age

    def selects(self):
        """Whether entries are in the subspace or not, so that the rest is exactly zero there."""
        if isinstance(self.part, torch.Tensor) or self.part[0] is None:
            return True
        return bool(((self.part[0] == 0) | (self.part[0] == 1)).all())

    @staticmethod
    def fixed(C):
        """Whether both bases are of vectors of one, so that C only moves rows."""
        return torch.allclose(C, C.round(), atol=1e-9)

    def term(self, A, R, N, scale):
        """What the residual adds to ``scale P N``, without its bias correction."""
        kind = self.residual["kind"]
        inside = lifted(self.part, R, A)
        if kind == "free":
            E = A - inside
            noise = 1e-6 * float(A.norm())
            small = float(E.norm()) < noise  # rounding is no residual
            if self.residual["rule"] == "sign" and not small:
                self.open |= (E.abs() < noise) & (not self.selects())
            return self.residual["gain"] * FREE[self.residual["rule"]](E * (not small))
        if kind == "fira":
            whole = self.residual["matrix"] or isinstance(self.part, torch.Tensor)
            whole = whole or self.part[1] is not None
            dims = (0, 1) if whole else (0,)
            phi = N.norm(dim=dims, keepdim=True) / (R.norm(dim=dims, keepdim=True) + 1e-8)
            paper = self.residual["paper"]
            S = phi * (A - (1.0 if paper else scale) * inside)
            zero = float(S.norm()) < 1e-3 * float((phi * A).norm())
            limiter = self.residual["limiter"]
            if limiter is not None and self.S_norm:
                S = S * min(1.0, limiter * (self.S_norm + 1e-8) / max(float(S.norm()), 1e-300))
            self.S_norm = 0.0 if zero else float(S.norm())
            return scale * S if paper else S
        return torch.zeros_like(A)

    def step(self, G, s, *, lr, weight_decay, scale, maximize, lr_scale):
        """One gradient."""
        sign, feeds = -1 if maximize else 1, self.residual["kind"] == "feedback"
        A = G + self.E if feeds else G
        R = coordinates(self.part, sign * A)
        t, c = s + 1 - self.born, 1.0
        if self.aged:  # every row by its own steps, in the direction itself
            self.age = self.age + torch.ones(R.shape[0], dtype=R.dtype)
            t = self.age[:, None]
        elif R.numel():  # an idle block has no direction
            c = corrected(self.rule, t, self.h)
        D = RULES[self.rule](R, self.slots, t, self.h) if R.numel() else R
        T = self.term(sign * A, R, D / c, scale)
        if self.residual["kind"] != "free":  # a rate of its own, which nothing corrects
            T = T * c
        if feeds:  # what this step did not use
            self.E = A - lifted(self.part, sign * R, A)
        update = scale * lifted(self.part, D, G) + T
        self.W = (1 - lr * weight_decay) * self.W - lr * lr_scale * update


def product(Ws, grads, parts, fresh, *, rule, residual, lr, on_refresh="keep", weight_decay=0.0,
            scale=1.0, maximize=False, aged=False, lr_scale=1.0, keep=None, remember=None,
            **h):  # fmt: skip
    """The weights of all experts after each step, and where signs of rounding moved them.

    Args:
        Ws: of each expert.
        grads: for each step those of each expert.
        parts: alike, the subspaces.
        fresh: for each step, whether its subspaces were found at it.
        keep: puts moments in the format that they are stored in: ``keep(slots, s, moved)`` with
            those of all experts, and whether it is a refresh that writes them.
        remember: the same for the memory of error feedback: ``remember(E, expert, s)``.
    """
    options = {"rule": rule, "residual": residual, "on_refresh": on_refresh, "aged": aged}
    matrices, out = [Matrix(W, **options, h=h) for W in Ws], []
    numbers = {"lr": lr, "weight_decay": weight_decay, "scale": scale}
    for s, (row, own, new) in enumerate(zip(grads, parts, fresh, strict=True)):
        for matrix, part in zip(matrices, own, strict=True):
            if new:
                matrix.refresh(part, s)
            matrix.part = part
        slots = [matrix.slots for matrix in matrices]
        if keep is not None and new and on_refresh == "project":
            keep(slots, s, True)
        for matrix, G in zip(matrices, row, strict=True):
            matrix.step(G, s, **numbers, maximize=maximize, lr_scale=lr_scale)
        if keep is not None:
            keep([matrix.slots for matrix in matrices], s, False)
        if remember is not None:
            for expert, matrix in enumerate(matrices):
                matrix.E = remember(matrix.E, expert, s)
        out.append(torch.stack([matrix.W for matrix in matrices]))
    return out, torch.stack([matrix.open for matrix in matrices])


def switched(W, A, B, grads, *, rule, lrs, weight_decay, alpha, **h):
    """SwitchLoRA between two switches: ``W`` (out, in), ``B`` (out, r), ``A`` (r, in)."""
    slots, s, out = {"A": {}, "B": {}}, alpha / A.shape[0], []
    for t, (G, lr) in enumerate(zip(grads, lrs, strict=True)):
        new_A = (1 - lr * weight_decay) * A - lr * RULES[rule](s * B.T @ G, slots["A"], t + 1, h)
        step = RULES[rule](s * A @ G.T, slots["B"], t + 1, h)
        new_B = (1 - lr * weight_decay) * B - lr * step.T
        W, A, B = W + s * (new_B @ new_A - B @ A), new_A, new_B
        out.append(W)
    return out


def spectral(W, u, sigma, v, grads, chosen, *, gap, rule, lrs, weight_decay, on_refresh, **h):
    """SST within a round: rows ``u (k, m)`` and ``v (k, n)``, of which each step trains some.

    Args:
        W: the weight.
        u: all left vectors.
        sigma: all singular values.
        v: all right vectors.
        grads: of each step.
        chosen: for each step the vectors that it trains.
        rule: of all three coordinates.
        gap: steps after which others are chosen.
        lrs: of each step.
        weight_decay: of the singular values.
        on_refresh: what the moments do where others are chosen.
        **h: of the rule.
    """
    slots, born, out = {"u": {}, "v": {}, "s": {}}, 0, []
    for t, (G, at, lr) in enumerate(zip(grads, chosen, lrs, strict=True)):
        if t and t % gap == 0:
            if on_refresh == "reset":
                slots, born = {"u": {}, "v": {}, "s": {}}, t
            if on_refresh == "project":
                C = torch.tensor([[float(i == j) for j in chosen[t - 1]] for i in at]).to(W)
                rotate(slots["u"], C, torch.eye(u.shape[1], dtype=W.dtype), t - born, h)
                rotate(slots["v"], C, torch.eye(v.shape[1], dtype=W.dtype), t - born, h)
        old, time = (u.T * ((1 - lr * weight_decay) * sigma)) @ v, t + 1 - born
        step_u = RULES[rule](v[at] @ G.T, slots["u"], time, h)
        step_v = RULES[rule](u[at] @ G, slots["v"], time, h)
        step_s = RULES[rule](torch.diag(u @ G @ v.T)[None], slots["s"], time, h)[0]
        u, v = u.clone(), v.clone()
        u[at] = torch.nn.functional.normalize(u[at] - lr * step_u, dim=1)
        v[at] = torch.nn.functional.normalize(v[at] - lr * step_v, dim=1)
        sigma = ((1 - lr * weight_decay) * sigma - lr * step_s).clamp(min=0)
        W = (1 - lr * weight_decay) * W + (u.T * sigma) @ v - old
        out.append(W)
    return out
