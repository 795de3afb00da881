"""LISA, Pan et al., arXiv:2403.17919, and BAdam, Luo et al., arXiv:2404.02827: their algorithms 1.

AdamW (arXiv:1711.05101) on the layers of a turn of K steps, with moments that begin at zero, and
nothing on the others. What is in no layer is AdamW's all the time.
"""

import torch


def adamw(W, G, slots, lr, betas, eps, weight_decay):
    b1, b2 = betas
    slots["t"] = t = slots.get("t", 0) + 1
    slots["m"] = b1 * slots.get("m", torch.zeros_like(G)) + (1 - b1) * G
    slots["v"] = b2 * slots.get("v", torch.zeros_like(G)) + (1 - b2) * G * G
    N = slots["m"] / (1 - b1**t) / ((slots["v"] / (1 - b2**t)).sqrt() + eps)
    return (1 - lr * weight_decay) * W - lr * N


class Turns:
    """``layer_of``: of each name, its layer, or None; ``chosen``: of each turn, its layers."""

    def __init__(self, weights, layer_of, chosen, gap, **hyper):
        self.weights, self.layer_of, self.chosen = dict(weights), layer_of, chosen
        self.gap, self.hyper, self.step, self.slots = gap, hyper, 0, {}

    def update(self, grads):
        turn, phase = divmod(self.step, self.gap)
        if phase == 0:
            self.slots = {n: x for n, x in self.slots.items() if self.layer_of[n] is None}
        for name, W in self.weights.items():
            layer = self.layer_of[name]
            if layer is None or layer in self.chosen[turn]:
                slots = self.slots.setdefault(name, {})
                self.weights[name] = adamw(W, grads[name], slots, **self.hyper)
        self.step += 1
