"""Scales by search and scales that fit given codes, against their definitions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, NF4Grid, Quantizer, make_grid
from srr_dist.solve.grids import PER_CHANNEL
from srr_dist.solve.scales import descend_scales, fit_scales, search_scales
from tests.solve.problems import (
    CORRELATED,
    GRIDS,
    moment,
    normal,
    objective,
    own,
    sides,
    two_sided,
    weighed,
    weight,
    with_threads,
)


def importance(n, seed=0):
    return normal(n, seed=seed).square().add(0.01).float()


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
    monkeypatch.setattr("srr_dist.solve.scales._CHUNK", 64)
    assert equal(first, search_scales(W, grid, weights))


@pytest.mark.parametrize("grid", [IntGrid(3, 16), IntGrid(2, PER_CHANNEL), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("kind", CORRELATED)
def test_descended_scales_approach_the_best_ones_of_float64(grid, kind):
    W, metric = weight(24, 64), Metric.of(moment(kind, 64), 0.1)
    codes, scale = Quantizer(grid, rounding="gptq").quantize(W, metric)
    first = objective(W - grid.dequantize(codes, scale), metric.H)
    found = scale
    for _ in range(20):
        found = descend_scales(W, codes, found, grid, metric)
    H, best = metric.H.double(), 0.0
    for w, c in zip(W.double(), grid.points(codes).double(), strict=True):  # least squares over the scales of each row
        parts = torch.block_diag(*c.reshape(scale.shape[1], -1).unbind())
        wanted = torch.linalg.lstsq(parts @ H @ parts.mT, (parts @ H @ w).unsqueeze(1)).solution.squeeze(1)
        best += objective((w - wanted @ parts).unsqueeze(0), H)
    last = objective(W - grid.dequantize(codes, found), metric.H)
    assert best <= last < first
    rounding = 0.1 if grid.codebook is None else 0.15  # of scales to bfloat16, and of values that have many digits
    assert last - best < rounding * (first - best)


def test_descended_scale_of_a_group_of_zeros_stays():
    grid, W = IntGrid(3, 16), weight(4, 32)
    codes, scale = grid.quantize(W)
    codes[1, :16] = 0
    found = descend_scales(W, codes, scale, grid, Metric.of(moment("decaying", 32)))
    assert found[1, 0] == scale[1, 0]
    assert found.isfinite().all()


FITTED = [IntGrid(3, 16), IntGrid(2, PER_CHANNEL), AsymmetricIntGrid(3, 16), NF4Grid(4, 32)]


def least(W, points, groups, metric):
    """The same under the best scales of all, by least squares over all of them at once."""
    m, n = W.shape
    parts = [torch.zeros(m, n, dtype=torch.float64) for _ in range(m * groups)]
    for number, part in enumerate(parts):
        row, inputs = number // groups, slice(number % groups * (n // groups), (number % groups + 1) * (n // groups))
        part[row, inputs] = points[row, inputs].double()
    A = torch.stack(parts)
    H_O, H_I = sides(metric)
    slopes = H_O @ A @ H_I
    curvature, wanted = torch.einsum("aij,bij->ab", slopes, A), torch.einsum("aij,ij->a", slopes, W.double())
    found = torch.linalg.lstsq(curvature, wanted.unsqueeze(1), driver="gelsd").solution
    return weighed(W - (A * found[:, :, None]).sum(0), metric)


@pytest.mark.parametrize("grid", FITTED, ids=str)
@pytest.mark.parametrize("outputs", ["decaying", "wide", "singular", "massive", "banded"])
def test_fitted_scales_come_near_to_the_best_of_all_in_float64(grid, outputs):
    W, metric = weight(20, 64), two_sided((20, 64), outputs)
    codes, scale = grid.quantize(W)
    found = fit_scales(W, codes, scale, grid, metric)
    first, last = (weighed(W - grid.dequantize(codes, s), metric) for s in (scale, found))
    best = least(W, grid.points(codes), scale.shape[1], metric)
    assert 0.99 * best <= last < first  # points times scales are rounded on the way to readers
    assert last - best < 0.2 * (first - best)


@pytest.mark.parametrize("inputs", ["diagonal", "massive"])
def test_fitted_scales_under_other_moments_of_the_inputs_have_less_error(inputs):
    W, grid, metric = weight(48, 64), IntGrid(3, 16), two_sided((48, 64), inputs=inputs)
    codes, scale = grid.quantize(W)
    found = fit_scales(W, codes, scale, grid, metric)
    assert metric.energy(W - grid.dequantize(codes, found)) < 0.99 * metric.energy(W - grid.dequantize(codes, scale))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 20), groups=st.integers(1, 4), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_fitted_scales_never_lose(m, groups, bits, seed):
    W, grid = weight(m, 8 * groups, seed=seed), IntGrid(bits, 8)
    metric = two_sided((m, 8 * groups), "wide", "massive")
    codes, scale = grid.quantize(W)
    found = fit_scales(W, codes, scale, grid, metric)
    before, after = (metric.energy(W - grid.dequantize(codes, s)) for s in (scale, found))
    assert after <= before and (found != 0).all()


@pytest.mark.parametrize("grid", FITTED, ids=str)
def test_scales_that_fit_already_stay(grid):
    codes, scale = grid.quantize(weight(48, 64))
    W = grid.dequantize(codes, scale)
    assert torch.equal(fit_scales(W, codes, scale, grid, two_sided((48, 64))), scale)


def test_fitted_scale_of_a_group_of_zeros_stays():
    W, grid = weight(8, 32), IntGrid(3, 16)
    codes, scale = grid.quantize(W)
    codes[1, :16] = 0
    found = fit_scales(W, codes, scale, grid, two_sided((8, 32)))
    assert found[1, 0] == scale[1, 0] and found.isfinite().all()
    assert not torch.equal(found, scale)


@pytest.mark.parametrize("grid", [IntGrid(3, 32), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (1, 128), (33, 256), (640, 576)])
def test_fitted_scales_are_bitwise_the_same_again_and_for_any_threads(shape, grid):
    W, start = weight(*shape), grid.quantize(weight(*shape))
    first = with_threads(1, lambda: fit_scales(W, *start, grid, two_sided(shape)))
    for threads in (1, 2):
        assert torch.equal(first, with_threads(threads, lambda: fit_scales(W, *start, grid, two_sided(shape))))
