"""How many blocks a stage may hold, and where their moments lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srr_dist.calibration.sketches import sketch_waiting_bytes
from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.errors import ConfigError
from srr_dist.pipeline.memory import (
    PLACEMENTS,
    PROCESS_BYTES,
    Budget,
    Holding,
    Need,
    Workload,
    block_need,
    choose_holding,
    layers_at_once,
    parameters,
)
from srr_dist.pipeline.solve_memory import Solving

MIB = 2**20
SIZES = st.integers(0, 4000)


def block(index: int, d: int = 64) -> Block:
    """Two layers that share an input, and one wider."""
    name = f"model.layers.{index}"
    q, k, down = f"{name}.q_proj", f"{name}.k_proj", f"{name}.down_proj"
    linears = (Linear(q, d, d, q), Linear(k, d // 2, d, q), Linear(down, d, 2 * d, down))
    return Block(index, name, tuple(f"{linear.name}.weight" for linear in linears), linears, 4 * d * d)


def workload(**changes) -> Workload:
    quantized = frozenset(linear.name for i in range(8) for linear in block(i).linears)
    return replace(Workload(32, 64, 4, "exact", quantized, on_gpu=False), **changes)


def need(
    weights: int = 100, source: int = 0, moments: int = 50, forward: int = 10, solve: int = 20, results: int = 0
) -> Need:
    """Of a block whose moments stay until it is solved."""
    sizes = (weights, source, moments, forward, 0, solve, moments + solve, results, 0)
    return Need(*(size * MIB for size in sizes))


def hold(needs: list[Need], budget: Budget, most: int = 8, **work) -> Holding:
    blocks = [block(i) for i in range(len(needs))]
    return choose_holding(blocks, needs, workload(on_gpu=budget.gpu is not None, **work), budget, most)


def on_cpu(mib: int) -> Budget:
    return Budget(PROCESS_BYTES + mib * MIB, None)


def test_need_counts_one_moment_per_shared_input():
    found = block_need(block(0), 7, workload())
    assert found.weights == 4 * parameters(block(0)) == 4 * (64 * 64 + 32 * 64 + 64 * 128)
    assert found.source == 7
    assert found.moments == 8 * (64 * 64 + 128 * 128)


def test_need_of_a_diagonal_moment_is_a_vector():
    assert block_need(block(0), 0, workload(scaling="diag")).moments == 8 * (64 + 128)


def test_need_counts_only_layers_that_are_quantized():
    found = block_need(block(0), 0, workload(quantized=frozenset({"model.layers.0.q_proj"})))
    assert found.moments == 8 * 64 * 64
    assert found.weights == block_need(block(0), 0, workload()).weights
    nothing = block_need(block(0), 0, workload(quantized=frozenset()))
    assert (nothing.moments, nothing.solve, nothing.results) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"seq_len": 48}, {"forward"}),  # of 32 tokens as many rows wait
        ({"compute_bytes": 8}, {"weights", "forward"}),
        ({"copies": 2}, {"weights"}),
        ({"bits": 4}, {"packing"}),
        ({"rank": 8}, {"results", "packing"}),
        ({"solving": Solving(code_bytes=2)}, {"solve", "solve_beside", "results"}),
        ({"solving": Solving(feedback=True)}, {"solve", "solve_beside"}),
        ({"solving": Solving(tuned=True)}, {"solve", "solve_beside"}),
    ],
)
def test_need_grows_where_the_workload_does(change, grows):
    before, after = vars(block_need(block(0), 5, workload())), vars(block_need(block(0), 5, workload(**change)))
    assert {name for name in before if after[name] != before[name]} == grows
    assert all(after[name] > before[name] for name in grows)


@given(st.lists(st.builds(need, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES), min_size=1, max_size=8), st.integers(1, 8))
def test_peak_grows_with_the_blocks_held(needs, most):
    plenty = Budget(10**12, 10**12)
    for budget in (plenty, Budget(10**12, None)):
        peaks = [hold(needs, budget, count) for count in range(1, most + 1)]
        assert [peak.blocks for peak in peaks] == [min(count, len(needs)) for count in range(1, most + 1)]
        for small, large in pairwise(peaks):
            assert small.host_bytes <= large.host_bytes
            assert small.gpu_bytes <= large.gpu_bytes


@given(
    st.lists(st.builds(need, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(0, 20000),
    st.one_of(st.none(), st.integers(0, 20000)),
)
def test_holding_keeps_to_the_budget_and_no_other_is_faster(needs, most, host, gpu):
    budget = Budget(PROCESS_BYTES + host * MIB, None if gpu is None else gpu * MIB)
    try:
        found = hold(needs, budget, most)
    except ConfigError:
        return
    assert found.host_bytes <= budget.host
    assert found.gpu_bytes <= (budget.gpu or 0)
    assert 1 <= found.blocks <= most
    assert found.placement in (PLACEMENTS if gpu is not None else PLACEMENTS[1:])
    richer = hold(needs, Budget(budget.host + 100 * MIB, budget.gpu and budget.gpu + 100 * MIB), most)
    assert (PLACEMENTS.index(richer.placement), -richer.blocks) <= (PLACEMENTS.index(found.placement), -found.blocks)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (4 * 150 + 20, (4, "host")),
        (4 * 150 + 19, (3, "host")),
        (1 * 150 + 20, (1, "host")),
        (1 * 150 + 19, (1, "disk")),
        (1 * 100 + 20, (1, "disk")),
    ],
)
def test_cpu_holds_fewer_blocks_before_moments_go_to_disk(free, expected):
    found = hold([need()] * 4, on_cpu(free))
    assert (found.blocks, found.placement) == expected


@pytest.mark.parametrize(
    ("host", "gpu", "expected"),
    [
        (0, 4 * 150 + 10, (4, "device")),  # the passes' weights are gone when layers are solved
        (0, 4 * 150 + 9, (3, "device")),
        (1000, 1 * 150 + 10, (1, "device")),
        (1000, 1 * 150 + 9, (1, "host")),
        (49, 1 * 150 + 9, (1, "disk")),
        (100, 2 * 100 + 10, (1, "device")),
    ],
)
def test_gpu_moves_moments_to_the_host_and_then_to_disk(host, gpu, expected):
    found = hold([need()] * 4, Budget(PROCESS_BYTES + host * MIB, gpu * MIB))
    assert (found.blocks, found.placement) == expected


def test_peak_is_that_of_passing_or_of_solving_and_not_of_both():
    passing, solving = need(source=30, forward=60, solve=20, results=10), need(source=30, forward=5, solve=200)
    assert hold([passing], on_cpu(10**6)).host_bytes == PROCESS_BYTES + (30 + 100 + 50 + 60) * MIB
    assert hold([solving], on_cpu(10**6)).host_bytes == PROCESS_BYTES + (30 + 50 + 200) * MIB
    same = need(solve=200, results=10)  # the passes' weights are the solver's
    assert hold([same], on_cpu(10**6)).host_bytes == PROCESS_BYTES + (100 + 50 + 200 + 10) * MIB


def test_holding_is_sized_by_the_largest_blocks():
    needs = [need(), need(weights=500), need()]
    assert hold(needs, on_cpu(500 + 50 + 20)).blocks == 1
    assert hold(needs, on_cpu(600 + 100 + 20)).blocks == 2


@pytest.mark.parametrize(
    ("budget", "option"),
    [
        (on_cpu(119), "host_memory"),
        (Budget(PROCESS_BYTES, 110 * MIB), "gpu_memory"),
        (Budget(9, 10**12), "host_memory"),
    ],
)
def test_block_that_does_not_fit_is_named_with_the_option_and_both_sizes(budget, option):
    with pytest.raises(ConfigError) as caught:
        hold([need(), need(weights=101)], Budget(budget.host, budget.gpu))
    message = str(caught.value)
    assert message.startswith(f"{option}: ")
    assert "model.layers.1" in message
    assert message.count("GiB") == 2
    assert "\n" not in message


def test_small_layers_are_solved_side_by_side_and_need_so_much_more():
    quantized = workload().quantized
    assert layers_at_once(block(0), quantized, 1, on_gpu=False) == 1
    assert layers_at_once(block(0), quantized, 8, on_gpu=False) == 2  # inputs
    assert layers_at_once(block(0), quantized, 8, on_gpu=True) == 1
    assert layers_at_once(block(0, d=4096), quantized, 8, on_gpu=False) == 1
    assert block_need(block(0), 0, workload(threads=2)).solve == 2 * block_need(block(0), 0, workload()).solve


def test_every_block_held_keeps_its_part_of_the_way_back():
    little, more = (hold([replace(need(), passing=size * MIB)] * 2, on_cpu(10**4)) for size in (1000, 1007))
    assert more.host_bytes - little.host_bytes == 2 * 7 * MIB


def test_no_rows_wait_where_sequences_are_long():
    assert block_need(block(0), 0, workload(seq_len=511)).passing > 0
    assert block_need(block(0), 0, workload(seq_len=512)).passing == 0


def test_host_has_room_for_the_sketch_that_a_gpu_solves_with():
    plain, gated = (
        block_need(block(0), 0, workload(on_gpu=True, sketch="B", held_out=3, solving=Solving(gated=gated)))
        for gated in (False, True)
    )
    assert (plain.recalled, gated.recalled) == (0, 8 * (2 * 64 * 64 + 128 * 128))
    budget = Budget(PROCESS_BYTES + 10**4 * MIB, 10**4 * MIB)
    little, more = (hold([replace(need(), recalled=size * MIB)] * 2, budget) for size in (0, 7))
    assert more.host_bytes - little.host_bytes == 7 * MIB


def test_weighing_has_room_for_weights_errors_and_what_is_kept_of_gradients():
    kept = 3 * 2 * 32 * (64 + 128)
    plain, weighed = (
        block_need(block(0), 0, workload(sketch="B", scaling="diag", held_out=3, weighed=w)) for w in (False, True)
    )
    assert weighed.solve == weighed.solve_beside == 24 * 64 * 128 + kept > plain.solve_beside
    on_gpu = block_need(block(0), 0, workload(sketch="B", scaling="diag", held_out=3, weighed=True, on_gpu=True))
    assert (on_gpu.solve, on_gpu.recalled) == (24 * 64 * 128, kept)
    solved = [block_need(block(0), 0, workload(sketch="B", held_out=300, weighed=w)).solve for w in (False, True)]
    assert solved[0] < solved[1] == 24 * 64 * 128 + 100 * kept


def test_where_gradients_begin_there_is_room_for_the_logits_of_as_many_tokens_as_are_taken_at_once():
    def of(vocabulary: int) -> int:
        return block_need(block(0), 0, workload(sketch="B", held_out=3, vocabulary=vocabulary)).forward

    small, large, larger = (of(vocabulary) for vocabulary in (10**5, 2 * 10**5, 10**8))
    assert large - small == 24 * 32 * 10**5  # all 32 tokens of a sequence
    assert larger - large == 24 * (10**8 - 32 * 2 * 10**5)  # one token


def test_stage_needs_room_for_moments_or_for_sketches_whichever_is_more():
    shapes = [(64, 64), (32, 64), (64, 128)]
    plain, sketched = (block_need(block(0), 0, workload(sketch=kind, held_out=3)) for kind in ("", "B"))
    assert sketched.moments == sum(8 * (2 * m * m + n * n) for m, n in shapes) > plain.moments
    assert sketched.source == 3 * 2 * sum(min(m * n, 32 * (m + n)) for m, n in shapes)
    assert plain.forward < sketched.forward
    assert plain.passing == sum(4 * 2 * 480 * width for width in (64, 128))
    assert sketched.passing == 2 * plain.forward + sum(sketch_waiting_bytes("B", 32, m, n) for m, n in shapes)
    assert block_need(block(0), 10**9, workload(sketch="B", held_out=3)).source == 10**9
    banded = block_need(block(0), 0, workload(sketch="B", held_out=3, solving=Solving(band=16)))
    assert banded.moments == sum(8 * (2 * m * 16 + n * n) for m, n in shapes)
    assert block_need(block(0), 0, workload(sketch="diag")).moments == plain.moments
    assert block_need(block(0), 0, workload(sketch="A:1")).moments > sketched.moments
