"""SwitchLoRA from the paper: LoRA parameters, a frozen W0, per-row Adam, one vector at a time.

Orientation: W (m, n) = (out, in), B (m, r), A (r, n), pools of k vectors of length n and m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class SwitchLoRA:
    """State of one matrix; ``weight`` is W0 + s B A at the start."""

    def __init__(
        self,
        weight: Tensor,
        pool_a: Tensor,
        pool_b: Tensor,
        rank: int,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze: int = 5,
        pause: bool = True,
        alpha: float = 1.0,
    ) -> None:
        k, r = len(pool_a), rank
        self.k, self.r, self.s = k, r, alpha / r
        self.lr, self.betas, self.eps, self.wd = lr, betas, eps, weight_decay
        self.freeze, self.pause = freeze, pause
        self.pools = {"A": pool_a.clone(), "B": pool_b.clone()}
        self.head = {"A": 0, "B": r // 2}
        self.sel = {"A": [0] * r, "B": [0] * r}
        for side in "AB":
            for i in range(r):  # the slot at the head holds the oldest of the last r candidates
                self.sel[side][(self.head[side] + i) % r] = k - r + i
        # vectors as rows: x["A"][i] is row i of A, x["B"][i] is column i of B
        self.x = {side: self.pools[side][self.sel[side]].clone() for side in "AB"}
        self.m = {side: torch.zeros_like(self.x[side]) for side in "AB"}
        self.v = {side: torch.zeros_like(self.x[side]) for side in "AB"}
        self.t = {side: [0] * r for side in "AB"}
        self.fix = {side: [0] * r for side in "AB"}
        self.w0 = weight - self.product()

    def product(self) -> Tensor:
        return self.s * self.x["B"].mT @ self.x["A"]

    @property
    def weight(self) -> Tensor:
        return self.w0 + self.product()

    def switch(self, wanted: int) -> int:
        """Up to ``wanted`` vectors of A, then as many of B; returns how many."""
        r, fixed = self.r, {side: sum(n > 0 for n in self.fix[side]) for side in "AB"}
        if self.k <= r:
            return 0
        q = min(
            wanted,
            (self.head["B"] - fixed["A"] - self.head["A"]) % r,
            (self.head["A"] - fixed["B"] - self.head["B"]) % r,
            self.k - r,
        )
        for side, other in (("A", "B"), ("B", "A")):
            newest = self.sel[side][(self.head[side] - 1) % r]
            for i in range(q):
                slot = (self.head[side] + i) % r
                assert self.fix[side][slot] == 0
                j = (newest + 1 + i) % self.k
                old, new = self.x[side][slot].clone(), self.pools[side][j].clone()
                if side == "A":
                    self.w0 += self.s * torch.outer(self.x["B"][slot], old - new)
                else:
                    self.w0 += self.s * torch.outer(old - new, self.x["A"][slot])
                self.pools[side][self.sel[side][slot]] = old
                self.x[side][slot] = new
                self.sel[side][slot] = j
                self.m[other][slot] = 0
                self.v[other][slot] = 0
                self.t[other][slot] = 0
                self.fix[other][slot] = self.freeze
            self.head[side] = (self.head[side] + q) % r
        return q

    def step(self, gradient: Callable[[Tensor], Tensor], wanted: int) -> None:
        """``gradient(W)`` is G; it may depend on the weight, which no switch changes."""
        grad = gradient(self.weight)
        self.switch(wanted)
        (b1, b2), s = self.betas, self.s
        grads = {"A": s * self.x["B"] @ grad, "B": s * self.x["A"] @ grad.mT}
        for side in "AB":
            for i in range(self.r):
                if self.fix[side][i]:
                    self.fix[side][i] -= 1
                    self.t[side][i] += 0 if self.pause else 1
                    continue
                g = grads[side][i]
                self.t[side][i] += 1
                t = self.t[side][i]
                self.m[side][i] = b1 * self.m[side][i] + (1 - b1) * g
                self.v[side][i] = b2 * self.v[side][i] + (1 - b2) * g * g
                mean = self.m[side][i] / (1 - b1**t)
                root = (self.v[side][i] / (1 - b2**t)).sqrt()
                x = self.x[side][i]
                self.x[side][i] = (1 - self.lr * self.wd) * x - self.lr * mean / (root + self.eps)


def run(
    oracle: SwitchLoRA, gradient: Callable[[Tensor, int], Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """Weights after each step."""
    out = []
    for t, q in enumerate(wanted):
        oracle.step(lambda w, t=t: gradient(w, t), q)
        out.append(oracle.weight.clone())
    return out
