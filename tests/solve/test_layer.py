"""A layer as a whole: what is stored, what is recorded, and what every option does."""

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.errors import ConfigError
from srr_dist.seeds import layer_seed
from srr_dist.solve import AsymmetricIntGrid, IntGrid, Metric, MXIntGrid, Quantizer, SolveOptions, solve_layer
from srr_dist.solve.split import coarse_candidates
from tests.solve.problems import MOMENTS, best_objective, full, moment, normal, objective, weight, with_threads

GRID = MXIntGrid(3, 16)
OPTIONS = SolveOptions("srr", Quantizer(GRID), rank=16)
NAME = "model.layers.3.mlp.up_proj"


def solve(W, H, options=OPTIONS, name=NAME):
    return solve_layer(W, Metric.of(H), name, options)


def stored_weight(solution, grid=GRID):
    """Ŵ from what is stored, in float64."""
    Q = grid.dequantize(solution.codes, solution.scale).double()
    return Q + solution.L.double() @ solution.R.double()


def quantized(W, grid=GRID):
    return grid.dequantize(*grid.quantize(W))


def same(first, second):
    tensors = ("codes", "scale", "L", "R", "singular_values")
    records = [{key: value for key, value in s.result.items() if key != "seconds"} for s in (first, second)]
    return all(torch.equal(getattr(first, t), getattr(second, t)) for t in tensors) and records[0] == records[1]


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (160, 32), (32, 160), (1, 64)])
@pytest.mark.parametrize("form", ["joint", "split"])
def test_stored_objective_equals_the_one_of_codes_scale_and_factors(shape, kind, form):
    W, H = weight(*shape), moment(kind, shape[1])
    solution = solve(W, H, replace(OPTIONS, form=form))
    stored = solution.result["objective"]["stored"]
    exact = objective(W.double() - stored_weight(solution), H)
    assert stored == pytest.approx(exact, rel=1e-3, abs=1e-7 * objective(W, H))


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("shape", [(48, 64), (160, 32), (32, 160)])
def test_qer_reaches_the_float64_optimum_before_and_nearly_after_rounding(shape, kind):
    W, H = weight(*shape), moment(kind, shape[1])
    rank = min(8, *shape)
    result = solve(W, H, SolveOptions("qer", Quantizer(GRID), rank)).result
    best, energy = best_objective(W - quantized(W), H, rank), objective(W, H)
    assert result["objective"]["chosen"] == pytest.approx(best, rel=1e-3, abs=1e-7 * energy)
    # Rounding R to 8 bits costs about 2^-18 of what the adapter carries.
    assert result["objective"]["stored"] <= 1.002 * best + 2e-5 * energy
    assert result["energy"] == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("kind", MOMENTS)
def test_search_is_never_worse_than_any_k_it_tried(kind):
    W, H = weight(64, 48), moment(kind, 48)
    result = solve(W, H).result
    candidates = {int(k): value for k, value in result["candidates"].items()}
    assert {0, result["k_criterion"], result["k"], *coarse_candidates(16)} <= set(candidates)
    assert result["objective"]["chosen"] == candidates[result["k"]] == min(candidates.values())
    assert result["objective"]["k0"] == candidates[0]
    assert result["objective"]["criterion"] == candidates[result["k_criterion"]]
    assert result["k"] == min(k for k, value in candidates.items() if value == min(candidates.values()))
    assert result["search"] == result["candidates"]


@pytest.mark.parametrize("kind", ["decaying", "massive", "singular"])
def test_what_a_plain_search_finds_is_judged_by_the_whole_quantizer(kind):
    W, H = weight(64, 48), moment(kind, 48)
    fed = Quantizer(IntGrid(3, 16), scales="search", rounding="gptq")
    result, plain = (
        solve(W, H, replace(OPTIONS, quantizer=quantizer)).result for quantizer in (fed, Quantizer(IntGrid(3, 16)))
    )
    assert result["search"] == plain["search"]
    assert 0 < result["seconds"]["search"] < result["seconds"]["solve"]
    assert set(result["candidates"]) == {"0", str(result["k_criterion"]), str(plain["k"])}
    for k, value in result["candidates"].items():
        only = solve(W, H, replace(OPTIONS, quantizer=fed, split=f"fixed:{k}")).result
        assert only["objective"]["chosen"] == value
        assert result["objective"]["chosen"] <= value


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 24), groups=st.integers(1, 3), rank=st.integers(1, 12), bits=st.integers(2, 4))
def test_search_never_loses_to_plain_qer(m, groups, rank, bits):
    n, grid = 8 * groups, MXIntGrid(bits, 8)
    W, H = weight(m, n, seed=m), moment("decaying", n, seed=n)
    searched = solve(W, H, SolveOptions("srr", Quantizer(grid), rank)).result
    plain = solve(W, H, SolveOptions("qer", Quantizer(grid), rank)).result
    assert searched["objective"]["chosen"] <= plain["objective"]["chosen"] * (1 + 1e-12)
    assert searched["rank"] == min(rank, m, n)


@pytest.mark.parametrize("kind", ["decaying", "massive", "diagonal", "singular"])
@pytest.mark.parametrize("k", [0, 1, 5, 16])
def test_joint_form_is_never_worse_than_the_split_form(kind, k):
    W, H = weight(64, 48), moment(kind, 48)
    joint, split = (solve(W, H, replace(OPTIONS, split=f"fixed:{k}", form=form)) for form in ("joint", "split"))
    assert torch.equal(joint.codes, split.codes)
    floor = 1e-7 * objective(W, H)
    assert joint.result["objective"]["chosen"] <= 1.001 * split.result["objective"]["chosen"] + floor


@pytest.mark.parametrize("kind", MOMENTS)
def test_split_form_stores_its_objective_in_singular_order(kind):
    W, H = weight(64, 48), moment(kind, 48)
    solution = solve(W, H, replace(OPTIONS, split="fixed:6", form="split"))
    preserved = best_objective(W, H, 6)
    assert (solution.singular_values.diff() <= 0).all()
    energy = objective(W, H)
    product = objective(solution.L.double() @ solution.R.double(), H)
    assert float(solution.singular_values.double().square().sum()) == pytest.approx(product, rel=1e-2)  # R is rounded
    assert solution.result["objective"]["chosen"] < preserved + 1e-7 * energy


@pytest.mark.parametrize("kind", ["decaying", "massive", "diagonal"])
def test_fixed_zero_equals_qer_bit_for_bit(kind):
    W, H = weight(48, 64), moment(kind, 64)
    fixed = solve(W, H, replace(OPTIONS, split="fixed:0"))
    qer = solve(W, H, replace(OPTIONS, method="qer"))
    for tensor in ("codes", "scale", "L", "R", "singular_values"):
        assert torch.equal(getattr(fixed, tensor), getattr(qer, tensor)), tensor
    assert fixed.result["objective"]["chosen"] == qer.result["objective"]["chosen"]
    assert qer.result["k"] == 0 and qer.result["k_criterion"] is None


def test_none_stores_the_nearest_codes_alone():
    W, H = weight(48, 64), moment("decaying", 64)
    solution = solve(W, H, replace(OPTIONS, method="none"))
    codes, scale = GRID.quantize(W)
    assert torch.equal(solution.codes, codes) and torch.equal(solution.scale, scale)
    assert solution.L.shape == (48, 0) and solution.R.shape == (0, 64) and solution.singular_values.shape == (0,)
    assert solution.result["rank"] == solution.result["k"] == 0
    expected = objective(W - quantized(W), H)
    assert solution.result["objective"]["chosen"] == pytest.approx(expected, rel=1e-5)
    assert solution.result["objective"]["stored"] == pytest.approx(expected, rel=1e-5)


def test_solution_has_the_types_that_are_stored():
    solution = solve(weight(48, 64).bfloat16(), moment("decaying", 64))
    assert (solution.codes.dtype, solution.codes.shape) == (torch.int8, (48, 64))
    assert (solution.scale.dtype, solution.scale.shape) == (torch.bfloat16, (48, 4))
    assert (solution.L.dtype, solution.L.shape) == (torch.bfloat16, (48, 16))
    assert (solution.R.dtype, solution.R.shape) == (torch.bfloat16, (16, 64))
    assert (solution.singular_values.dtype, solution.singular_values.shape) == (torch.float32, (16,))


def test_record_is_plain_json_with_its_fields():
    solution = solve(weight(48, 64), moment("decaying", 64))
    record = json.loads(json.dumps(solution.result, allow_nan=False))
    assert record == solution.result
    assert set(record) == {
        "name", "shape", "rank", "k", "k_criterion", "objective", "energy", "candidates", "search", "iteration",
        "singular_values", "seed", "damping", "bits", "bits_per_weight", "seconds",
    }  # fmt: skip
    assert set(record["objective"]) == {"k0", "criterion", "chosen", "stored"}
    assert (record["name"], record["shape"], record["rank"]) == (NAME, [48, 64], 16)
    assert record["bits_per_weight"] == 3 + 16 / 16 + 16 * 16 * (48 + 64) / (48 * 64)
    assert record["seed"] == layer_seed(0, NAME)
    assert record["singular_values"] == solution.singular_values.tolist()


def test_bfloat16_weight_equals_its_float32_copy():
    W, H = weight(48, 64).bfloat16(), moment("decaying", 64)
    assert same(solve(W, H), solve(W.float(), H))


EFFECTS = {
    "method": "none",
    "quantizer": Quantizer(IntGrid(3, 16)),
    "rank": 4,
    "split": "fixed:11",
    "form": "split",
    "iterations": 2,
    "descent": 2,
    "rounding_metric": "downdated",
    "seed": 1,
}
FED = SolveOptions("srr", Quantizer(GRID, rounding="gptq"), rank=8, split="criterion", iterations=3)
STARTS = {"seed": replace(OPTIONS, split="criterion"), "rounding_metric": FED}
"""Where an option that acts under few others has its effect: the criterion's N alone is random."""


def test_effects_cover_every_option():
    assert set(EFFECTS) == {f.name for f in fields(SolveOptions)}


@pytest.mark.parametrize("option", EFFECTS)
def test_option_has_an_effect(option):
    W, H = weight(48, 64), moment("decaying", 64)
    base = STARTS.get(option, OPTIONS)
    first, second = solve(W, H, base), solve(W, H, replace(base, **{option: EFFECTS[option]}))
    assert first.result["k"] > 0
    assert not (torch.equal(first.codes, second.codes) and torch.equal(first.R, second.R))


@pytest.mark.parametrize("rule", ["search", "criterion", "energy", "fixed:3"])
def test_split_rule_decides_k(rule):
    W, H = weight(64, 48), moment("decaying", 48)
    result = solve(W, H, replace(OPTIONS, split=rule)).result
    sigma = torch.linalg.svdvals(W.double() @ torch.linalg.cholesky(full(H))).square()
    energy = int(16 * float(sigma[:16].sum() / sigma.sum()))
    expected = {"criterion": result["k_criterion"], "energy": energy, "fixed:3": 3}
    assert result["k"] == expected.get(rule, result["k"])
    if rule != "search":
        assert set(result["candidates"]) == {"0", str(result["k_criterion"]), str(result["k"])}


def test_fixed_k_beyond_the_rank_of_a_small_layer_is_cut():
    result = solve(weight(6, 64), moment("decaying", 64), replace(OPTIONS, split="fixed:16")).result
    assert (result["rank"], result["k"]) == (6, 6)


def test_unknown_split_rule_is_refused():
    with pytest.raises(ValueError, match="'fastest' is not a rule"):
        solve(weight(8, 16), moment("white", 16), replace(OPTIONS, split="fastest"))


@pytest.mark.parametrize("shape", [(128, 96), (96, 128), (1, 128), (256, 32)])
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("rank", [5, 16])
def test_solution_is_bitwise_the_same_again_and_for_any_threads(shape, form, rank):
    W, H, options = weight(*shape), moment("decaying", shape[1]), replace(OPTIONS, form=form, rank=rank)
    first = with_threads(1, lambda: solve(W, H, options))
    assert same(first, with_threads(1, lambda: solve(W, H, options)))
    assert same(first, with_threads(2, lambda: solve(W, H, options)))


def test_solution_ignores_global_random_state_and_earlier_layers():
    W, H = weight(48, 64), moment("decaying", 64)
    first = solve(W, H)
    torch.manual_seed(99)
    solve(weight(32, 64, seed=5), H, name="another.layer")
    assert same(first, solve(W, H))


def test_layer_name_seeds_the_random_numbers():
    W, H = weight(48, 64), moment("decaying", 64)
    first, second = solve(W, H), solve(W, H, name="model.layers.4.mlp.up_proj")
    assert first.result["seed"] != second.result["seed"]
    # Another random start changes last bits only.
    assert second.result["objective"]["k0"] == pytest.approx(first.result["objective"]["k0"], rel=1e-3)


@pytest.mark.parametrize("form", ["joint", "split"])
def test_scale_of_weight_and_moment_scales_the_error(form):
    W, H, options = weight(48, 64), moment("decaying", 64), replace(OPTIONS, form=form)
    base, doubled, heavier = solve(W, H, options), solve(2 * W, H, options), solve(W, 3 * H, options)
    assert torch.equal(base.codes, doubled.codes) and base.result["k"] == doubled.result["k"] == heavier.result["k"]
    for key in ("k0", "criterion", "chosen", "stored"):
        assert doubled.result["objective"][key] == pytest.approx(4 * base.result["objective"][key], rel=1e-3)
        assert heavier.result["objective"][key] == pytest.approx(3 * base.result["objective"][key], rel=1e-3)
    torch.testing.assert_close(doubled.singular_values, 2 * base.singular_values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["decaying", "massive", "diagonal"])
def test_factors_cut_to_fewer_ranks_are_close_to_the_best_of_that_rank(kind):
    W, H = weight(96, 64), moment(kind, 64)
    solution = solve(W, H, replace(OPTIONS, method="qer"))
    Q, energy = quantized(W).double(), objective(W, H)
    assert (solution.singular_values.diff() <= 0).all()
    for rank in (1, 4, 8, 16):
        cut = W.double() - Q - solution.L[:, :rank].double() @ solution.R[:rank].double()
        best = best_objective(W.double() - Q, H, rank)
        assert best * (1 - 1e-6) <= objective(cut, H) <= 1.01 * best + 2e-5 * energy


def test_factors_are_balanced_and_their_energies_are_the_singular_values():
    W, H = weight(96, 64), moment("decaying", 64)
    solution = solve(W, H)
    L, R = solution.L.double(), solution.R.double()
    torch.testing.assert_close(L.norm(dim=0), R.norm(dim=1), rtol=0.02, atol=0)
    lengths = L.norm(dim=0) * ((R @ H) * R).sum(-1).sqrt()
    torch.testing.assert_close(lengths, solution.singular_values.double(), rtol=0.01, atol=1e-6)


def test_refitted_rounding_loses_less_than_plain_rounding():
    W, H = weight(96, 64), moment("massive", 64)
    result = solve(W, H, replace(OPTIONS, method="qer")).result["objective"]
    E = W.double() - quantized(W).double()
    U = torch.linalg.eigh(E @ H @ E.mT)[1].flip(-1)[:, :16]
    L, R = U, U.mT @ E
    lengths = R.norm(dim=1).sqrt()
    L, R = (L * lengths).bfloat16().double(), (R / lengths[:, None]).bfloat16().double()
    plain = objective(E - L @ R, H)
    assert result["chosen"] < result["stored"] < plain


@pytest.mark.parametrize("method", ["srr", "qer"])
def test_dead_input_weighs_all_directions_alike_and_costs_nothing(method):
    W = weight(48, 64)
    dead = solve(W, torch.zeros(64, 64, dtype=torch.float64), replace(OPTIONS, method=method))
    white = solve(W, moment("white", 64), replace(OPTIONS, method=method))
    assert torch.equal(dead.codes, white.codes)
    assert dead.result["energy"] == 0.0 and set(dead.result["objective"].values()) <= {0.0, None}
    improved = (W.double() - stored_weight(dead)).norm()
    assert improved < (W - quantized(W)).double().norm()


@pytest.mark.parametrize("method", ["srr", "qer", "none"])
def test_zero_weight_gives_zero_everything(method):
    solution = solve(torch.zeros(48, 64), moment("decaying", 64), replace(OPTIONS, method=method))
    assert not stored_weight(solution).any()
    assert solution.L.shape[1] == solution.R.shape[0] == solution.result["rank"]
    assert solution.result["objective"]["stored"] == 0.0


@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_deficient_weight_is_preserved_whole(true_rank, form):
    W = (normal(48, true_rank) @ normal(true_rank, 64, seed=1)).float()
    H = moment("decaying", 64)
    solution = solve(W, H, replace(OPTIONS, form=form))
    assert solution.L.shape == (48, 16) and torch.isfinite(solution.L).all() and torch.isfinite(solution.R).all()
    assert solution.result["objective"]["stored"] <= 1e-4 * solution.result["energy"]


@pytest.mark.parametrize("shape", [(8, 64), (64, 16), (1, 32)])
@pytest.mark.parametrize("form", ["joint", "split"])
def test_rank_beyond_the_layer_leaves_rounding_alone(shape, form):
    W, H = weight(*shape), moment("decaying", shape[1])
    solution = solve(W, H, replace(OPTIONS, rank=100, form=form))
    assert solution.L.shape[1] == solution.result["rank"] == min(shape)
    assert solution.result["objective"]["chosen"] <= 1e-6 * solution.result["energy"]
    assert solution.result["objective"]["stored"] <= 1e-4 * solution.result["energy"]


def test_per_channel_groups_solve_any_width():
    grid = IntGrid(4, -1)
    W, H = weight(48, 61), moment("decaying", 61)
    solution = solve(W, H, SolveOptions("srr", Quantizer(grid), 8))
    assert solution.scale.shape == (48, 1)
    exact = objective(W.double() - stored_weight(solution, grid), H)
    assert solution.result["objective"]["stored"] == pytest.approx(exact, rel=1e-3)


def test_width_no_multiple_of_the_group_is_refused():
    with pytest.raises(ConfigError, match="group_size: 40 inputs"):
        solve(weight(8, 40), moment("white", 40))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", ["decaying", "singular", "massive"])
def test_iterations_never_lose_and_keep_the_best(kind, rounding):
    W, H = weight(64, 96), moment(kind, 96)
    base = replace(OPTIONS, quantizer=Quantizer(GRID, rounding=rounding), split="criterion")
    results = [solve(W, H, replace(base, iterations=count)).result for count in range(4)]
    chosen = [result["objective"]["chosen"] for result in results]
    assert chosen == sorted(chosen, reverse=True)
    assert [result["k"] for result in results] == [results[0]["k"]] * 4
    for count, result in enumerate(results):
        assert 0 <= result["iteration"] <= count
        assert (result["iteration"] > 0) == (chosen[count] < chosen[0])
    assert chosen[3] < chosen[0] or rounding == "gptq"  # which may find the best at once


@pytest.mark.parametrize("method", ["srr", "none"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", ["decaying", "singular", "massive"])
def test_descent_goes_on_from_the_best_and_never_loses(kind, rounding, method):
    W, H = weight(64, 96), moment(kind, 96)
    quantizer = Quantizer(IntGrid(3, 16), scales="search", rounding=rounding)
    base = SolveOptions(method, quantizer, 8, split="criterion", iterations=2, rounding_metric="downdated")
    results = [solve(W, H, replace(base, descent=count)).result for count in range(4)]
    chosen = [result["objective"]["chosen"] for result in results]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[3] < 0.99 * chosen[0]
    assert results[3]["iteration"] > (2 if method == "srr" else 0)


def test_diagonal_metric_leaves_nothing_to_descend():
    W, H = weight(48, 64), moment("diagonal", 64)
    still, descended = (solve(W, H, replace(FED, descent=count)) for count in (0, 2))
    assert same(still, descended)


@pytest.mark.parametrize("kind", ["decaying", "wide", "massive"])
def test_rounding_beyond_the_adapter_has_less_error_than_rounding_in_the_whole_metric(kind):
    W, H = weight(96, 128), moment(kind, 128)
    full, beyond = (solve(W, H, replace(FED, rounding_metric=metric)) for metric in ("full", "downdated"))
    assert beyond.result["objective"]["chosen"] < 0.97 * full.result["objective"]["chosen"]
    exact = objective(W.double() - stored_weight(beyond, GRID), H)
    assert beyond.result["objective"]["stored"] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_beyond_the_adapter_is_bitwise_the_same_again_and_for_any_threads(threads):
    W, H = weight(96, 160), moment("decaying", 160)
    quantizer = Quantizer(IntGrid(3, 16), scales="search", rounding="gptq")
    options = replace(FED, quantizer=quantizer, rounding_metric="downdated", descent=2)
    first = with_threads(1, lambda: solve(W, H, options))
    again = with_threads(threads, lambda: solve(W, H, options))
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in ("codes", "scale", "L", "R"))


def test_diagonal_metric_is_never_downdated():
    W, H = weight(48, 64), moment("diagonal", 64)
    full, beyond = (solve(W, H, replace(FED, rounding_metric=metric)) for metric in ("full", "downdated"))
    assert torch.equal(full.codes, beyond.codes) and torch.equal(full.R, beyond.R)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("scales", ["absmax", "search"])
@pytest.mark.parametrize("grid", [IntGrid(3, 16), AsymmetricIntGrid(3, 16)], ids=str)
def test_stored_objective_is_exact_under_every_quantizer(grid, scales, rounding):
    W, H = weight(48, 64), moment("decaying", 64)
    options = replace(OPTIONS, quantizer=Quantizer(grid, scales, rounding), iterations=2, descent=1)
    solution = solve(W, H, options)
    exact = objective(W.double() - stored_weight(solution, grid), H)
    assert solution.result["objective"]["stored"] == pytest.approx(exact, rel=1e-3)
    assert solution.result["damping"] == (0.01 if rounding == "gptq" else 0.0)


@pytest.mark.parametrize("method", ["srr", "qer", "none"])
@pytest.mark.parametrize("rounding_metric", ["full", "downdated"])
def test_layer_with_zero_points_is_bitwise_the_same_for_any_threads(method, rounding_metric):
    W, H = weight(48, 64), moment("decaying", 64)
    quantizer = Quantizer(AsymmetricIntGrid(2, 16), "search", "gptq")
    options = SolveOptions(method, quantizer, 8, iterations=2, rounding_metric=rounding_metric)
    first, second = (with_threads(threads, lambda: solve(W, H, options)) for threads in (1, 2))
    assert same(first, second)


def test_shrinkage_adds_its_share_of_the_mean_to_the_diagonal():
    H = moment("decaying", 32)
    plain, shrunk = Metric.of(H), Metric.of(H, 0.25)
    assert torch.equal(shrunk.H, plain.H + 0.25 * torch.eye(32))
    diagonal = moment("diagonal", 32)
    assert torch.equal(Metric.of(diagonal, 0.25).H, Metric.of(diagonal).H + 0.25)
    assert shrunk.unit == plain.unit
