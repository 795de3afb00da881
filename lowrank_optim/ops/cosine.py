"""Orthonormal cosine transforms of any length, by one real FFT or as a matrix; ops in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator, sent
from lowrank_optim.ops.rows import check_rows, take_rows

BASES = ("dct2", "dct3")
"""Rows of the DCT-II matrix C (cosines), or its columns."""
RANKINGS = ("l2", "l1")
"""Norms of the coefficients by which they are ranked."""
TILE_ELEMENTS = {False: 1 << 18, True: 1 << 24}
"""Elements of one matrix transformed at once: within a CPU's cache, or enough to fill an
accelerator."""
TOGETHER_ELEMENTS = {False: 1 << 18, True: 1 << 25}
"""Those of alike matrices: with fewer a step of many large ones is bound by an accelerator's host.
Two buffers of float32 are 256 MiB."""
WHOLE_ELEMENTS = 5 << 24
"""Of the largest matrix whose transform is kept whole, so that it is not made twice. Those of a
LLaMA-13B are: 270 MiB, and a tile of 64 MiB that is transformed."""
SPAN = 128
"""Columns whose scores a GPU adds up in one program: fixed, so that sums are the same anywhere."""


def check_name(what: str, name: str, allowed: Sequence[str]) -> None:
    """Raise unless an op knows the name.

    Raises:
        ValueError: it is none of those allowed.
    """
    if name not in allowed:
        names = ", ".join(repr(own) for own in allowed)
        raise ValueError(f"{what} must be one of {names}, got {name!r}")


def together(x: Tensor) -> int:
    """How many matrices like ``x (m, n)`` are transformed at once, a tile of each."""
    return at_once(x.shape[0], x.shape[1], on_accelerator(x))


def at_once(m: int, n: int, accelerated: bool) -> int:
    """How many matrices ``(m, n)`` are transformed at once."""
    return max(1, TOGETHER_ELEMENTS[accelerated] // max(1, m * min(n, tile_width(m, accelerated))))


def whole_at_once(m: int, n: int, accelerated: bool) -> int:
    """How many matrices ``(m, n)`` have their whole transforms kept at once; 0 for none."""
    if m * n > WHOLE_ELEMENTS:
        return 0
    return max(1, TOGETHER_ELEMENTS[accelerated] // max(1, m * n))


def tile_width(m: int, accelerated: bool) -> int:
    """Columns of length ``m`` of a matrix that are transformed at once."""
    return max(1, TILE_ELEMENTS[accelerated] // max(1, m))


def column_tiles(x: Tensor) -> Iterator[slice]:
    """Slices of the columns of ``x (m, n)``."""
    width = tile_width(x.shape[0], on_accelerator(x))
    for start in range(0, x.shape[1], width):
        yield slice(start, min(start + width, x.shape[1]))


def cosine_rows(n: int, basis: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    r"""The basis as a matrix ``(n, n)``, one vector a row.

    .. math:: C_{kj} = \sqrt{2/n} \cos(\pi k (2j + 1) / 2n), \quad C_{0j} = \sqrt{1/n}

    Phases are reduced modulo 4n as integers and looked up in float64: in float32 they lose their
    last digits from n = 2900 on, and rows are orthogonal to 2e-4 only.
    """
    check_name("basis", basis, BASES)
    table = torch.cos(torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n)))
    table *= math.sqrt(2 / n)
    first = torch.arange(n)
    out = torch.empty(n, n, dtype=dtype, device=device)
    count = max(1, (1 << 20) // n)
    for start in range(0, n, count):
        at = slice(start, min(start + count, n))
        phase = (first[at, None] * (2 * first + 1)) % (4 * n)
        tile = table[phase]
        if start == 0:
            tile[0] = math.sqrt(1 / n)
        if basis == "dct2":
            out[at] = sent(tile.to(dtype), device)
        else:
            out[:, at] = sent(tile.mT.to(dtype), device)
    return out


class CosineTransform(NamedTuple):
    r"""The transform of rows of length n, with what one FFT of that length needs beside it.

    Of ``v``, the even entries of ``x`` ascending and then the odd ones descending, the FFT gives

    .. math:: W_k = 2 s_k e^{-i \pi k / 2n} V_k, \qquad X_k = \Re W_k, \quad X_{n-k} = -\Im W_k

    so that half of the spectrum of a real row is all of its DCT-II. What :meth:`analyse` returns
    is laid out as the FFT leaves it, real and imaginary parts in turn: sums over rows are taken,
    and few coefficients picked, without putting the rest in order.

    References:
        Makhoul (1980), IEEE Trans. ASSP 28(1).
    """

    n: int
    basis: str
    order: Tensor
    """``(n,)``: v is x in this order."""
    inverse: Tensor
    """``(n,)``: the order that undoes it."""
    place: Tensor
    """``(n,)``: where each coefficient stands among real and imaginary parts."""
    sign: Tensor
    """``(n,)``: with which sign."""
    twiddle: Tensor
    """``(n // 2 + 1,)`` complex."""
    untwiddle: Tensor
    turns: Tensor
    """Pairs of float32, n and then n // 2 + 1: what kernels with an FFT of their own turn by,
    exp(-2 pi i k / n) and then the conjugate of ``twiddle``."""

    @classmethod
    def make(cls, n: int, basis: str, dtype: torch.dtype, device: torch.device) -> CosineTransform:
        """For rows of length ``n`` in ``dtype``, float32 or float64."""
        check_name("basis", basis, BASES)
        every = torch.arange(n)
        order = torch.cat([every[::2], every[1::2].flip(0)])
        inverse = torch.empty_like(order).index_copy_(0, order, every)
        low = every <= n // 2
        place = torch.where(low, 2 * every, 2 * (n - every) + 1)
        sign = torch.where(low, 1.0, -1.0).to(dtype)
        angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (math.pi / (2 * n))
        size = torch.full_like(angle, math.sqrt(2 / n))
        size[0] = math.sqrt(1 / n)
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        # no conjugates: they are lazy, and below some dispatch keys nobody makes them good
        twiddle, untwiddle = (
            torch.polar(size, -angle).to(wide),
            torch.polar(1 / size, angle).to(wide),
        )
        circle = torch.polar(
            torch.ones(n, dtype=torch.float64), every.double() * (-2 * math.pi / n)
        )
        turns = torch.view_as_real(torch.cat([circle, torch.polar(size, angle)]))
        parts = order, inverse, place, sign, twiddle, untwiddle, turns.float().flatten()
        return cls(n, basis, *(sent(x, device) for x in parts))

    @property
    def plan(self) -> list[Tensor]:
        """All tensors: what an op is given, and rebuilds this from."""
        return list(self[2:])

    @property
    def slots(self) -> Tensor:
        """``(n,)``: the column of :meth:`analyse` that holds each coefficient."""
        return self.place if self.basis == "dct2" else self.inverse

    def analyse(self, x: Tensor) -> Tensor:
        """All coefficients of the columns of ``x (n, c)``, any strides: ``(c, p)``, as they fall.

        ``p`` is n, or the n + 1 or n + 2 parts of half a spectrum; the extra ones repeat others.
        """
        dtype = self.sign.dtype
        if self.basis == "dct2":
            if x.stride(0) == 1:
                return self._forward(x.mT.to(dtype).index_select(1, self.order))
            return self._forward(x.index_select(0, self.order).mT.to(dtype).contiguous())
        parts = self._scattered(x.mT.to(dtype) * self.sign, self.place)
        return self._backward(parts)

    def take(self, parts: Tensor, index: Tensor) -> Tensor:
        """Coefficients ``index (r,)`` of what :meth:`analyse` returned: ``(c, r)``."""
        taken = parts.index_select(1, self.slots[index])
        return taken.mul_(self.sign[index]) if self.basis == "dct2" else taken

    def lift(self, low: Tensor, index: Tensor) -> Tensor:
        """Columns ``(c, n)`` with coefficients ``low (r, c)`` at ``index`` and zeros elsewhere.

        The transpose of the projection: one inverse transform of the scattered rows.
        """
        values = low.to(self.sign.dtype)
        if self.basis == "dct2":
            values = values * self.sign[index].unsqueeze(1)
            parts = self._scattered(values.mT, self.place[index])
            return self._backward(parts).index_select(1, self.inverse)
        v = values.new_zeros(values.shape[1], self.n)
        v.index_copy_(1, self.inverse[index], values.mT)
        return self._forward(v).index_select(1, self.place).mul_(self.sign)

    def _forward(self, v: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(v).mul_(self.twiddle)
        return torch.view_as_real(spectrum).flatten(1)

    def _backward(self, parts: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(parts.view(parts.shape[0], -1, 2)).mul_(self.untwiddle)
        v: Tensor = torch.fft.irfft(spectrum, n=self.n)
        return v

    def _scattered(self, values: Tensor, places: Tensor) -> Tensor:
        parts = values.new_zeros(values.shape[0], 2 * (self.n // 2 + 1))
        parts.index_copy_(1, places, values)
        if self.n % 2 == 0:  # the middle coefficient is a real part and an imaginary one
            parts[:, self.n + 1] = -parts[:, self.n]
        return parts


# ---------------------------------------------------------------- ops


def cosine_scores(
    grads: Sequence[Tensor], plan: Sequence[Tensor], basis: str, ranking: str
) -> list[Tensor]:
    """``(m,)`` of each: sums of squares ("l2") or of absolute values ("l1") of coefficients."""
    check_name("basis", basis, BASES)
    check_name("ranking", ranking, RANKINGS)
    found = []
    for grad in grads:
        transform = CosineTransform(grad.shape[0], basis, *plan)
        every, scores = torch.arange(grad.shape[0], device=grad.device), None
        for columns in column_tiles(grad):
            part = transform.take(transform.analyse(grad[:, columns]), every)
            own = (part.abs_() if ranking == "l1" else part.square_()).sum(0)
            scores = own if scores is None else scores.add_(own)
        found.append(transform.sign.new_zeros(grad.shape[0]) if scores is None else scores)
    return found


def cosine_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
) -> None:
    """Coefficients ``indices (r,)`` of the columns of ``grads (m, n)`` into ``outs (r, n)``."""
    check_name("basis", basis, BASES)
    _check_indices("cosine_project_", grads, indices)
    for grad, index, out in zip(grads, indices, outs, strict=True):
        transform = CosineTransform(grad.shape[0], basis, *plan)
        for columns in column_tiles(grad):
            parts = transform.analyse(grad[:, columns])
            out[:, columns] = transform.take(parts, index.long()).mT


def cosine_lift_add_(
    params: Sequence[Tensor],
    indices: Sequence[Tensor],
    updates: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
    steps: Sequence[float],
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - step P N``: one inverse transform of the scattered rows of ``updates``."""
    check_name("basis", basis, BASES)
    _check_indices("cosine_lift_add_", params, indices)
    for i, (w, index, low, step) in enumerate(zip(params, indices, updates, steps, strict=True)):
        transform = CosineTransform(w.shape[0], basis, *plan)
        for columns in column_tiles(w):
            lifted, own = transform.lift(low[:, columns], index.long()), w.mT[columns]
            if finite:
                new = own.to(lifted.dtype).mul(decay).add_(lifted, alpha=-step)
                own.copy_(torch.where(finite[i], new.to(own.dtype), own))
            elif own.dtype == lifted.dtype:
                (own if decay == 1 else own.mul_(decay)).add_(lifted, alpha=-step)
            else:
                own.copy_(own.to(lifted.dtype).mul_(decay).add_(lifted, alpha=-step))


def cosine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    steps: Sequence[float],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
) -> None:
    """Coefficients, AdamW on moments whose rows come from ``sources``, and the lift."""
    _check_indices("cosine_adamw_", params, indices)
    for source in sources:
        check_rows("cosine_adamw_", source, source.shape[0], least=-1)
    for i, (grad, index, m, v) in enumerate(
        zip(grads, indices, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if sources:
            move_rows_((m, v), sources[i])
        low = torch.empty_like(m)
        cosine_project_([grad], [index], [low], plan, basis)
        m.lerp_(low, 1 - beta1)
        v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        if row_eps:
            own_eps, scale = row_eps[i].view(-1, 1), row_scale[i].view(-1, 1)
            direction = scale * m / (v.sqrt() + own_eps)
        else:
            direction = m / (v.sqrt() + eps[i])
        cosine_lift_add_([params[i]], [index], [direction], plan, basis, decay, [steps[i]])


def _check_indices(op: str, matrices: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Before anything is written: indexing takes a negative one from the end."""
    for x, index in zip(matrices, indices, strict=True):
        check_rows(op, index, x.shape[0])


def move_rows_(moments: Sequence[Tensor], source: Tensor) -> None:
    """Rows of each ``(r, n)`` from where ``source (r,)`` says that they stood; zeros for -1."""
    for x in moments:
        x.copy_(take_rows(x, source))
