"""Feedback in both directions, against the literal formula in float64 and by what it must leave."""

import pytest
import torch

from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, MXIntGrid
from srr_dist.solve import wavefront as module
from srr_dist.solve.grids import PER_CHANNEL
from srr_dist.solve.rounding import Feedback, feedback_of, gptq
from srr_dist.solve.scales import search_scales
from srr_dist.solve.wavefront import yaqa
from tests.solve.problems import moment, weight, with_threads

GRIDS = [
    MXIntGrid(3, 16), IntGrid(3, 16), IntGrid(2, 8), IntGrid(4, PER_CHANNEL), AsymmetricIntGrid(3, 16),
]  # fmt: skip
SHAPES = [(24, 32), (40, 16), (1, 64), (7, 160)]
KINDS = ["decaying", "singular", "wide"]


def feedback(kind, n, seed=0):
    return feedback_of(Metric.of(moment(kind, n, seed=seed)).H)


def problem(shape, grid, kind="decaying"):
    """A weight, its scales and zero points, and the feedback along inputs and outputs."""
    W = weight(*shape)
    scale, zero = search_scales(W, grid, torch.ones(shape[1]))
    return W, scale, zero, feedback(kind, shape[1]), feedback(kind, shape[0], seed=3)


def damped(side):
    """``U D Uᵀ`` in the natural order, float64."""
    back = torch.argsort(side.order)
    return ((side.U.double() * side.D.double()) @ side.U.double().mT)[back][:, back]


def by_definition(W, scale, zero, grid, inputs, outputs):
    """One entry after the other, each target from the whole of ``U_Oᵀ Δ U_I``, and how far calls were decided."""
    place = outputs.order[:, None], inputs.order
    size = W.shape[1] // scale.shape[1]
    steps = scale.double().repeat_interleave(size, dim=1)[place]
    zeros = (torch.zeros(scale.shape) if zero is None else zero).double().repeat_interleave(size, dim=1)[place]
    low, high = (end - zeros for end in grid.code_range)
    W, U_O, U_I = W.double()[place], outputs.U.double(), inputs.U.double()
    delta, found, margins = torch.zeros_like(W), torch.zeros_like(W), torch.ones_like(W)
    for j in range(W.shape[1]):
        for i in range(W.shape[0]):
            exact = (W[i, j] + U_O[:, i] @ delta @ U_I[:, j]) / steps[i, j]
            margins[i, j] = (exact - exact.floor() - 0.5).abs()
            found[i, j] = exact.round().clamp(low[i, j], high[i, j])
            delta[i, j] = W[i, j] - (found[i, j] * steps[i, j]).bfloat16().double()
    codes = torch.empty_like(found)
    codes[place] = found
    return codes.to(grid.dtype), float(margins.min())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_literal_formula(shape, kind, grid, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 8)
    W, scale, zero, inputs, outputs = problem(shape, grid, kind)
    codes = yaqa(W, scale, grid, inputs, outputs, zero)
    expected, closest = by_definition(W, scale, zero, grid, inputs, outputs)
    assert closest > 1e-6  # no target so near to the middle of two points that float32 decides
    assert codes.dtype == grid.dtype and codes.is_contiguous()
    assert torch.equal(codes, expected)


def whitened(W, codes, scale, grid, inputs, outputs):
    """``Δ`` and ``η = U_Oᵀ Δ U_I`` in the order of rounding, float64."""
    place = outputs.order[:, None], inputs.order
    delta = W.double() - grid.dequantize(codes, scale).double()
    return delta, outputs.U.double().mT @ delta[place] @ inputs.U.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 64), (33, 160), (64, 64)])
def test_error_is_the_sum_of_what_each_rounding_leaves(shape, kind):
    grid = IntGrid(3, 16)
    W, scale, _, inputs, outputs = problem(shape, grid, kind)
    delta, eta = whitened(W, yaqa(W, scale, grid, inputs, outputs), scale, grid, inputs, outputs)
    error = torch.trace(damped(outputs) @ delta @ damped(inputs) @ delta.mT)
    parts = outputs.D.double()[:, None] * inputs.D.double() * eta.square()
    assert float(parts.sum()) == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (33, 160), (160, 96), (200, 224)])
def test_each_rounding_leaves_half_a_step_at_most_unless_the_range_ends(shape, grid):
    W, scale, zero, inputs, outputs = problem(shape, grid)
    codes = yaqa(W, scale, grid, inputs, outputs, zero)
    place, size = (outputs.order[:, None], inputs.order), W.shape[1] // scale.shape[1]
    _, eta = whitened(W, codes, scale, grid, inputs, outputs)
    Q = grid.dequantize(codes, scale)[place].abs()
    steps = scale.float().abs().repeat_interleave(size, dim=1)[place]
    zeros = 0 if zero is None else zero.repeat_interleave(size, dim=1)
    stored = (codes + zeros)[place]
    inside = (stored > grid.code_range[0]) & (stored < grid.code_range[1])
    assert inside.float().mean() > 0.3 or grid.bits == 2
    assert (eta.abs() <= 0.5001 * steps + 2**-8 * Q)[inside].all()  # Q is rounded to bfloat16


@pytest.mark.parametrize("grid", [IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (1, 128), (200, 224)])
def test_codes_are_the_same_for_any_tile_and_any_threads(shape, grid, monkeypatch):
    W, scale, zero, inputs, outputs = problem(shape, grid)
    first = with_threads(1, lambda: yaqa(W, scale, grid, inputs, outputs, zero))
    for threads in (1, 2):
        assert torch.equal(first, with_threads(threads, lambda: yaqa(W, scale, grid, inputs, outputs, zero)))
    for tile in (1, 5, 16, 200):
        monkeypatch.setattr(module, "_TILE", tile)
        assert torch.equal(first, yaqa(W, scale, grid, inputs, outputs, zero))


@pytest.mark.parametrize("grid", [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (48, 160)])
def test_outputs_that_count_alike_leave_error_feedback_along_inputs(shape, grid):
    m = shape[0]
    W, scale, zero, inputs, _ = problem(shape, grid)
    alike = Feedback(torch.arange(m), torch.eye(m), torch.ones(m), 0.0)
    assert torch.equal(yaqa(W, scale, grid, inputs, alike, zero), gptq(W, scale, grid, inputs, zero))


@pytest.mark.parametrize("grid", [MXIntGrid(3, 16), IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_feedback_in_both_directions_has_less_error_than_along_inputs_alone(kind, grid):
    W, scale, zero, inputs, outputs = problem((96, 128), grid, kind)
    errors = []
    for codes in (gptq(W, scale, grid, inputs, zero), yaqa(W, scale, grid, inputs, outputs, zero)):
        delta = W.double() - grid.dequantize(codes, scale).double()
        errors.append(float(torch.trace(damped(outputs) @ delta @ damped(inputs) @ delta.mT)))
    assert errors[1] < 0.8 * errors[0]


def test_independent_outputs_can_be_rounded_apart():
    """A moment of outputs in two diagonal blocks: the rows of each by themselves."""
    grid, (m, n) = IntGrid(3, 16), (80, 64)
    W, scale, _, inputs, _ = problem((m, n), grid)
    blocks = [feedback("decaying", 32, seed=3), feedback("wide", 48, seed=4)]
    both = Feedback(
        torch.cat((blocks[0].order, blocks[1].order + 32)),
        torch.block_diag(*(block.U for block in blocks)),
        torch.cat([block.D for block in blocks]),
        0.01,
    )
    apart = [
        yaqa(W[rows], scale[rows], grid, inputs, block)
        for rows, block in zip((slice(0, 32), slice(32, m)), blocks, strict=True)
    ]
    assert torch.equal(torch.cat(apart), yaqa(W, scale, grid, inputs, both))
