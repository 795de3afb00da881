"""Arithmetic in the formats of its tensors, whatever the code around it asks for."""

from __future__ import annotations

import torch

no_autocast = torch._C._DisableAutocast
"""A context without ``torch.autocast`` of any device.

A loop may be all under it. ``torch.optim`` has no product that it could cast; here coordinates,
updates and bases are products, which it would round to 8 bits of mantissa.
"""
