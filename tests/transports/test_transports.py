"""What moments do when the basis moves, by theorems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.rules.base import Slot
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.transports import TRANSPORTS
from tests.compare import assert_close

R, N = 4, 7
MEAN, SQUARE = Slot("exp_avg", signed=True), Slot("exp_avg_sq", signed=False)
ROW = Slot("exp_avg_sq_row", signed=False, averaged=-1)
COL = Slot("exp_avg_sq_col", signed=False, averaged=-2)
BIASES = (0.4, 0.03)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moments(*batch: int, columns: int = N) -> tuple[Tensor, Tensor]:
    """A mean and a square that could be: the square holds the mean's square and a variance."""
    m = rand(*batch, R, columns)
    v = BIASES[1] * ((m / BIASES[0]).square() + rand(*batch, R, columns).square())
    return m, v


def project(m: Tensor, v: Tensor, left: Tensor, right: Tensor | None = None) -> None:
    moved = BasisChange(lambda: left, None if right is None else lambda: right)
    TRANSPORTS["project"]([(MEAN, m, BIASES[0]), (SQUARE, v, BIASES[1])], moved)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(rand(*shape)).Q


def test_keep_keeps_and_reset_zeroes() -> None:
    m, v = moments()
    before = m.clone(), v.clone()
    moved = BasisChange(lambda: orthogonal(R, R))
    TRANSPORTS["keep"]([(MEAN, m, 1.0), (SQUARE, v, 1.0)], moved)
    assert torch.equal(m, before[0]) and torch.equal(v, before[1])
    TRANSPORTS["reset"]([(MEAN, m, 1.0), (SQUARE, v, 1.0)], moved)
    assert not m.any() and not v.any()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_project_follows_signed_permutations_exactly(batch: tuple[int, ...]) -> None:
    """Reordered and negated directions: the mean moves and turns sign, the square only moves."""
    m, v = moments(*batch)
    order, signs = torch.randperm(R), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    turn = torch.zeros(R, R, dtype=torch.float64)
    turn[torch.arange(R), order] = signs
    want = signs.unsqueeze(-1) * m[..., order, :], v[..., order, :]
    project(m, v, turn.expand(*batch, R, R))
    assert_close(m, want[0])
    assert_close(v, want[1])


def test_project_within_one_subspace_keeps_the_lifted_mean() -> None:
    """Two bases of one subspace: ``P_new m_new = P_old m_old``."""
    old = orthogonal(11, R)
    new = old @ orthogonal(R, R)
    m, v = moments()
    lifted = old @ m
    project(m, v, new.mT @ old)
    assert_close(new @ m, lifted)


def test_project_of_a_constant_gradient_is_that_gradient_seen_from_the_new_basis() -> None:
    """No variance: ``v / b2 = (m / b1)^2`` before, and after in any new basis."""
    old, new, g = orthogonal(11, R), orthogonal(11, R), rand(R, N)
    m, v = BIASES[0] * g, BIASES[1] * g.square()
    project(m, v, new.mT @ old)
    seen = new.mT @ (old @ g)
    assert_close(m, BIASES[0] * seen)
    assert_close(v, BIASES[1] * seen.square())


def test_project_turns_the_variance_of_independent_coordinates_as_variances_add() -> None:
    """For independent entries ``Var(sum c_k x_k) = sum c_k^2 Var(x_k)``."""
    variance, turn = rand(R, N).square(), orthogonal(R, R)
    m, v = torch.zeros(R, N, dtype=torch.float64), BIASES[1] * variance
    project(m, v, turn)
    assert_close(v / BIASES[1], turn.square() @ variance)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_project_keeps_the_square_positive_and_two_sides_are_one_large_side(
    batch: tuple[int, ...],
) -> None:
    """``x -> C x D^T`` is ``vec(x) -> (C kron D) vec(x)``; the release of LDAdam has one side."""
    m, v = moments(*batch, columns=R)
    big_m = m.reshape(*batch, R * R, 1).clone()
    big_v = v.reshape(*batch, R * R, 1).clone()
    left, right = orthogonal(9, 9)[:R, :R], orthogonal(9, 9)[:R, :R]
    project(m, v, left.expand(*batch, R, R), right.expand(*batch, R, R))
    big_left = torch.kron(left, right)
    project(big_m, big_v, big_left.expand(*batch, *big_left.shape))
    assert_close(m, big_m.reshape(m.shape))
    assert_close(v, big_v.reshape(v.shape))
    assert bool((v >= 0).all())


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_project_turns_factored_squares_as_the_square_they_stand_for(
    batch: tuple[int, ...], two_sided: bool
) -> None:
    """Row and column means are those of the turned ``row col^T / mean``.

    A turn into a smaller overlap loses energy. Only the turned factor lost it once, so that
    ``mean(row)`` and ``mean(col)`` drifted apart and the next directions were too small: by a
    different amount for a matrix and its transpose.
    """
    columns = R if two_sided else N
    full = rand(*batch, R, columns).square() + 0.1
    row, col = full.mean(-1), full.mean(-2)
    square = row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1)[..., None, None]
    left, right = orthogonal(9, 9)[:R, :R], orthogonal(9, 9)[:R, :R]
    want = left.square() @ square
    want = want @ right.square().mT if two_sided else want
    moved = BasisChange(
        lambda: left.expand(*batch, R, R),
        (lambda: right.expand(*batch, R, R)) if two_sided else None,
    )
    TRANSPORTS["project"]([(ROW, row, 1.0), (COL, col, 1.0)], moved)
    assert_close(row, want.mean(-1))
    assert_close(col, want.mean(-2))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_change_of_indices_permutes_rows_and_starts_new_ones_from_zero(
    batch: tuple[int, ...],
) -> None:
    """What ``P_new^T P_old`` does to the moments when both bases are sets of unit vectors.

    Factored moments follow: what they stand for, ``row col^T / mean(row)``, moves with its rows,
    and column means are means over the new ones; they were of the old ones, some of which left.
    """
    source = torch.tensor([2, -1, 0, 3]).expand(*batch, R)
    turn = torch.nn.functional.one_hot(source.clamp(min=0), R).double() * (source >= 0)[..., None]
    m, v = moments(*batch)
    row, col = rand(*batch, R).abs() + 0.1, rand(*batch, N).abs() + 0.1
    col *= row.mean(-1, keepdim=True) / col.mean(-1, keepdim=True)  # means of one matrix
    whole = turn @ (row[..., None] * col[..., None, :] / row.mean(-1)[..., None, None])
    expected_m, expected_v = turn @ m, turn @ v
    expected_row, expected_col = whole.mean(-1), whole.mean(-2)
    kept = [(MEAN, m, 1.0), (SQUARE, v, 1.0), (ROW, row, 1.0), (COL, col, 1.0)]
    TRANSPORTS["project"](kept, BasisChange(source=source))
    assert_close(m, expected_m)
    assert_close(v, expected_v)
    assert_close(row, expected_row)
    assert_close(col, expected_col)
    m, v = moments(*batch, columns=R)
    expected = m @ turn.mT
    TRANSPORTS["project"]([(MEAN, m, 1.0), (SQUARE, v, 1.0)], BasisChange(source_right=source))
    assert_close(m, expected)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_fact_28_between_index_sets_the_rule_of_ldadam_is_a_move_of_rows(
    batch: tuple[int, ...],
) -> None:
    """With C a partial permutation ``(C o C)(v / b2 - (m / b1)^2) + (C m / b1)^2`` is ``C v / b2``.

    So the path of bases and the path of indices are one: a basis whose columns are unit vectors of
    a fixed one may be carried either way. A row that is new has a zero row in C, hence no moments.
    """
    source = torch.tensor([2, -1, 0, 3]).expand(*batch, R)
    turn = torch.nn.functional.one_hot(source.clamp(min=0), R).double() * (source >= 0)[..., None]
    m, v = moments(*batch)
    by_index = m.clone(), v.clone()
    project(m, v, turn)
    kept = list(zip((MEAN, SQUARE), by_index, BIASES, strict=True))
    TRANSPORTS["project"](kept, BasisChange(source=source))
    assert_close(m, by_index[0])
    assert_close(v, by_index[1])
    new = source == -1
    assert not m[new].any() and not v[new].any()
