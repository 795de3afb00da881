"""Sparse Spectral Training of one matrix, in float64, from arXiv:2405.15481.

``W = U diag(s) V^T`` in the stored orientation, full-width factors, and autograd for the chain
rule. Conventions are torch's: decoupled decay first, eps after bias correction.
"""

import torch


def gradients(G, U, s, V, enhanced):
    """Of ``<G, U diag(s) V^T>``; enhanced: of vectors as if every s were 1."""
    U, s, V = (x.detach().clone().requires_grad_() for x in (U, s, V))
    (G * ((U * s) @ V.T)).sum().backward()
    gU, gs, gV = U.grad.clone(), s.grad.clone(), V.grad.clone()
    if enhanced:
        U.grad, V.grad = None, None
        (G * (U @ V.T)).sum().backward()
        gU, gV = U.grad, V.grad
    return gU, gs, gV


class Adam:
    """Loshchilov and Hutter, arXiv:1711.05101; new at every iteration."""

    def __init__(self, betas, eps):
        self.betas, self.eps, self.t, self.m, self.v = betas, eps, 0, 0, 0

    def __call__(self, g):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)


def unit(X):
    return X / X.norm(dim=0)


def sst(W, gradient, steps, *, rank, per_iteration, per_round, warmup, choose, lr,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, enhanced=True, factors="exact",
        negative="clamp", vector_lr_scale=1.0, s_lr_scale=1.0):  # fmt: skip
    """The weights after each step.

    ``gradient(step, W)`` is G; ``choose(step, iteration, s)`` the indices to train.
    """
    out = []
    for step in range(steps):
        if step % per_iteration == 0:
            iteration = step // per_iteration
            if factors == "active" or iteration % per_round == 0:
                U, s, Vh = torch.linalg.svd(W, full_matrices=False)
                V = Vh.T
            S = choose(step, iteration, s)
            adams = [Adam(betas, eps) for _ in range(3)]
        size = lr * min(1.0, (step % per_iteration + 1) / max(1, warmup))
        keep = 1 - size * weight_decay
        gU, gs, gV = gradients(gradient(step, W), U, s, V, enhanced)
        dU, ds, dV = adams[0](gU[:, S]), adams[1](gs), adams[2](gV[:, S])
        U, V, old = U.clone(), V.clone(), (U * s) @ V.T
        U[:, S] = unit(U[:, S] - size * vector_lr_scale * dU)
        V[:, S] = unit(V[:, S] - size * vector_lr_scale * dV)
        if factors == "active":  # the others wait, and decay with W
            mask = torch.zeros_like(s)
            mask[S] = 1.0
            ds = ds * mask
        s = keep * s - size * s_lr_scale * ds
        if negative == "flip":
            U, s = U * torch.where(s < 0, -1.0, 1.0), s.abs()
        s = s.clamp(min=0)
        W = keep * W + (U * s) @ V.T - keep * old
        out.append(W)
    return out
