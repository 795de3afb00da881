"""DCT-AdamW, one matrix at a time, from arXiv:2505.17967 and what its release does.

The stored orientation is never transposed: ``Q[:, I]`` acts on the right of tall and square
matrices, ``Q[:, I]^T`` on the left of wide ones. Moments are kept for **all** indices, in rows of
the full spectrum, so that a permutation is nothing but zeroing what left.

Checked by hand against ISTA-DASLab-Optimizers 1.1.15 (float64, 12 steps, three shapes): equal to
6e-12 with its cosines made exact, its indices sorted and its rotation out of place.
"""

import math

import torch


def cosines(n, basis, dtype=torch.float64):
    """Columns are the basis vectors, entry by entry from the definition."""
    Q = torch.empty(n, n, dtype=dtype)
    for k in range(n):
        for j in range(n):
            c = math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * k * (2 * j + 1) / (2 * n))
            if basis == "dct2":
                Q[j, k] = c
            else:
                Q[k, j] = c
    return Q


def quantised(E, bits):
    """Each row of the projected dimension on ``2**bits`` even levels from its least to its most."""
    low, high = E.amin(1, keepdim=True), E.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + torch.where(step > 0, ((E - low) / step).round(), 0).nan_to_num() * step


def dct_adamw(W, grads, *, rank, gap=1, basis="dct2", ranking=2, lr=1e-3, betas=(0.9, 0.999),
              eps=1e-8, weight_decay=0.0, carry=True, own_age=True, memory=None, scale=1.0,
              side=None):  # fmt: skip
    """The weights after each gradient, and the error memory at the end.

    carry: moments follow their index; else they stay in their slots, as in the release.
    """
    right = W.shape[0] >= W.shape[1] if side is None else side == "right"
    n = W.shape[1] if right else W.shape[0]
    free = W.shape[0] if right else W.shape[1]
    Q, rank = cosines(n, basis, W.dtype), min(rank, *W.shape)
    m, v = torch.zeros(n, free, dtype=W.dtype), torch.zeros(n, free, dtype=W.dtype)
    slot_m, slot_v = m[:rank].clone(), v[:rank].clone()
    age, E, out = torch.zeros(n, dtype=W.dtype), torch.zeros_like(W), []
    b1, b2 = betas
    for s, G in enumerate(grads):
        A = G if memory is None else G + E
        S = (A @ Q).T if right else Q.T @ A
        if s % gap == 0:
            size = S.abs().sum(1) if ranking == 1 else S.square().sum(1)
            order = sorted(range(n), key=lambda j: (-float(size[j]), j))
            chosen = sorted(order[:rank])
            gone = [j for j in range(n) if j not in chosen]
            m[gone], v[gone], age[gone] = 0, 0, 0
        R = S[chosen]
        age[chosen] += 1
        if carry:
            m[chosen] = b1 * m[chosen] + (1 - b1) * R
            v[chosen] = b2 * v[chosen] + (1 - b2) * R * R
            first, second = m[chosen], v[chosen]
        else:
            slot_m, slot_v = b1 * slot_m + (1 - b1) * R, b2 * slot_v + (1 - b2) * R * R
            first, second = slot_m, slot_v
        t = age[chosen][:, None] if own_age else torch.tensor(s + 1.0, dtype=W.dtype)
        N = first / (1 - b1**t) / ((second / (1 - b2**t)).sqrt() + eps)
        P = Q[:, chosen]
        W = (1 - lr * weight_decay) * W - lr * scale * (N.T @ P.T if right else P @ N)
        if memory is not None:
            E = A - (R.T @ P.T if right else P @ R)
            if memory in (4, 8):
                E = quantised(E, memory) if right else quantised(E.T, memory).T
        out.append(W)
    return out, E
