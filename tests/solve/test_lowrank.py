"""The best rank-r approximation in the metric, against a root, a full SVD and a solve in float64."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.solve.lowrank import (
    block_size,
    leading_subspace,
    orthonormal,
    principal,
    refit,
    start_directions,
    uniform,
)
from srr_dist.solve.metric import Metric, eigh, inner
from tests.solve.problems import (
    MOMENTS,
    SHAPES,
    best_objective,
    full,
    moment,
    normal,
    objective,
    singular_values,
    weight,
    with_threads,
)

RANK = 8


def solved(E, H, rank, **options):
    metric = Metric.of(H)
    return leading_subspace(E, metric, rank, start_directions(metric, block_size(*E.shape, rank)), **options), metric


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_reaches_the_float64_optimum(shape, kind):
    E, H = weight(*shape), moment(kind, shape[1])
    rank = min(RANK, *shape)
    found, metric = solved(E, H, rank)
    best, total = best_objective(E, H, rank), objective(E, H)
    achieved = objective(E.double() - found.U.double() @ (found.U.mT.double() @ E.double()), H)
    # One per thousand of the optimum; beyond 1e-7 of the total float32 products cannot see.
    allowed = 1e-3 * best + 1e-7 * total
    assert best - 1e-9 * total <= achieved <= best + allowed
    assert torch.allclose(found.R.double(), found.U.mT.double() @ E.double(), rtol=0, atol=1e-5)
    assert metric.unit * found.tail == pytest.approx(best, abs=allowed)
    assert metric.unit * found.total == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_is_orthonormal_and_sorted_with_the_true_energies(shape, kind):
    E, H = weight(*shape), moment(kind, shape[1])
    rank = min(RANK, *shape)
    found, metric = solved(E, H, rank, tolerance=1e-7, max_steps=100)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.U.mT.double() @ found.U.double(), identity, rtol=0, atol=1e-6)
    assert (found.energies.diff() <= 0).all() and (found.energies >= 0).all()
    expected = singular_values(E, H)[:rank].square()
    torch.testing.assert_close(metric.unit * found.energies, expected, rtol=2e-3, atol=1e-6 * float(expected.sum()))


@pytest.mark.parametrize("kind", ["white", "decaying", "massive"])
def test_product_equals_sqrtm_svd_and_solve(kind):
    m, n = 64, 48
    E = (normal(m, RANK) @ normal(RANK, n, seed=1) + 0.01 * normal(m, n, seed=2)).float()  # a gap after rank 8
    H = moment(kind, n)
    found, _ = solved(E, H, RANK, tolerance=1e-9)
    S = torch.from_numpy(scipy.linalg.sqrtm(H.numpy()).real)
    U, sigma, Vh = torch.linalg.svd(E.double() @ S, full_matrices=False)
    expected = U[:, :RANK] @ torch.linalg.solve(S, (sigma[:RANK, None] * Vh[:RANK]).mT).mT
    ours = found.U.double() @ (found.U.mT.double() @ E.double())
    assert objective(ours - expected, H) <= 1e-3 * best_objective(E, H, RANK)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_weak_directions_survive_massive_inputs(ratio):
    """Regression: directions far below the strongest were taken for dependent ones and dropped."""
    n, rank = 96, 16
    E, H = weight(64, n), moment("white", n)
    for channel in (5, 40):
        H[channel, channel] *= ratio
    found, metric = solved(E, H, rank)
    assert found.U.shape == (64, rank)
    assert metric.unit * found.tail == pytest.approx(best_objective(E, H, rank), rel=1e-3)


def test_diagonal_metric_equals_the_full_matrix():
    E, H = weight(48, 64), moment("diagonal", 64)
    thin, metric = solved(E, H, RANK, tolerance=1e-8)
    dense, _ = solved(E, full(H), RANK, tolerance=1e-8)
    assert metric.diagonal
    torch.testing.assert_close(thin.energies, dense.energies, rtol=1e-4, atol=0)
    assert thin.tail == pytest.approx(dense.tail, rel=1e-4)


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 24)])
def test_full_rank_leaves_nothing(shape, kind):
    E, H = weight(*shape), moment(kind, shape[1])
    found, _ = solved(E, H, min(shape))
    assert 0.0 <= found.tail <= 1e-6 * found.total


def test_rank_zero_keeps_the_whole_energy():
    E, H = weight(48, 64), moment("decaying", 64)
    found, metric = solved(E, H, 0)
    assert found.U.shape == (48, 0) and found.energies.shape == (0,) and found.steps == 0
    assert metric.unit * found.tail == pytest.approx(objective(E, H), rel=1e-5)


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_rank_deficient_matrix_still_gives_every_direction(true_rank):
    E = (normal(48, true_rank) @ normal(true_rank, 64, seed=1)).float()
    found, _ = solved(E, moment("decaying", 64), RANK)
    identity = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(found.U.mT.double() @ found.U.double(), identity, rtol=0, atol=1e-6)
    assert found.tail <= 1e-10 * max(found.total, 1e-30)
    assert found.energies[true_rank:].abs().sum() <= 1e-6 * found.total


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(0, 12), kind=st.sampled_from(("decaying", "white")))
def test_subspace_is_never_better_than_eckart_young(m, n, rank, kind):
    E, H = weight(m, n, seed=m), moment(kind, n, seed=n)
    rank = min(rank, m, n)
    found, metric = solved(E, H, rank)
    best, total = best_objective(E, H, rank), objective(E, H)
    assert best - 1e-6 * total <= metric.unit * found.tail <= 1.001 * best + 1e-6 * total


def test_residual_of_fewer_ranks_is_close_to_their_own_optimum():
    E, H = weight(96, 64), moment("decaying", 64)
    found, metric = solved(E, H, 16)
    for rank in (0, 1, 5, 15):
        assert metric.unit * found.residual(rank) == pytest.approx(best_objective(E, H, rank), rel=1e-3)
        U = found.U[:, :rank].double()
        assert objective(E.double() - U @ (U.mT @ E.double()), H) == pytest.approx(
            metric.unit * found.residual(rank), rel=1e-3
        )


@pytest.mark.parametrize("rank", [1, 5, 8, 11, 24, 32])
@pytest.mark.parametrize("shape", [(304, 208), (64, 1024), (1024, 64), (1, 40000), (513, 513)])
def test_subspace_is_bitwise_the_same_for_any_threads(shape, rank):
    m, n = shape
    E = weight(m, n)
    H = moment("decaying", n) if n < 2000 else torch.linspace(1, 2, n, dtype=torch.float64)
    rank = min(rank, m)
    first, second, again = (with_threads(threads, lambda: solved(E, H, rank)[0]) for threads in (1, 2, 2))
    for other in (second, again):
        assert torch.equal(first.U, other.U) and torch.equal(first.R, other.R)
        assert torch.equal(first.energies, other.energies)
        assert (first.tail, first.steps) == (other.tail, other.steps)


def test_scale_of_weight_and_moment_do_not_matter():
    E, H = weight(48, 64), moment("decaying", 64)
    found, metric = solved(E, H, RANK)
    doubled, _ = solved(2 * E, H, RANK)
    heavier, heavier_metric = solved(E, 4 * H, RANK)  # powers of two: every bit but the exponent stays
    assert torch.equal(found.U, doubled.U) and doubled.tail == 4 * found.tail
    assert torch.equal(found.U, heavier.U) and heavier_metric.unit == 4 * metric.unit


def test_tolerance_and_iteration_limit_trade_time_for_energy():
    E, H = weight(200, 160), moment("white", 160)
    loose, _ = solved(E, H, RANK, tolerance=1e-1)
    tight, _ = solved(E, H, RANK, tolerance=1e-8, max_steps=200)
    once, _ = solved(E, H, RANK, max_steps=1)
    assert once.steps == 1 < loose.steps < tight.steps < 200
    assert tight.tail < loose.tail < once.tail


def test_any_directions_lead_to_the_same_subspace():
    E, H = weight(96, 64), moment("decaying", 64)
    found, metric = solved(E, H, RANK, tolerance=1e-9)
    drawn = uniform((64, 24), torch.Generator().manual_seed(1), E.device)
    other = leading_subspace(E, metric, RANK, drawn, tolerance=1e-9)
    torch.testing.assert_close(found.energies, other.energies, rtol=1e-5, atol=0)
    assert found.tail == pytest.approx(other.tail, rel=1e-5)


def test_structure_that_the_metric_hardly_sees_is_found():
    """The strongest direction of E lies in inputs that H's leading directions do not touch."""
    n = 128
    H = torch.ones(n, dtype=torch.float64)
    H[:96] = 100.0
    E = 1e-3 * weight(64, n)
    E[5, 120] = 50.0
    found, metric = solved(E, H, RANK)
    assert metric.unit * found.tail == pytest.approx(best_objective(E, H, RANK), rel=1e-3)


@pytest.mark.parametrize("kind", [*MOMENTS])
def test_start_directions_lean_to_what_the_metric_favours(kind):
    metric = Metric.of(moment(kind, 160))
    directions = start_directions(metric, 24)
    assert directions.shape == (160, 24) and torch.isfinite(directions).all()
    assert start_directions(metric, 24) is directions
    assert torch.equal(directions, start_directions(Metric.of(moment(kind, 160)), 24))
    drawn = uniform((160, 24), torch.Generator().manual_seed(1), directions.device)

    def share(X):  # of the metric's weight in the span, 1 at most and reached by the leading eigenvectors
        U = orthonormal(X).float()
        return float((metric.left(U) * U).sum())

    assert share(directions) >= share(drawn) - 1e-3


def test_block_size_oversamples_within_the_matrix():
    assert [block_size(4096, 4096, rank) for rank in (1, 8, 16, 32, 33, 64)] == [32, 32, 32, 48, 64, 80]
    assert block_size(40, 4096, 32) == 40 and block_size(4096, 20, 20) == 20


def test_orthonormal_spans_the_columns_in_order():
    Y = normal(50, 6).float()
    U = orthonormal(Y)
    torch.testing.assert_close(U.mT @ U, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    for columns in range(1, 7):
        left = Y[:, :columns].double() - U[:, :columns] @ (U[:, :columns].mT @ Y[:, :columns].double())
        assert left.abs().max() < 1e-5


def test_orthonormal_replaces_dependent_columns():
    Y = normal(50, 4).float()
    Y = torch.cat((Y, Y, torch.zeros(50, 2)), dim=1)
    U = orthonormal(Y)
    torch.testing.assert_close(U.mT @ U, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (Y.double() - U @ (U.mT @ Y.double())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["decaying", "massive", "diagonal"])
def test_principal_keeps_the_product_and_sorts_it(kind):
    L, R, H = normal(40, 6).float(), normal(6, 32, seed=1).float(), moment(kind, 32)
    metric = Metric.of(H)
    U, B, energies = principal(L, R, metric)
    torch.testing.assert_close(U @ B, L @ R, rtol=0, atol=1e-4)
    torch.testing.assert_close(U.mT @ U, torch.eye(6), rtol=0, atol=1e-5)
    expected = singular_values(L.double() @ R.double(), H)[:6].square()
    torch.testing.assert_close(metric.unit * energies, expected, rtol=1e-3, atol=1e-6 * float(expected.sum()))
    rows = metric.unit * (metric.right(B) * B).sum(-1).double()  # row i has energy i
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-6 * float(expected.sum()))


def test_refit_is_the_least_squares_answer():
    L, R = normal(40, 6).float(), normal(6, 32, seed=1).float()
    stored = L.bfloat16().float()
    target = L.double() @ R.double()
    expected = torch.linalg.lstsq(stored.double(), target).solution
    torch.testing.assert_close(refit(stored, L, R).double(), expected, rtol=1e-5, atol=1e-5)
    plain = (target - stored.double() @ R.double()).norm()
    assert (target - stored.double() @ refit(stored, L, R).double()).norm() < plain


def test_refit_of_a_lost_direction_is_zero():
    L, R = normal(40, 3).float(), normal(3, 32, seed=1).float()
    stored = L.clone()
    stored[:, 1] = 0.0
    fitted = refit(stored, L, R)
    assert torch.isfinite(fitted).all() and not fitted[1].any() and fitted[0].any()
    assert refit(stored[:, :0], L[:, :0], R[:0]).shape == (0, 32)


def test_orthonormal_beyond_a_basis_is_orthogonal_to_it():
    B, Y = orthonormal(normal(60, 8).float()), normal(60, 6, seed=1).float()
    Y[:, 0] = 1e4 * B[:, 0] + 1e-2 * Y[:, 0]  # nearly inside
    Y[:, 1] = B[:, 1]  # wholly inside
    Y[:, 2] = 0.0
    U = orthonormal(Y, B)
    torch.testing.assert_close(U.mT @ U, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (B.mT @ U).abs().max() < 1e-6


@pytest.mark.parametrize("kind", MOMENTS)
def test_metric_measures_the_objective(kind):
    E, H = weight(24, 40), moment(kind, 40)
    metric = Metric.of(H)
    assert metric.H.dtype == torch.float32 and metric.diagonal == (H.dim() == 1)
    torch.testing.assert_close(metric.unit * metric.right(E).double(), E.double() @ full(H), rtol=1e-3, atol=1e-2)
    assert metric.unit * inner(metric.right(E), E) == pytest.approx(objective(E, H), rel=1e-5)
    assert (metric.H if metric.diagonal else metric.H.diagonal()).double().mean().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("n", [1, 40, 130, 576, 1100])
@pytest.mark.parametrize("diagonal", [False, True])
def test_energy_from_half_the_product_equals_the_whole(n, diagonal):
    E, H = weight(24, n), moment("decaying", n)
    H = H.diagonal() if diagonal else H
    metric = Metric.of(H)
    assert metric.unit * metric.energy(E) == pytest.approx(objective(E, H), rel=1e-5)
    assert with_threads(1, lambda: metric.energy(E)) == with_threads(2, lambda: metric.energy(E))


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("left", [1.0, 0.1, 1e-4])
def test_remainder_is_the_energy_of_the_difference(kind, left):
    E, H = weight(48, 64), moment(kind, 64)
    metric, rank = Metric.of(H), 6
    L, R = normal(48, rank).float(), normal(rank, 64, seed=1).float()
    E = L @ R + left * E  # nearly all, or nearly nothing of E is in L R
    found = metric.remainder(E, metric.energy(E), L, R)
    expected, total = objective(E.double() - L.double() @ R.double(), H), objective(E, H)
    assert metric.unit * found == pytest.approx(expected, rel=1e-3, abs=1e-9 * total)


@pytest.mark.parametrize("shape", [(16,), (16, 16)])
def test_metric_of_a_dead_input_counts_all_directions_alike(shape):
    metric = Metric.of(torch.zeros(shape, dtype=torch.float64))
    assert metric.diagonal and torch.equal(metric.H, torch.ones(16)) and metric.unit == 0.0


def test_inner_adds_up_in_float64():
    A = torch.full((1000, 1000), 0.1)
    A[0, 0] = 3e4
    exact = float((A.double() ** 2).sum())
    assert inner(A, A) == pytest.approx(exact, rel=1e-8)
    assert with_threads(1, lambda: inner(A, A)) == with_threads(2, lambda: inner(A, A))


def test_eigh_is_descending_and_reconstructs():
    A = normal(12, 12)
    A = A + A.mT
    values, V = eigh(A)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close((V * values) @ V.mT, A)
