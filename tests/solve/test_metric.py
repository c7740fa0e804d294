"""The metric beyond an adapter, against its definition in float64."""

import pytest
import torch

from srr_dist.solve import Metric
from tests.solve.problems import MOMENTS, full, moment, normal, objective, sides, two_sided, weight, with_threads


def least(E, R, H):
    """``min_X tr((E − X R) H (E − X R)ᵀ)`` in float64."""
    H, R, E = H.double(), R.double(), E.double()
    X = E @ H @ R.mT @ torch.linalg.pinv(R @ H @ R.mT, hermitian=True)
    return objective(E - X @ R, H)


@pytest.mark.parametrize("kind", ["white", "decaying", "singular", "wide"])
@pytest.mark.parametrize("rank", [1, 8])
def test_error_beyond_an_adapter_is_what_the_best_one_with_its_rows_leaves(kind, rank):
    H, R, E = moment(kind, 64), normal(rank, 64).float(), weight(24, 64)
    metric = Metric.of(H)
    beyond = metric.beyond(R)
    assert beyond.unit * beyond.energy(E) == pytest.approx(least(E, R, H), rel=2e-3)


@pytest.mark.parametrize("kind", ["decaying", "massive"])
def test_what_the_adapter_can_make_up_for_counts_nothing(kind):
    metric, R = Metric.of(moment(kind, 64)), normal(8, 64).float()
    beyond = metric.beyond(R)
    made_up_for = normal(24, 8, seed=1).float() @ R
    assert beyond.unit * beyond.energy(made_up_for) < 1e-5 * metric.unit * metric.energy(made_up_for)
    assert beyond.unit < metric.unit
    assert float(beyond.weights.mean()) == pytest.approx(1.0)
    assert float(beyond.weights.min()) >= 0.0


def test_rows_that_say_nothing_new_take_nothing_more_away():
    metric, R = Metric.of(moment("decaying", 64)), normal(8, 64).float()
    once, twice = metric.beyond(R), metric.beyond(torch.cat((R, R[:3])))
    torch.testing.assert_close(once.unit * once.H, twice.unit * twice.H, rtol=1e-4, atol=1e-6)


def test_nothing_is_taken_away_for_rows_of_zeros():
    metric = Metric.of(moment("decaying", 64))
    assert torch.equal(metric.beyond(torch.zeros(2, 64)).H, metric.H)


def test_metric_beyond_an_adapter_is_bitwise_the_same_again_and_for_any_threads():
    metric, R = Metric.of(moment("massive", 160)), normal(16, 160).float()
    first = with_threads(1, lambda: metric.beyond(R))
    for threads in (1, 2):
        again = with_threads(threads, lambda: metric.beyond(R))
        assert torch.equal(first.H, again.H) and first.unit == again.unit


OUTPUTS = (*MOMENTS, "banded")


def having(kind, m=48, n=64):
    """A metric with an output side, and both moments as it weighs them."""
    metric = two_sided((m, n), kind)
    return metric, *sides(metric)


def weighed(E, H_O, H_I):
    """``tr(H_O E H_I Eᵀ)`` by its definition."""
    return float(torch.trace(H_O @ E.double() @ H_I @ E.double().mT))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_energy_with_an_output_side_is_the_trace_with_both_moments(kind):
    E, (metric, H_O, H_I) = weight(48, 64), having(kind)
    assert metric.unit * metric.energy(E) == pytest.approx(weighed(E, H_O, H_I), rel=1e-5)
    assert metric.unit * metric.inputs.energy(metric.whitened(E)) == pytest.approx(weighed(E, H_O, H_I), rel=1e-5)
    assert metric.separate == (kind == "diagonal") and metric.inputs.separate
    assert metric.outputs.damping == 0.01


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("left", [1.0, 1e-4])
def test_remainder_with_an_output_side_is_the_energy_of_the_difference(kind, left):
    metric, H_O, H_I = having(kind)
    L, R = normal(48, 6).float(), normal(6, 64, seed=1).float()
    E = L @ R + left * weight(48, 64)
    expected, total = (weighed(X, H_O, H_I) for X in (E.double() - L.double() @ R.double(), E))
    found = metric.unit * metric.remainder(E, metric.energy(E), L, R)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9 * total)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_unwhitened_factors_are_the_same_approximation_of_the_rows_themselves(kind):
    metric, _, _ = having(kind)
    U, R = torch.linalg.qr(normal(48, 6))[0].float(), normal(6, 64, seed=1).float()
    L, scaled = metric.unwhitened(U, R)
    torch.testing.assert_close(L.norm(dim=0), torch.ones(6), rtol=1e-5, atol=0)
    torch.testing.assert_close(metric.whitened(L @ scaled), U @ R, rtol=1e-4, atol=1e-4)
    alone = metric.inputs.unwhitened(U, R)
    assert alone[0] is U and alone[1] is R and metric.inputs.whitened(U) is U


@pytest.mark.parametrize("kind", ["decaying", "diagonal", "wide", "banded"])
def test_error_beyond_an_adapter_keeps_the_output_side(kind):
    """The best columns for given rows, by least squares over all entries in the metric of both sides."""
    (metric, H_O, H_I), E, R = having(kind, 12, 24), weight(12, 24), normal(3, 24).float()
    C_O, C_I = torch.linalg.cholesky(H_O), torch.linalg.cholesky(H_I)
    columns = torch.kron(C_O.mT.contiguous(), (R.double() @ C_I).mT.contiguous())
    wanted = (C_O.mT @ E.double() @ C_I).flatten()
    least = (columns @ torch.linalg.lstsq(columns, wanted.unsqueeze(1)).solution.squeeze(1) - wanted).square().sum()
    beyond = metric.beyond(R)
    assert beyond.unit * beyond.energy(E) == pytest.approx(float(least), rel=1e-4)


@pytest.mark.parametrize("outputs", ["decaying", "banded"])
@pytest.mark.parametrize("shape", [(96, 160), (304, 208), (200, 7)])
def test_whitened_rows_are_bitwise_the_same_again_and_for_any_threads(shape, outputs):
    m, n = shape
    E, U = weight(m, n), torch.linalg.qr(normal(m, 5))[0].float()

    def found():
        metric = Metric.of(moment("decaying", n)).beside(Metric.of(moment(outputs, m)))
        return metric.whitened(E), metric.whitened(U), *metric.unwhitened(U, E[:5]), torch.tensor(metric.energy(E))

    first = with_threads(1, found)
    for threads in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, with_threads(threads, found), strict=True))


def test_outputs_that_reach_nothing_count_alike_and_cost_nothing():
    metric = Metric.of(moment("decaying", 64)).beside(Metric.of(torch.zeros(48, 48)))
    assert metric.unit == 0.0 and metric.separate
    assert metric.energy(weight(48, 64)) == pytest.approx(1.01 * metric.inputs.energy(weight(48, 64)), rel=1e-5)


@pytest.mark.parametrize("kind", ["decaying", "wide", "massive", "diagonal", "banded"])
def test_slopes_in_both_moments_are_those_of_float64(kind):
    metric, H_O, H_I = having(kind)
    E = weight(48, 64)
    expected = H_O @ E.double() @ H_I / metric.unit
    torch.testing.assert_close(metric.both(E).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(metric.inputs.both(E), metric.right(E))


def test_damped_moment_is_the_one_that_feedback_factors():
    metric = Metric.of(moment("singular", 64))
    U, D = metric.feedback.U.double(), metric.feedback.D.double()
    order = metric.feedback.order
    torch.testing.assert_close(metric.damped[order][:, order].double(), U * D @ U.mT, rtol=1e-4, atol=1e-5)
    assert float((metric.damped - metric.H).diagonal().mean()) == pytest.approx(metric.damping, rel=1e-4)


def test_bands_are_measured_in_the_units_of_the_whole():
    H = moment("banded", 48)
    metric = Metric.of(H, 0.1)
    assert torch.equal(metric.weights, torch.cat([band.weights for band in metric.bands]))
    assert float(metric.weights.mean()) == pytest.approx(1.1, rel=1e-6)
    assert metric.weights[24:].mean() > 2.0 * metric.weights[:24].mean()
    assert {band.unit for band in metric.bands} == {metric.unit}
    alone = Metric.of(H[0])
    assert alone.bands == (alone,)


def test_what_an_adapter_makes_up_for_is_taken_from_each_band():
    H, rows = moment("banded", 48), normal(3, 48).float()
    found, whole = Metric.of(H).beyond(rows), Metric.of(full(H)).beyond(rows)
    for band, part in zip(found.H, (slice(0, 24), slice(24, 48)), strict=True):
        torch.testing.assert_close(band * found.unit, whole.H[part, part] * whole.unit, rtol=1e-4, atol=1e-5)
