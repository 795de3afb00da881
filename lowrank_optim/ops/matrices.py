"""The ops on weights and gradients as the package calls them: one matrix or batch an entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_optim.ops import cublas, native, triton
from lowrank_optim.ops.devices import HOST_MEMORY, kind_of, on_accelerator
from lowrank_optim.ops.dispatch import serving
from lowrank_optim.ops.moments import Rows
from lowrank_optim.ops.schema import calls as _ops
from lowrank_optim.ops.stacked import empty_like_all


def lift_add_scaled_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    updates: Sequence[Tensor],
    lows: Sequence[Tensor],
    columns: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R o c) + G o c)`` for each matrix: one GEMM and one pass.

    With ``steps`` and ``decays`` it is ``W <- decay d W - lr s (…)``, where no host knows s and d.
    A column whose factor c is 0 gets exactly ``P (a N)``, whatever finite numbers R and G hold.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        bases: P ``(..., m, r)``.
        updates: N ``(..., r, n)``.
        lows: R ``(..., r, n)``.
        columns: c ``(..., 1, n)`` float32.
        decay: factor of the weights.
        lr: step size.
        scale: a.
        finite: 0-d bools on the device, one a tensor; where False, W stays as it is, bit for bit.
        steps: s, a factor of ``lr``: ``()`` in float32 on the device, one a tensor (default: 1).
        decays: factors of ``decay``, likewise (default: 1).
    """
    lists = params, grads, bases, updates, lows, columns
    _ops.lift_add_scaled_(*lists, decay, lr, scale, finite, steps, decays)


def lift_add_sign_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    updates: Sequence[Tensor],
    lows: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))`` for each matrix.

    Arguments as above; ``gains`` are factors of ``gain`` on the device, as ``steps`` of ``lr``.
    """
    lists = params, grads, bases, updates, lows
    _ops.lift_add_sign_(*lists, decay, lr, scale, gain, finite, steps, decays, gains)


def coordinate_add_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    updates: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """Rows in ``indices``: ``W <- decay W - lr a N``; others: ``W <- decay W - lr gain f(G)``.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        indices: ``(..., r)`` int32, sorted.
        updates: N ``(..., r, n)``.
        decay: factor of the weights.
        lr: step size.
        scale: a.
        gain: factor of the free rows.
        free: f: ``"sign"``, ``"sgd"`` (G itself) or ``"none"``.
        finite: 0-d bools on the device, one a tensor; where False, W stays as it is, bit for bit.
        steps: s, a factor of ``lr``: ``()`` in float32 on the device, one a tensor (default: 1).
        decays: factors of ``decay``, likewise (default: 1).
        gains: factors of ``gain``, likewise (default: 1).
    """
    lists = params, grads, indices, updates
    _ops.coordinate_add_(*lists, decay, lr, scale, gain, free, finite, steps, decays, gains)


def coordinate_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    steps: Sequence[float],
    free_steps: Sequence[float],
    decay: float,
    free: str,
) -> None:
    """A whole step of rows: :func:`adamw_direction_` and :func:`coordinate_add_` in one pass.

    Rows in ``indices``: ``W <- decay W - step m / (sqrt(v) + eps)``; others: ``W <- decay W -
    free_step f(G)``. Native on the CPU; on an accelerator the reference.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        indices: ``(..., r)`` int32, sorted.
        exp_avgs: m ``(..., r, n)`` float32, or wider with the reference; updated.
        exp_avg_sqs: v, likewise.
        beta1: decay of m.
        beta2: decay of v.
        eps: one a tensor.
        steps: factor of the direction, one a tensor.
        free_steps: factor of what moves the other rows, one a tensor.
        decay: factor of the weights.
        free: f: ``"sign"``, ``"sgd"`` (G itself) or ``"none"``.
    """
    if params:
        state = indices, exp_avgs, exp_avg_sqs
        scalars = beta1, beta2, eps, steps, free_steps, decay, free
        _ops.coordinate_adamw_(params, grads, *state, *scalars)


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
    rows: Rows,
    steps: Sequence[float],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
) -> None:
    """A whole step in cosines: :func:`cosine_project_`, AdamW and :func:`cosine_lift_add_`.

    Native on the CPU, where a tile of columns stays in the cache from its gradient to its weights;
    elsewhere the three in turn.

    Args:
        params: W ``(m, n)``, any strides; all of one m.
        grads: G ``(m, n)``, in W's dtype, any strides.
        indices: coefficients ``(r,)`` int32, sorted.
        sources: ``(r,)`` int32, where the moments of each stood, -1 for nowhere (zeros); none where
            all stay.
        exp_avgs: m ``(r, n)`` float32, or wider with the reference; updated.
        exp_avg_sqs: v, likewise.
        beta1: decay of m.
        beta2: decay of v.
        eps: one a tensor.
        rows: steps of each row, where rows have ages of their own.
        steps: factor of the direction, one a tensor.
        plan: of :class:`~lowrank_optim.ops.cosine.CosineTransform`.
        basis: "dct2" or "dct3".
        decay: factor of the weights.
    """
    if params:
        state = indices, sources, exp_avgs, exp_avg_sqs
        scalars = beta1, beta2, eps, *rows, steps, plan, basis, decay
        _ops.cosine_adamw_(params, grads, *state, *scalars)


def fuses_cosine(like: Tensor, n: int) -> bool:
    """Whether kernels serve the cosine ops for columns of length ``n``.

    Native ones have an FFT of their own, on the CPU; Triton's are what is around torch's.
    """
    kind = kind_of(like)
    served = serving(like.dtype, kind)
    if served is native:
        return kind == "cpu" and native.takes_length(n)
    return served is triton


def decay_(
    params: Sequence[Tensor],
    decay: float,
    factors: Sequence[Tensor] = (),
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay f W`` for each tensor, rounded once.

    Args:
        params: W, any strides.
        decay: of all.
        factors: f ``()`` on the device, one a tensor (default: 1).
        finite: 0-d bools on the device, one a tensor; where False, W stays as it is, bit for bit.
    """
    if params and (factors or decay != 1):
        _ops.decay_(params, decay, factors, finite)


def reads_factors(param: Tensor) -> bool:
    """Whether a product that is added to such weights can read its factors on the device.

    By :func:`addmm_`. A CPU that is taken for an accelerator stands for one that has it.
    """
    if not (on_accelerator(param) and cublas.takes(param)):
        return False
    kind = kind_of(param)
    if kind in HOST_MEMORY:
        return True
    return kind == "cuda" and cublas.available()[0] and serving(param.dtype, kind) is triton


def addmm_(
    params: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    steps: Sequence[Tensor],
    decays: Sequence[Tensor],
) -> None:
    """``W <- d W + s P N`` of each in one product, rounded once.

    Args:
        params: W ``(m, n)``, stored by rows or by columns.
        lefts: P ``(m, r)``, in the format of W or a wider one, which is rounded to it.
        rights: N ``(r, n)``, likewise.
        steps: s ``()`` on the device.
        decays: d ``()`` on the device.
    """
    _ops.addmm_(params, lefts, rights, steps, decays)


def residual_factors_(
    lows: Sequence[Tensor],
    directions: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    tiny: float,
    share: float,
    noise: float,
    limiter: float,
    finite: Sequence[Tensor] = (),
) -> None:
    r"""Factors of columns, such that the norm of the residual grows by ``limiter`` at most.

    With :math:`f_j = |N_j| / (|R_j| + tiny)`, the residual's norm S is kept, and limited:
    :math:`S^2 = \sum_j f_j^2 |G_j|^2 - share \sum_j f_j^2 |R_j|^2`.

    Args:
        lows: norms of the columns of coordinates ``(..., 1, n)``; 1 column where one is all.
        directions: of the directions, alike.
        grads: of the gradients, alike.
        norms: S of the step before ``(...)``; overwritten where the new one is finite.
        outs: ``f`` times what the limit leaves of it.
        tiny: added to a norm that divides, or is multiplied.
        share: of the coordinates in the residual.
        noise: the residual counts as zero where its square is this part of the first sum.
        limiter: the growth that is allowed where S was not 0.
        finite: 0-d bools on the device, one a matrix; where False, S stays.
    """
    if lows:
        lists = lows, directions, grads, norms, outs
        _ops.residual_factors_(*lists, tiny, share, noise, limiter, finite)


def row_dots(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """``x_i . y_i`` of each row, ``(..., r)``.

    Args:
        xs: ``(..., r, n)`` in any format.
        ys: alike, in float32 or wider, as the results are, which lie one after the other.
    """
    outs = empty_like_all(ys, ys[0].shape[:-1], ys[0].dtype)
    _ops.row_dots_(xs, ys, outs)
    return outs


def turn_rows_(
    xs: Sequence[Tensor],
    directions: Sequence[Tensor],
    lengths: Sequence[Tensor],
    across: Sequence[Tensor],
    outs: Sequence[Tensor],
    moves: Sequence[Tensor],
    lr: float,
) -> None:
    r"""``x' = unit(x - lr d)`` of each row; one that does not move keeps its bits.

    With a and b lengths of the row after the step and before it, a matrix that is a sum of products
    of such rows moves by what ``moves`` has: rows ``a x'``, then rows ``a x' - b x``. Where there
    are no lengths, it has rows ``x' - x``, then rows ``x``.

    Args:
        xs: ``(..., r, n)`` in float32 or wider.
        directions: d, in any format.
        lengths: a and b ``(2, ..., r)``; or none.
        across: of rows of which others have columns, ``(2, ..., r)`` in float64: the square of the
            length after the move, and 0 where none of the row moves; or none.
        outs: x', written; they may be ``xs``.
        moves: ``(..., 2 r, n)``, written, in any format; or none.
        lr: how far.
    """
    if xs:
        _ops.turn_rows_(xs, directions, lengths, across, outs, moves, lr)


def step_rows_(
    xs: Sequence[Tensor],
    directions: Sequence[Tensor],
    outs: Sequence[Tensor],
    moves: Sequence[Tensor],
    lr: float,
    decay: float,
    ahead: bool,
    decays: Sequence[Tensor] = (),
) -> None:
    r"""``x' = decay x - lr d`` of each row, and rows by whose products with others W moves.

    Of one factor ``moves`` has rows x', then rows ``x' - x``; of the other rows ``y' - y``, then
    rows ``y' - (y' - y)``: their products add up to ``x'^T y' - x^T y``, and do not cancel.

    Args:
        xs: ``(..., r, n)`` in float32 or wider.
        directions: d, in any format.
        outs: x', written; they may be ``xs``.
        moves: ``(..., 2 r, n)``, written, in any format; or none.
        lr: how far.
        decay: of the factor.
        ahead: whether the new rows come first in ``moves``.
        decays: factors of ``decay`` on the device, ``()`` of each (default: none).
    """
    if xs:
        _ops.step_rows_(xs, directions, outs, moves, lr, decay, ahead, decays)


column_norms = _ops.column_norms
cosine_lift_add_ = _ops.cosine_lift_add_
cosine_project_ = _ops.cosine_project_
cosine_scores = _ops.cosine_scores


def cosine_top_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor],
    usable: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
    ranking: str,
) -> None:
    """The coefficients with the largest scores: which they are, and what they are.

    :func:`cosine_scores`, :func:`top_rows_` and :func:`cosine_project_` in turn; Triton transforms
    the gradients once for both, where the whole of a matrix is not too large to keep.

    Args:
        grads: ``(m, n)``, all of one m.
        indices: ``(r,)`` int32: the old ones, ascending, and then the new.
        sources: ``(r,)`` int32, written: where each new one stood among the old, -1 for nowhere.
        finite: 0-d bools, written: whether the sum of the scores is.
        usable: likewise, whether it is finite and not 0. Else the old indices stay.
        outs: ``(r, n)``, written: the coefficients of these indices.
        plan: of :class:`~lowrank_optim.ops.cosine.CosineTransform`.
        basis: "dct2" or "dct3".
        ranking: "l2" or "l1".
    """
    if grads:
        _ops.cosine_top_project_(
            grads, indices, sources, finite, usable, outs, plan, basis, ranking
        )


def top_rows_(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor] = (),
    usable: Sequence[Tensor] = (),
) -> None:
    """The indices of the r largest scores, ascending; among equals the lowest.

    Args:
        scores: ``(m,)``, not negative, and finite unless ``finite`` is given.
        indices: ``(r,)`` int32: the old ones, ascending, and then the new.
        sources: ``(r,)`` int32, written: where each new one stood among the old, -1 for nowhere.
        finite: 0-d bools, written: whether the sum of the scores is. Where no host has looked.
        usable: likewise, whether it is finite and not 0. Else the old indices stay.
    """
    if scores:
        _ops.top_rows_(scores, indices, sources, finite, usable)


def move_rows_(xs: Sequence[Tensor], sources: Sequence[Tensor], fills: Sequence[int]) -> None:
    """Rows of each by old index, in place: one launch for all on an accelerator.

    Args:
        xs: ``(r, k)``, of any dtypes, contiguous.
        sources: ``(r,)`` int32 of each: the old row that feeds each new one, -1 for none.
        fills: what such a row is filled with: 0, or a code of one byte.
    """
    if xs:
        _ops.move_rows_(xs, sources, fills)


count_ = _ops.count_
