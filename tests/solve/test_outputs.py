"""A layer whose metric has an output side: the same flow, held against both moments in float64."""

from dataclasses import replace

import pytest
import torch

from srr_dist.solve import (
    AsymmetricIntGrid,
    IntGrid,
    Metric,
    MXIntGrid,
    Quantizer,
    SolveOptions,
    remeasured,
    solve_layer,
)
from tests.solve.problems import sides, two_sided, weighed, weight, with_threads

GRID = IntGrid(3, 16)
YAQA = Quantizer(GRID, "search", "yaqa")
OPTIONS = SolveOptions("srr", YAQA, rank=8)
NAME = "model.layers.3.mlp.up_proj"
OUTPUTS = ["decaying", "wide", "singular", "massive", "diagonal", "banded"]


def error(W, solution, grid):
    Q = grid.dequantize(solution.codes, solution.scale).double()
    return W.double() - Q - solution.L.double() @ solution.R.double()


def best(E, metric, rank):
    """``min tr(H_O (E − L R) H_I (E − L R)ᵀ)`` of that rank, by the singular values of ``C_Oᵀ E C_I``."""
    H_O, H_I = sides(metric)
    values, V = torch.linalg.eigh(H_I)
    S = V * values.clamp_min(0.0).sqrt()
    return float(torch.linalg.svdvals(torch.linalg.cholesky(H_O).mT @ E.double() @ S)[rank:].square().sum())


def solve(W, metric, options=OPTIONS):
    return solve_layer(W, metric, NAME, options)


def same(first, second):
    tensors = ("codes", "scale", "L", "R", "singular_values")
    return all(torch.equal(getattr(first, t), getattr(second, t)) for t in tensors)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (4, 64)])
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("grid", [GRID, MXIntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
def test_stored_objective_is_that_of_what_is_stored_with_both_moments(shape, outputs, form, grid):
    W, metric = weight(*shape), two_sided(shape, outputs)
    options = replace(OPTIONS, form=form, quantizer=replace(YAQA, grid=grid), iterations=1)
    solution = solve(W, metric, options)
    exact, energy = weighed(error(W, solution, grid), metric), weighed(W, metric)
    assert solution.result["objective"]["stored"] == pytest.approx(exact, rel=1e-3, abs=1e-7 * energy)
    assert solution.result["energy"] == pytest.approx(energy, rel=1e-5)
    assert solution.result["damping_output"] == 0.01


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("shape", [(48, 64), (160, 32), (32, 160)])
def test_adapter_reaches_the_float64_optimum_in_both_moments(shape, outputs):
    W, metric = weight(*shape), two_sided(shape, outputs)
    solution = solve(W, metric, SolveOptions("qer", Quantizer(GRID), rank=8))
    E = W - GRID.dequantize(*GRID.quantize(W))
    least, energy = best(E, metric, 8), weighed(W, metric)
    assert solution.result["objective"]["chosen"] == pytest.approx(least, rel=1e-3, abs=1e-7 * energy)
    assert solution.result["objective"]["stored"] <= 1.01 * least + 2e-5 * energy
    assert (solution.singular_values.diff() <= 0).all()


@pytest.mark.parametrize("k", [0, 3, 8])
def test_what_is_preserved_is_the_best_of_that_rank_in_both_moments(k):
    W, metric = weight(48, 64), two_sided((48, 64))
    plain = Quantizer(IntGrid(8, 16))  # so fine that preserving is all there is to see
    solution = solve(W, metric, SolveOptions("srr", plain, 8, split=f"fixed:{k}", form="split"))
    found = weighed(solution.L[:, :k].double() @ solution.R[:k].double(), metric) if k else 0.0
    assert found == pytest.approx(weighed(W, metric) - best(W, metric, k), rel=1e-2)


@pytest.mark.parametrize("outputs", ["decaying", "wide", "singular"])
@pytest.mark.parametrize("method", ["none", "srr"])
def test_feedback_along_outputs_too_has_less_error_in_both_moments(outputs, method):
    W, metric = weight(64, 96), two_sided((64, 96), outputs)
    options = replace(OPTIONS, method=method, split="criterion", iterations=2, rounding_metric="downdated")
    found = [
        solve(W, metric, replace(options, quantizer=replace(YAQA, rounding=rounding))).result["objective"]["chosen"]
        for rounding in ("yaqa", "gptq", "nearest")
    ]
    assert found[0] < 0.95 * found[1] < 0.95 * found[2]


def test_solution_for_both_moments_is_better_there_than_the_one_for_inputs_alone():
    W, metric = weight(64, 96), two_sided((64, 96), "wide")
    both, alone = (solve(W, given, replace(OPTIONS, iterations=2)) for given in (metric, metric.inputs))
    assert weighed(error(W, both, GRID), metric) < 0.8 * weighed(error(W, alone, GRID), metric)
    assert "damping_output" not in alone.result


@pytest.mark.parametrize("method", ["none", "qer", "srr"])
def test_without_an_output_side_rounding_is_along_inputs_bit_for_bit(method):
    W, metric = weight(48, 64), two_sided((48, 64)).inputs
    options = replace(OPTIONS, method=method, iterations=1, descent=1)
    assert same(solve(W, metric, options), solve(W, metric, replace(options, quantizer=replace(YAQA, rounding="gptq"))))


def test_outputs_that_count_alike_change_no_code():
    W, metric = weight(48, 64), two_sided((48, 64)).inputs
    alike = metric.beside(Metric.of(torch.full((48,), 4.0)))
    options = replace(OPTIONS, split="criterion", descent=1)
    without, having = solve(W, metric, options), solve(W, alike, options)
    assert torch.equal(without.codes, having.codes) and torch.equal(without.scale, having.scale)
    for key, value in without.result["objective"].items():
        assert having.result["objective"][key] == pytest.approx(4.04 * value, rel=1e-3)  # 4 and the damping


def test_diagonal_output_side_changes_the_adapter_and_leaves_rounding_along_inputs():
    W, metric = weight(48, 64), two_sided((48, 64), "diagonal")
    options = SolveOptions("qer", YAQA, 8)
    both, alone = solve(W, metric, options), solve(W, metric.inputs, options)
    assert torch.equal(both.codes, alone.codes) and not torch.equal(both.L, alone.L)
    assert weighed(error(W, both, GRID), metric) < 0.9 * weighed(error(W, alone, GRID), metric)


def test_diagonal_moment_of_inputs_leaves_feedback_along_outputs():
    W, metric = weight(48, 64), two_sided((48, 64), "decaying", "diagonal")
    fed, nearest = (Quantizer(GRID, rounding=rounding).quantize(W, metric) for rounding in ("yaqa", "nearest"))
    errors = [weighed(W - GRID.dequantize(*found), metric) for found in (fed, nearest)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("outputs", ["decaying", "massive"])
def test_iterations_and_search_never_lose(outputs):
    W, metric = weight(64, 48), two_sided((64, 48), outputs)
    results = [solve(W, metric, replace(OPTIONS, iterations=count)).result for count in (0, 1, 3)]
    chosen = [result["objective"]["chosen"] for result in results]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] <= results[0]["objective"]["k0"]


def test_rounding_beyond_the_adapter_has_less_error():
    W, metric = weight(64, 96), two_sided((64, 96), "decaying", "massive")
    options = replace(OPTIONS, split="criterion", iterations=3)
    full_, beyond = (solve(W, metric, replace(options, rounding_metric=name)) for name in ("full", "downdated"))
    assert beyond.result["objective"]["chosen"] < full_.result["objective"]["chosen"]


@pytest.mark.parametrize("outputs", ["decaying", "wide", "massive", "diagonal"])
@pytest.mark.parametrize(("method", "grid"), [("none", GRID), ("none", MXIntGrid(3, 16)), ("srr", GRID)], ids=str)
def test_codes_and_scales_descend_in_both_moments(method, grid, outputs):
    W, metric = weight(64, 96), two_sided((64, 96), outputs)
    options = replace(OPTIONS, method=method, split="criterion", quantizer=replace(YAQA, grid=grid))
    still, descended = (solve(W, metric, replace(options, descent=count)) for count in (0, 3))
    assert descended.result["objective"]["chosen"] < 0.97 * still.result["objective"]["chosen"]
    assert descended.result["iteration"] > 0


def test_descent_beyond_both_factors_has_less_error():
    W, metric = weight(64, 96), two_sided((64, 96), "massive", "massive")
    options = replace(OPTIONS, split="criterion", iterations=1, descent=3)
    alike, beyond = (solve(W, metric, replace(options, rounding_metric=name)) for name in ("full", "downdated"))
    assert beyond.result["objective"]["chosen"] < alike.result["objective"]["chosen"]


def test_remeasured_solution_is_what_it_was():
    W, metric = weight(48, 64), two_sided((48, 64))
    solution = solve(W, metric)
    again = remeasured(W, metric, solution, solution, GRID)
    first, second = (s.result["objective"]["stored"] for s in (solution, again))
    assert second == pytest.approx(first, rel=1e-2)
    assert second == pytest.approx(weighed(error(W, again, GRID), metric), rel=1e-3)
    torch.testing.assert_close(again.singular_values, solution.singular_values, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("form", ["joint", "split"])
def test_solution_is_bitwise_the_same_again_and_for_any_threads(shape, form):
    W, options = weight(*shape), replace(OPTIONS, form=form, rank=5, iterations=1, rounding_metric="downdated")
    first = with_threads(1, lambda: solve(W, two_sided(shape), options))
    for threads in (1, 2):
        assert same(first, with_threads(threads, lambda: solve(W, two_sided(shape), options)))
