"""The rules for k and the layers' random numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srr_dist.seeds import layer_seed
from srr_dist.solve.lowrank import Subspace, leading_subspace, start_directions, uniform
from srr_dist.solve.metric import Metric
from srr_dist.solve.split import (
    coarse_candidates,
    criterion_split,
    energy_split,
    random_subspace,
    refined_candidates,
)
from tests.solve.problems import moment, singular_values, weight


def subspace(energies, tail):
    rank = len(energies)
    return Subspace(torch.zeros(1, rank), torch.zeros(rank, 1), torch.tensor(energies, dtype=torch.float64), tail, 1)


def test_layer_seed_is_a_stable_literal():
    assert layer_seed(0, "model.layers.0.self_attn.q_proj") == 2988205609425315129
    assert layer_seed(1, "model.layers.0.self_attn.q_proj") == 1343662498540197685


def test_layer_seed_differs_by_name_and_by_seed():
    seeds = {layer_seed(seed, f"layer.{index}") for seed in range(10) for index in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uniform_is_seeded_and_within_one():
    numbers = uniform((100, 50), torch.Generator().manual_seed(3), torch.device("cpu"))
    again = uniform((100, 50), torch.Generator().manual_seed(3), torch.device("cpu"))
    assert torch.equal(numbers, again) and numbers.dtype == torch.float32
    assert -1.0 <= numbers.min().item() < -0.99 and 0.99 < numbers.max().item() <= 1.0
    assert numbers.square().mean().item() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("kind", ["decaying", "diagonal", "massive"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_criterion_equals_the_formula_on_full_spectra(kind, shape):
    (m, n), rank, seed = shape, 12, 5
    W, H = weight(m, n), moment(kind, n)
    metric = Metric.of(H)
    found = leading_subspace(W, metric, rank, start_directions(metric, 28), tolerance=1e-7)
    noise = random_subspace(m, metric, rank, start_directions(metric, 28), seed)

    N = uniform((m, n), torch.Generator().manual_seed(seed), W.device)
    shares = []
    for matrix in (W, N):
        energies = singular_values(matrix, H).square()
        shares.append([float(energies[k:].sum() / energies.sum()) for k in range(rank + 1)])
    products = [shares[0][k] * shares[1][rank - k] for k in range(rank + 1)]
    ours = [found.unexplained(k) * noise.unexplained(rank - k) for k in range(rank + 1)]
    assert ours == pytest.approx(products, rel=2e-3)
    assert criterion_split(found, noise, rank) == products.index(min(products))


def test_criterion_tie_goes_to_the_smaller_k():
    flat = subspace([1.0, 0.0, 0.0, 0.0], 1.0)  # shares 1, ½, ½, ½, ½
    dead = subspace([0.0, 0.0, 0.0, 0.0], 1.0)  # all shares 1
    assert criterion_split(flat, dead, 4) == 1
    assert criterion_split(dead, dead, 4) == 0


def test_criterion_structureless_error_gives_all_ranks_to_the_weight():
    assert criterion_split(subspace([4.0, 2.0, 1.0], 1.0), subspace([0.0, 0.0, 0.0], 1.0), 3) == 3
    assert criterion_split(subspace([0.0, 0.0, 0.0], 1.0), subspace([4.0, 2.0, 1.0], 1.0), 3) == 0


@pytest.mark.parametrize(
    ("energies", "tail", "k"),
    [([6.0, 1.0, 1.0, 0.0], 2.0, 3), ([0.0] * 4, 1.0, 0), ([1.0] * 4, 0.0, 4), ([1.0] * 4, 4.1, 1)],
)
def test_energy_split_floors_the_share_of_the_ranks(energies, tail, k):
    assert energy_split(subspace(energies, tail), 4) == k


@given(rank=st.integers(0, 300))
def test_coarse_candidates_cover_the_range_in_few_steps(rank):
    ks = coarse_candidates(rank)
    assert ks == sorted(set(ks)) and ks[0] == 0 and ks[-1] == rank
    assert len(ks) <= max(17, 10) and len(ks) >= min(rank + 1, 9)


@given(rank=st.integers(0, 300), data=st.data())
def test_refined_candidates_are_new_and_in_range(rank, data):
    best = data.draw(st.sampled_from(coarse_candidates(rank)))
    refined = refined_candidates(best, rank)
    assert all(0 <= k <= rank for k in refined) and len(refined) <= 2
    assert rank < 16 or refined


def test_candidates_at_rank_32_are_literal():
    assert coarse_candidates(32) == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert refined_candidates(8, 32) == [6, 10] and refined_candidates(32, 32) == [30]
    assert refined_candidates(3, 8) == []


def test_unexplained_shares_fall_from_one():
    found = subspace([4.0, 2.0, 1.0], 1.0)
    assert [found.unexplained(k) for k in range(4)] == [1.0, 0.5, 0.25, 0.125]
    assert found.total == 8.0 and found.residual(2) == 2.0
    assert subspace([0.0], 0.0).unexplained(0) == 0.0


def test_random_subspace_depends_on_the_seed_alone():
    metric = Metric.of(moment("decaying", 48))
    first, same, other = (random_subspace(40, metric, 8, start_directions(metric, 24), seed) for seed in (1, 1, 2))
    assert torch.equal(first.energies, same.energies)
    assert not torch.equal(first.energies, other.energies)
