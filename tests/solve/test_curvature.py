"""Held-out estimates against what they stand for, in float64."""

import math

import pytest
import torch

from srr_dist.solve import Metric
from srr_dist.solve.curvature import DOUBT, ONE_SIDED, TWO_SIDED, gate, kronecker_cosine
from tests.solve.problems import full, moment, normal, second_order, with_threads


def gradients(count, m=12, n=16):
    return [normal(m, n, seed=s).float() for s in range(count)]


def drawn(count, C_O, C_I):
    """Gradients ``C_O N C_Iᵀ`` of N standard normal, whose moment is ``C_O C_Oᵀ ⊗ C_I C_Iᵀ``."""
    return [(C_O @ normal(len(C_O), len(C_I), seed=s) @ C_I.mT).float() for s in range(count)]


def test_estimates_are_the_mean_squares_along_the_gradients_that_are_finite():
    errors = {side: normal(12, 16, seed=seed).float() for side, seed in ((ONE_SIDED, 98), (TWO_SIDED, 99))}
    metric = Metric.of(moment("decaying", 16)).beside(Metric.of(moment("decaying", 12)))
    found = gate(errors, metric, [*gradients(5), torch.full((12, 16), torch.nan)])["second_order"]
    for side, delta in errors.items():
        expected = sum(float((delta.double() * G.double()).sum()) ** 2 for G in gradients(5)) / 5
        assert found[side] == pytest.approx(expected, rel=1e-5)
    assert gate({side: torch.zeros(12, 16) for side in errors}, metric, gradients(5))["second_order"][ONE_SIDED] == 0.0
    assert gate(errors, metric, [])["second_order"] == {ONE_SIDED: None, TWO_SIDED: None}


def judged(one, two):
    """The gate's choice between errors of one weight, by gradients under which they have these slopes."""
    errors = {ONE_SIDED: torch.tensor([[1.0, 0.0]]), TWO_SIDED: torch.tensor([[0.0, 1.0]])}
    gradients = [torch.tensor([[a, b]]) for a, b in zip(one, two, strict=True)]
    return gate(errors, Metric.of(torch.ones(2)), gradients)


@pytest.mark.parametrize(
    ("one", "two", "chosen"),
    [
        ([2.0, 3.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], TWO_SIDED),
        ([1.0, 1.0, 1.0, 1.0], [2.0, 3.0, 2.0, 3.0], ONE_SIDED),
        ([1.5, 1.5, 1.5, 1.0], [1.0, 1.0, 1.0, 9.0], TWO_SIDED),  # one sequence says so, and it alone
        ([1.0], [2.0], ONE_SIDED),
        ([2.0], [1.0], TWO_SIDED),
        ([1.0, math.nan, 1.0], [2.0, 1.0, 2.0], ONE_SIDED),
        ([math.nan], [1.0], ONE_SIDED),
    ],
)
def test_gate_takes_the_one_sided_solution_where_sequences_agree_that_it_is_better(one, two, chosen):
    assert judged(one, two)["chosen"] == chosen


def test_standard_error_is_that_of_the_difference_between_estimates():
    one, two = [1.0, 2.0, 0.5, 1.5], [2.0, 2.5, 1.5, 0.5]
    choice = judged(one, two)
    differences = torch.tensor(two, dtype=torch.float64).square() - torch.tensor(one, dtype=torch.float64).square()
    assert choice["standard_error"] == pytest.approx(float(differences.std()) / 2.0)
    estimates = choice["second_order"]
    assert estimates[TWO_SIDED] - estimates[ONE_SIDED] == pytest.approx(float(differences.mean()))
    doubtful = estimates[TWO_SIDED] - estimates[ONE_SIDED] <= DOUBT * choice["standard_error"]
    assert (choice["chosen"] == TWO_SIDED) == doubtful


@pytest.mark.parametrize("inputs", ["decaying", "diagonal"])
@pytest.mark.parametrize("outputs", ["decaying", "diagonal", "banded", None])
def test_cosine_is_that_of_the_matrices_it_stands_for(inputs, outputs):
    metric, seen = Metric.of(moment(inputs, 16)), gradients(6)
    if outputs:
        metric = metric.beside(Metric.of(moment(outputs, 12, seed=3)))
    H_O = full(metric.outputs.H.double()) if outputs else torch.eye(12, dtype=torch.float64)
    product = torch.kron(H_O, full(metric.H.double()))
    vectors = torch.stack([G.double().flatten() for G in seen])
    pairs = (vectors @ vectors.mT).square()
    length = ((pairs.sum() - pairs.trace()) / 30).sqrt()
    expected = (vectors @ product * vectors).sum() / 6 / (product.norm() * length)
    assert kronecker_cosine(metric, seen) == pytest.approx(float(expected), rel=1e-5)


def test_cosine_is_one_for_the_moments_that_gradients_were_drawn_from_and_less_for_others():
    H_O, H_I = moment("decaying", 12, seed=3), moment("decaying", 16)
    seen = drawn(400, torch.linalg.cholesky(H_O), torch.linalg.cholesky(H_I))
    right = Metric.of(H_I).beside(Metric.of(H_O))
    wrong = Metric.of(moment("decaying", 16, seed=8)).beside(Metric.of(moment("decaying", 12, seed=9)))
    assert kronecker_cosine(right, seen) == pytest.approx(1.0, abs=0.1)
    assert kronecker_cosine(wrong, seen) < kronecker_cosine(right.inputs, seen) < 0.9 * kronecker_cosine(right, seen)


def test_estimate_of_drawn_gradients_is_the_objective():
    """``E ⟨Δ, G⟩² = tr(H_O Δ H_I Δᵀ)`` where F is what it is taken for."""
    H_O, H_I = moment("decaying", 12, seed=3), moment("decaying", 16)
    seen, delta = drawn(4000, torch.linalg.cholesky(H_O), torch.linalg.cholesky(H_I)), normal(12, 16, seed=99).float()
    expected = float(torch.trace(H_O @ delta.double() @ H_I @ delta.double().mT))
    assert second_order(delta, seen) == pytest.approx(expected, rel=0.1)


def test_estimates_are_bitwise_the_same_again_and_for_any_threads():
    delta, seen = normal(96, 160, seed=99).float(), gradients(3, 96, 160)
    metric = Metric.of(moment("decaying", 160)).beside(Metric.of(moment("decaying", 96)))
    errors = {ONE_SIDED: delta, TWO_SIDED: delta / 2}
    first = with_threads(1, lambda: gate(errors, metric, seen))
    for threads in (1, 2):
        assert first == with_threads(threads, lambda: gate(errors, metric, seen))
