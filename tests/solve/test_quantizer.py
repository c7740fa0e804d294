"""Scales by search and rounding with error feedback, against their definitions in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, MXIntGrid, NF4Grid, Quantizer, make_grid
from srr_dist.solve.grids import PER_CHANNEL
from srr_dist.solve.quantizer import search_scales
from srr_dist.solve.rounding import DAMPING, descend_codes, descend_scales, feedback_of, gptq
from tests.solve.problems import moment, normal, objective, weight, with_threads

GRIDS = [
    MXIntGrid(3, 16), IntGrid(3, 16), IntGrid(2, 8), MXIntGrid(4, 32), IntGrid(4, PER_CHANNEL),
    AsymmetricIntGrid(3, 16), AsymmetricIntGrid(2, 8), AsymmetricIntGrid(8, PER_CHANNEL), NF4Grid(4, 32),
]  # fmt: skip
CORRELATED = ["decaying", "singular", "massive", "wide"]


def importance(n, seed=0):
    return normal(n, seed=seed).square().add(0.01).float()


def own(grid, W):
    """The grid's own scales and zero points."""
    return next(grid.candidates(W))


def equal(first, second):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weighted_error(W, grid, scale, zero, weights):
    """``Σ h (w − q)²`` of every group, in float64, from the stored types."""
    Q = grid.dequantize(grid.encode(W, scale, zero), scale).double()
    return ((W.double() - Q).square() * weights.double()).reshape(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_scale_is_the_best_of_all_trials_in_float64(grid):
    W, weights = weight(24, 64), importance(64)
    found = weighted_error(W, grid, *search_scales(W, grid, weights), weights)
    errors = torch.stack([weighted_error(W, grid, *trial, weights) for trial in grid.candidates(W)])
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-4, atol=1e-12)
    assert (found.sum() < 0.99 * errors[0].sum()).item()


def test_searched_scale_follows_the_inputs_that_count():
    W = torch.full((1, 16), 0.3)
    W[0, 3] = 1.0  # an outlier that nearest codes would stretch the scale for
    light, heavy = torch.ones(16), torch.ones(16)
    light[3], heavy[3] = 1e-4, 1e4
    grid = IntGrid(2, 16)
    assert search_scales(W, grid, light)[0].abs().item() < search_scales(W, grid, heavy)[0].abs().item()


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_searched_scale_puts_the_longer_end_of_the_range_where_the_larger_weights_are(side):
    codes = torch.tensor([[-4.0, 3.0, -3.0, 2.0, -1.0, 0.0, 1.0, 3.0]])
    grid = IntGrid(3, 8)
    scale, _ = search_scales(side * codes * 0.25, grid, torch.ones(8))
    assert scale.item() == side * 0.25
    assert torch.equal(grid.dequantize(grid.encode(side * codes * 0.25, scale), scale), side * codes * 0.25)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 9),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    kind=st.sampled_from(["int", "mxint", "int-asym"]),
)
def test_search_never_loses_to_the_grid_s_own_scale(m, groups, bits, kind):
    grid, W, weights = make_grid(kind, bits, 8), weight(m, 8 * groups, seed=m), importance(8 * groups, seed=bits)
    found, first = (weighted_error(W, grid, *s, weights) for s in (search_scales(W, grid, weights), own(grid, W)))
    assert (found <= first * (1 + 1e-5) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), size=st.sampled_from([4, 8, 16]), seed=st.integers(0, 2**31), shift=st.floats(-0.2, 0.2))
def test_search_with_zero_points_never_loses_to_one_without(bits, size, seed, shift):
    W, weights = weight(7, 32, seed=seed) + shift, importance(32, seed=seed)
    without, having = (
        weighted_error(W, grid, *search_scales(W, grid, weights), weights)
        for grid in (IntGrid(bits, size), AsymmetricIntGrid(bits, size))
    )
    assert (having <= without * (1 + 1e-5) + 1e-12).all()


def test_zero_points_pay_where_weights_lie_on_one_side():
    W, weights = weight(24, 64) + 0.2, importance(64)
    without, having = (
        weighted_error(W, grid, *search_scales(W, grid, weights), weights).sum()
        for grid in (IntGrid(3, 16), AsymmetricIntGrid(3, 16))
    )
    assert having < 0.5 * without


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_scales_are_the_same_again_for_any_threads_and_rows_at_once(grid, monkeypatch):
    W, weights = weight(96, 64), importance(64)
    first = with_threads(1, lambda: search_scales(W, grid, weights))
    assert equal(first, with_threads(2, lambda: search_scales(W, grid, weights)))
    monkeypatch.setattr("srr_dist.solve.quantizer._CHUNK", 64)
    assert equal(first, search_scales(W, grid, weights))


def bounds(grid, zero, W, scale):
    """Smallest and largest code at every place of W, float64."""
    zeros = (torch.zeros(scale.shape) if zero is None else zero).double()
    return [end - zeros.repeat_interleave(W.shape[1] // scale.shape[1], dim=1) for end in grid.code_range]


def gptq_by_definition(W, scale, zero, grid, H):
    """One input after the other with the conditional optimum of all later ones, by a solve in float64.

    Once the inputs ``done`` are rounded, the others' best answer to their errors is ``w − δ H_df H_ff⁻¹`` away.
    """
    H = H.double() / H.diagonal().double().mean()
    H = H + DAMPING * torch.eye(len(H), dtype=torch.float64)
    order = torch.argsort(H.diagonal().float(), descending=True, stable=True).tolist()
    low, high = bounds(grid, zero, W, scale)
    steps = scale.double().repeat_interleave(W.shape[1] // scale.shape[1], dim=1)
    W, Q, margins = W.double(), torch.zeros_like(W, dtype=torch.float64), torch.ones(W.shape[0], dtype=torch.float64)
    codes = torch.zeros(W.shape, dtype=grid.dtype)
    for position, j in enumerate(order):
        done, free = order[:position], order[position:]
        delta = W[:, done] - Q[:, done]
        target = W[:, j] + torch.linalg.solve(H[free][:, free], H[free][:, done] @ delta.mT)[0]
        exact = grid.position((target / steps[:, j]).float()).double()
        margins = torch.minimum(margins, (exact - exact.floor() - 0.5).abs())
        codes[:, j] = exact.round().clamp(low[:, j], high[:, j]).to(grid.dtype)
        Q[:, j] = (grid.points(codes[:, j]) * steps[:, j]).bfloat16().double()
    return codes, margins


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", CORRELATED)
@pytest.mark.parametrize("shape", [(24, 64), (5, 32), (7, 160)])
def test_gptq_takes_the_codes_of_its_definition(grid, kind, shape):
    W, H = weight(*shape), moment(kind, shape[1])
    scale, zero = own(grid, W)
    codes = gptq(W, scale, grid, feedback_of(Metric.of(H).H), zero)
    expected, margins = gptq_by_definition(W, scale, zero, grid, H)
    sure = margins > 1e-4  # rows in which no target lies so near to the middle of two points that float32 decides
    assert sure.any()
    assert torch.equal(codes[sure], expected[sure])


@pytest.mark.parametrize("kind", CORRELATED)
def test_factor_reproduces_the_damped_moment(kind):
    metric = Metric.of(moment(kind, 64))
    feedback = feedback_of(metric.H)
    H = metric.H[feedback.order][:, feedback.order].double() + feedback.damping * torch.eye(64)
    U = feedback.U.double()
    assert torch.equal(U, U.triu()) and torch.equal(U.diagonal(), torch.ones(64, dtype=torch.float64))
    D = torch.linalg.solve_triangular(U, torch.linalg.solve_triangular(U, H, upper=True).mT, upper=True)
    off = D - D.diagonal().diag()
    assert float(off.abs().max()) < 1e-4 * float(D.abs().max())
    assert (D.diagonal() > 0).all()


@pytest.mark.parametrize("grid", [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
@pytest.mark.parametrize("kind", ["decaying", "singular", "wide"])
def test_gptq_has_less_error_than_nearest_where_inputs_are_correlated(grid, kind):
    W, metric = weight(96, 128), Metric.of(moment(kind, 128))
    nearest, fed = (Quantizer(grid, rounding=rounding).quantize(W, metric) for rounding in ("nearest", "gptq"))
    assert torch.equal(nearest[1], fed[1])
    errors = [objective(W - grid.dequantize(*found), metric.H.double()) for found in (nearest, fed)]
    assert errors[1] < 0.8 * errors[0]


def test_gptq_of_uncorrelated_inputs_rounds_to_the_nearest():
    W, H = weight(24, 64), torch.eye(64)
    grid = MXIntGrid(3, 16)
    assert torch.equal(gptq(W, grid.scale(W), grid, feedback_of(H)), grid.encode(W, grid.scale(W)))
    diagonal = Metric.of(moment("diagonal", 64))
    found = Quantizer(grid, rounding="gptq").quantize(W, diagonal)
    assert torch.equal(found[0], grid.encode(W, grid.scale(W)))
    assert Quantizer(grid, rounding="gptq").damping(diagonal) == 0.0


def test_gptq_of_an_input_that_never_fires_is_finite():
    H = moment("decaying", 64)
    H[5], H[:, 5] = 0.0, 0.0
    W, grid = weight(24, 64), MXIntGrid(3, 16)
    metric = Metric.of(H)
    codes, _ = Quantizer(grid, rounding="gptq").quantize(W, metric)
    assert metric.feedback.order[-1] == 5
    nearest = grid.encode(W, grid.scale(W))
    assert torch.equal(codes[:, 5], nearest[:, 5])


def test_damping_grows_until_the_moment_can_be_factored_and_is_recorded():
    H = torch.eye(32)
    H[0, 1] = H[1, 0] = 1.5  # no moment: rounding errors can make one as indefinite as this
    feedback = feedback_of(H)
    assert feedback.damping == pytest.approx(1.0)
    assert torch.isfinite(feedback.U).all()
    assert feedback_of(torch.eye(32)).damping == DAMPING


@pytest.mark.parametrize("shape", [(96, 160), (1, 128), (33, 256)])
@pytest.mark.parametrize("grid", [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
def test_gptq_is_bitwise_the_same_again_and_for_any_threads(shape, grid):
    W, H = weight(*shape), moment("decaying", shape[1])
    quantizer = Quantizer(grid, scales="search", rounding="gptq")
    first = with_threads(1, lambda: quantizer.quantize(W, Metric.of(H)))
    for threads in (1, 2):
        again = with_threads(threads, lambda: quantizer.quantize(W, Metric.of(H)))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def descent_by_definition(W, codes, scale, grid, H):
    """Each code in turn at its best beside all others, in float64, and how far the closest call was decided."""
    damped = Metric.of(H).H.double()
    damped = damped + DAMPING * torch.eye(len(damped), dtype=torch.float64)
    low, high = bounds(grid, grid.zero(codes), W, scale)
    codes, steps = codes.double(), scale.double().repeat_interleave(W.shape[1] // scale.shape[1], dim=1)
    margins = torch.zeros_like(codes)
    for j in range(W.shape[1]):
        Q = (grid.points(codes) * steps).bfloat16().double()
        slope = (W.double() - Q) @ damped[:, j]
        wanted = grid.position(((Q[:, j] + slope / damped[j, j]) / steps[:, j]).float()).double()
        margins[:, j] = (wanted - wanted.floor() - 0.5).abs()
        codes[:, j] = wanted.round().clamp(low[:, j], high[:, j])
    return codes.to(grid.dtype), margins


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", CORRELATED)
@pytest.mark.parametrize("shape", [(24, 64), (5, 32), (7, 160)])
def test_descent_takes_the_codes_of_its_definition(grid, kind, shape):
    W, H = weight(*shape), moment(kind, shape[1])
    start, scale = grid.quantize(W)
    codes = descend_codes(W, start, scale, grid, Metric.of(H).H)
    expected, margins = descent_by_definition(W, start, scale, grid, H)
    # Where a target lies on the edge between two codes, float32 may take the other one and the rest of its row follows.
    sure = (margins > 1e-3).cumprod(dim=1).bool()
    assert sure.float().mean() > 0.5
    assert torch.equal(codes[sure], expected[sure])


def damped_objective(W, codes, scale, grid, metric):
    delta = W.double() - grid.dequantize(codes, scale).double()
    return objective(delta, metric.H.double() + DAMPING * torch.eye(W.shape[1], dtype=torch.float64))


@pytest.mark.parametrize(
    "grid",
    [MXIntGrid(3, 16), IntGrid(3, 16), IntGrid(2, PER_CHANNEL), AsymmetricIntGrid(3, 16), NF4Grid(4, 32)],
    ids=str,
)
@pytest.mark.parametrize("kind", CORRELATED)
def test_each_descent_lowers_the_error_until_nothing_moves(grid, kind):
    W, metric = weight(48, 96), Metric.of(moment(kind, 96))
    codes, scale = Quantizer(grid, rounding="gptq").quantize(W, metric)
    errors = [damped_objective(W, codes, scale, grid, metric)]
    for _ in range(30):
        codes = descend_codes(W, codes, scale, grid, metric.H)
        errors.append(damped_objective(W, codes, scale, grid, metric))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < errors[0]
    assert errors[-1] == pytest.approx(errors[-2], rel=1e-5)


@pytest.mark.parametrize("grid", [IntGrid(3, 16), IntGrid(2, PER_CHANNEL), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("kind", CORRELATED)
def test_descended_scales_approach_the_best_ones_of_float64(grid, kind):
    W, metric = weight(24, 64), Metric.of(moment(kind, 64), 0.1)
    codes, scale = Quantizer(grid, rounding="gptq").quantize(W, metric)
    first = objective(W - grid.dequantize(codes, scale), metric.H)
    found = scale
    for _ in range(20):
        found = descend_scales(W, codes, found, grid, metric.H)
    H, best = metric.H.double(), 0.0
    for w, c in zip(W.double(), grid.points(codes).double(), strict=True):  # least squares over the scales of each row
        parts = torch.block_diag(*c.reshape(scale.shape[1], -1).unbind())
        wanted = torch.linalg.lstsq(parts @ H @ parts.mT, (parts @ H @ w).unsqueeze(1)).solution.squeeze(1)
        best += objective((w - wanted @ parts).unsqueeze(0), H)
    last = objective(W - grid.dequantize(codes, found), metric.H)
    assert best <= last < first
    rounding = 0.1 if grid.codebook is None else 0.15  # of scales to bfloat16, and of values that have many digits
    assert last - best < rounding * (first - best)


def test_scale_of_a_group_of_zeros_stays():
    grid, W = IntGrid(3, 16), weight(4, 32)
    codes, scale = grid.quantize(W)
    codes[1, :16] = 0
    found = descend_scales(W, codes, scale, grid, Metric.of(moment("decaying", 32)).H)
    assert found[1, 0] == scale[1, 0]
    assert found.isfinite().all()


@pytest.mark.parametrize("grid", [IntGrid(3, 32), AsymmetricIntGrid(3, 32), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (1, 128), (33, 256), (1600, 640)])
def test_descent_is_bitwise_the_same_again_and_for_any_threads(shape, grid):
    W, metric = weight(*shape), Metric.of(moment("decaying", shape[1]))
    quantizer, start = Quantizer(grid, scales="search", rounding="gptq"), grid.quantize(W)
    first = with_threads(1, lambda: quantizer.descend(W, metric, *start))
    for threads in (1, 2):
        again = with_threads(threads, lambda: quantizer.descend(W, metric, *start))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_choice_has_an_effect():
    W, metric = weight(24, 64), Metric.of(moment("decaying", 64))
    base = Quantizer(MXIntGrid(3, 16))
    found = [
        base.quantize(W, metric),
        replace(base, scales="search").quantize(W, metric),
        replace(base, rounding="gptq").quantize(W, metric),
        replace(base, scales="search", rounding="gptq").quantize(W, metric),
    ]
    for i, first in enumerate(found):
        for second in found[:i]:
            assert not torch.equal(first[0], second[0])
