"""The metric beyond an adapter, against its definition in float64."""

import pytest
import torch

from srr_dist.solve import Metric
from tests.solve.problems import moment, normal, objective, weight, with_threads


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
