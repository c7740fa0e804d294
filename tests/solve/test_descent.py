"""Codes and scales that descend from given ones, against their definitions in float64."""

from itertools import pairwise

import pytest
import torch

from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, MXIntGrid, NF4Grid, Quantizer
from srr_dist.solve.descent import descend_across, descend_codes, pulls
from srr_dist.solve.grids import PER_CHANNEL
from srr_dist.solve.rounding import DAMPING
from tests.solve.problems import (
    CORRELATED,
    GRIDS,
    bounds,
    moment,
    objective,
    sides,
    two_sided,
    weighed,
    weight,
    with_threads,
)


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
    codes = descend_codes(W, start, scale, grid, pulls(Metric.of(H).H))
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
        codes = descend_codes(W, codes, scale, grid, pulls(metric.H))
        errors.append(damped_objective(W, codes, scale, grid, metric))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < errors[0]
    assert errors[-1] == pytest.approx(errors[-2], rel=1e-5)


@pytest.mark.parametrize("grid", [IntGrid(3, 32), AsymmetricIntGrid(3, 32), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (1, 128), (33, 256), (1600, 640)])
def test_descent_is_bitwise_the_same_again_and_for_any_threads(shape, grid):
    W, metric = weight(*shape), Metric.of(moment("decaying", shape[1]))
    quantizer, start = Quantizer(grid, scales="search", rounding="gptq"), grid.quantize(W)
    first = with_threads(1, lambda: quantizer.descend(W, metric, *start))
    for threads in (1, 2):
        again = with_threads(threads, lambda: quantizer.descend(W, metric, *start))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def rows_by_definition(W, codes, scale, grid, metric):
    """Every row in turn at its best beside all others, in float64, and how far the closest call was decided."""
    H_O, _ = sides(metric)
    codes, margins = codes.clone(), []
    for i in range(len(W)):
        delta = W.double() - grid.dequantize(codes, scale).double()
        others = H_O[i] @ delta - H_O[i, i] * delta[i]
        target = (W[i].double() + others / H_O[i, i]).unsqueeze(0)
        codes[i : i + 1], margin = descent_by_definition(
            target, codes[i : i + 1], scale[i : i + 1], grid, metric.H.double()
        )
        margins.append(float(margin.min()))
    return codes, min(margins)


@pytest.mark.parametrize("grid", [IntGrid(3, 16), AsymmetricIntGrid(3, 16), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("outputs", ["decaying", "singular"])
def test_rows_one_by_one_take_the_codes_of_their_definition(grid, outputs, monkeypatch):
    monkeypatch.setattr("srr_dist.solve.descent.PARTS", 6)
    monkeypatch.setattr("srr_dist.solve.descent._MOST_PARTS", 6)
    W, metric = weight(6, 32), two_sided((6, 32), outputs)
    codes, scale = grid.quantize(W)
    expected, margin = rows_by_definition(W, codes, scale, grid, metric)
    assert margin > 1e-5  # or float32 may decide otherwise
    assert torch.equal(descend_across(W, codes, scale, grid, metric), expected)


@pytest.mark.parametrize("grid", [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("outputs", ["decaying", "singular", "massive", "wide"])
@pytest.mark.parametrize("shape", [(48, 96), (5, 64), (4, 32)])
def test_each_descent_across_lowers_the_error(grid, outputs, shape):
    W, metric = weight(*shape), two_sided(shape, outputs)
    codes, scale = grid.quantize(W)
    errors = [weighed(W - grid.dequantize(codes, scale), metric)]
    for _ in range(4):
        codes = descend_across(W, codes, scale, grid, metric)
        errors.append(weighed(W - grid.dequantize(codes, scale), metric))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < 0.95 * errors[0]


def test_rows_that_depend_on_each_other_move_in_smaller_parts(monkeypatch):
    W, grid = weight(64, 32), IntGrid(3, 16)
    one = torch.ones(64, 64, dtype=torch.float64) + 0.2 * torch.eye(64, dtype=torch.float64)
    metric = two_sided((64, 32)).inputs.beside(Metric.of(one))  # all outputs are nearly the same
    codes, scale = grid.quantize(W)
    halved = descend_across(W, codes, scale, grid, metric)
    monkeypatch.setattr("srr_dist.solve.descent._MOST_PARTS", 8)
    whole = descend_across(W, codes, scale, grid, metric)
    first, last, stuck = (weighed(W - grid.dequantize(c, scale), metric) for c in (codes, halved, whole))
    assert last < 0.5 * stuck <= 0.5 * first


def test_outputs_that_do_not_depend_on_each_other_descend_as_each_by_itself():
    W, grid = weight(48, 96), IntGrid(3, 16)
    metric = two_sided((48, 96)).inputs
    codes, scale = grid.quantize(W)
    apart = descend_codes(W, codes, scale, grid, pulls(metric.H))
    across = descend_across(W, codes, scale, grid, metric.beside(Metric.of(torch.eye(48))))
    assert (apart == across).float().mean() > 0.99
    assert not torch.equal(apart, codes)


@pytest.mark.parametrize("grid", [IntGrid(3, 32), AsymmetricIntGrid(3, 32), NF4Grid(4, 32)], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (1, 128), (33, 256), (640, 320)])
def test_descent_across_is_bitwise_the_same_again_and_for_any_threads(shape, grid):
    W, metric = weight(*shape), two_sided(shape)
    quantizer, start = Quantizer(grid, scales="search", rounding="yaqa"), grid.quantize(W)
    first = with_threads(1, lambda: quantizer.descend(W, metric, *start))
    for threads in (1, 2):
        again = with_threads(threads, lambda: quantizer.descend(W, metric, *start))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
