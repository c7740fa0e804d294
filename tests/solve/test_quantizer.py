"""Rounding with error feedback, against its definition in float64."""

from dataclasses import replace

import pytest
import torch

from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, MXIntGrid, Quantizer
from srr_dist.solve.rounding import DAMPING, feedback_of, gptq
from tests.solve.problems import (
    CORRELATED,
    GRIDS,
    bounds,
    full,
    moment,
    objective,
    own,
    two_sided,
    weight,
    with_threads,
)


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


CROSSED = [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16)]


@pytest.mark.parametrize("grid", CROSSED, ids=str)
def test_outputs_in_bands_are_rounded_as_each_band_by_itself(grid):
    quantizer, W, metric = Quantizer(grid, "search", "yaqa"), weight(96, 64), two_sided((96, 64), "banded")
    codes, scale = quantizer.quantize(W, metric)
    better = quantizer.descend(W, metric, codes, scale)
    assert metric.outputs is not None
    for rows, band in zip((slice(0, 48), slice(48, 96)), metric.outputs.bands, strict=True):
        alone = metric.inputs.beside(band)
        expected = quantizer.quantize(W[rows], alone)
        assert torch.equal(codes[rows], expected[0]) and torch.equal(scale[rows], expected[1])
        assert torch.equal(better[0][rows], quantizer.descend(W[rows], alone, *expected)[0])


@pytest.mark.parametrize("grid", CROSSED, ids=str)
def test_bands_are_a_full_moment_without_what_lies_between_them(grid):
    quantizer, W, banded = Quantizer(grid, "search", "yaqa"), weight(96, 64), two_sided((96, 64), "banded")
    assert banded.outputs is not None
    whole = banded.inputs.beside(Metric(full(banded.outputs.H)))
    codes, scale = quantizer.quantize(W, banded)
    expected, its_scale = quantizer.quantize(W, whole)
    assert torch.equal(scale, its_scale)
    assert (codes != expected).float().mean() < 0.005  # sums in another order


@pytest.mark.parametrize("grid", CROSSED, ids=str)
def test_codes_in_bands_are_bitwise_the_same_again_and_for_any_threads(grid):
    quantizer, W = Quantizer(grid, "search", "yaqa"), weight(96, 160)

    def found():
        metric = two_sided((96, 160), "banded")
        codes, scale = quantizer.quantize(W, metric)
        return codes, *quantizer.descend(W, metric, codes, scale)

    first = with_threads(1, found)
    for threads in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, with_threads(threads, found), strict=True))
