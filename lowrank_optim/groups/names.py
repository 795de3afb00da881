"""What a parameter is called, without what wrappers add, and the number that its draws are of."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that a wrapper puts into it, anywhere: ``torch.compile``, FSDP, checkpointing."""

NAMED = 1 << 62
"""Set in the number of a name; the place of a parameter without one is below."""
TURN_BITS, HASH_BITS = 22, 40

GOLDEN = 0.6180339887498949
STRIDES = (0x9E3779B97F4A7C15, 0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0xA54FF53A5F1D36F1)
r"""Fractional parts, times :math:`2^{64}`, of the golden ratio and of the roots of 2, 3 and 7.

Multiples of each are even on the circle, and so are their sums over two integers of a name.
"""


SALT = "8340"
"""Where the kinds of a model begin is drawn. Under this one a LLaMA of 24 to 32 layers refreshes at
most two matrices in a step, at a gap of 200; under most others three."""


@lru_cache(maxsize=1 << 16)
def bare(name: str) -> str:
    """A parameter's name without what ``torch.compile``, DDP, FSDP or checkpointing add to it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


@lru_cache(maxsize=1 << 16)
def uid_of(name: str) -> int:
    """The number of 63 bits that all draws for a parameter of this name are of.

    Its upper bits say when in a gap its refreshes are due (:func:`turn_of`), the lower ones are a
    hash of the bare name. It is the same in every process and for every order of parameters.
    """
    name = bare(name)
    turn = _hash(SALT + re.sub(r"\d+", "#", name), 64)
    for n, number in enumerate(re.findall(r"\d+", name)):
        turn += int(number) * STRIDES[min(n, len(STRIDES) - 1)]
    upper = turn % 2**64 >> (64 - TURN_BITS)
    return NAMED | upper << HASH_BITS | _hash(name, HASH_BITS)


def turn_of(uid: int) -> float:
    """Where in [0, 1) of a gap the refreshes of a parameter fall: spread evenly over a model.

    Without a name, a multiple of the golden ratio: even for any number of parameters. With one, the
    layers of a kind (names that differ in their integers alone) are spread in the same way, from a
    start that is a hash of their kind: it depends on no other parameter.
    """
    if uid < NAMED:
        return (uid * GOLDEN) % 1.0
    return ((uid ^ NAMED) >> HASH_BITS) / (1 << TURN_BITS)


def _hash(text: str, bits: int) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - bits)
