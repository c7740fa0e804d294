"""Windows cover the pending blocks whatever is committed already and wherever boundaries lie."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srr_dist.pipeline.windows import (
    Window,
    all_windows,
    batches,
    even_parts,
    following,
    next_window,
    next_window_at_rest,
    next_window_back,
    reachable,
)

COUNTS = st.integers(1, 40)
STAGES = st.integers(1, 6)
PER_STAGE = st.integers(1, 6)


@st.composite
def resumed_runs(draw) -> tuple[int, set[int], set[int]]:
    """Blocks of a model, those without a result (at least one), boundaries that are stored."""
    count = draw(COUNTS)
    pending = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return count, pending, {0} | draw(st.sets(st.integers(0, count - 1)))


def follow_back(
    count: int, pending: Collection[int], boundaries: Collection[int], gradients: Collection[int], *capacity: int
) -> list[Window]:
    """The windows of a walk back: what the driver does with sketches, boundaries and gradients between two calls."""
    left, stored, behind, windows = set(pending), set(boundaries), set(gradients), []
    uncalibrated = set(range(count))
    while left:
        window = next_window_back(left, uncalibrated, stored, behind, *capacity)
        windows.append(window)
        (left if window.then == "back" else uncalibrated).difference_update(window.collect)
        if window.save is not None:
            (behind if window.then == "back" else stored).add(window.save)
        assert len(windows) <= 3 * count, "the walk does not end"
    return windows


def follow(pending: Collection[int], boundaries: Collection[int], stages: int, per_stage: int) -> list[Window]:
    """The windows of a run: what the driver does with results and boundaries between two calls."""
    left, stored, windows = set(pending), set(boundaries), []
    while left:
        window = next_window(left, stored, stages, per_stage)
        windows.append(window)
        left -= window.collect
        if window.save is not None:
            stored = (stored - {window.start}) | {0, window.save}
        assert len(windows) <= 2 * (max(pending) + 1), "the run does not end"
    return windows


@given(resumed_runs(), STAGES, PER_STAGE)
def test_windows_of_a_resumed_run_solve_every_pending_block_once(run, stages, per_stage):
    _, pending, boundaries = run
    solved = [block for window in follow(pending, boundaries, stages, per_stage) for block in window.collect]
    assert sorted(solved) == sorted(pending)


@given(resumed_runs(), STAGES, PER_STAGE)
def test_window_holds_consecutive_blocks_within_what_the_stages_can_hold(run, stages, per_stage):
    _, pending, boundaries = run
    window = next_window(pending, boundaries, stages, per_stage)
    assert window.blocks == list(range(window.start, window.start + len(window.blocks)))
    assert 1 <= len(window.stages) <= stages
    assert all(1 <= len(stage) <= per_stage for stage in window.stages)
    lengths = [len(stage) for stage in window.stages]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == min(lengths)


@given(resumed_runs(), STAGES, PER_STAGE)
def test_window_starts_at_the_last_boundary_before_the_first_pending_block(run, stages, per_stage):
    _, pending, boundaries = run
    window = next_window(pending, boundaries, stages, per_stage)
    assert window.start in boundaries
    assert not [boundary for boundary in boundaries if window.start < boundary <= min(pending)]
    assert window.collect == pending & set(window.blocks)


@given(resumed_runs(), STAGES, PER_STAGE)
def test_window_saves_a_boundary_exactly_where_later_blocks_are_pending(run, stages, per_stage):
    _, pending, boundaries = run
    window = next_window(pending, boundaries, stages, per_stage)
    after = window.blocks[-1] + 1
    assert window.save == (after if max(pending) >= after else None)


@given(COUNTS, STAGES, PER_STAGE)
def test_windows_of_an_undisturbed_run_pass_every_block_once(count, stages, per_stage):
    windows = all_windows(count, stages, per_stage)
    assert [block for window in windows for block in window.blocks] == list(range(count))
    assert windows == follow(range(count), {0}, stages, per_stage)
    assert len(windows) == -(-count // (stages * per_stage))


@given(resumed_runs(), STAGES, PER_STAGE)
def test_window_that_follows_is_the_next_one_if_all_is_committed(run, stages, per_stage):
    _, pending, boundaries = run
    window = next_window(pending, boundaries, stages, per_stage)
    guess = following(window, pending, stages, per_stage)
    left = set(pending) - window.collect
    if not left:
        assert guess is None
        return
    assert window.save is not None
    assert guess == next_window(left, {0, window.save}, stages, per_stage)


def test_window_that_follows_leaves_out_what_cannot_be_reached():
    window = next_window({3, 4, 5}, {0, 3}, stages=1, blocks_per_stage=1)
    assert following(window, {1, 3, 4, 5}, 1, 1) == Window(4, ((4,),), frozenset({4}), save=5)
    assert following(window, {1, 3}, 1, 1) is None


def test_window_of_a_run_interrupted_far_from_its_boundary_passes_committed_blocks_only():
    window = next_window(pending={7, 9}, boundaries={0, 2}, stages=1, blocks_per_stage=3)
    assert window == Window(start=2, stages=((2, 3, 4),), collect=frozenset(), save=5)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 8))
def test_even_parts_are_the_blocks_in_order(start, length, parts):
    found = even_parts(range(start, start + length), parts)
    assert [block for part in found for block in part] == list(range(start, start + length))
    assert len(found) == min(parts, length)


@given(st.integers(1, 300), STAGES, st.integers(1, 2**28), st.integers(1, 2**27))
def test_batches_partition_the_sequences_within_the_size_of_a_message(sequences, stages, each, most):
    found = batches(sequences, stages, each, most)
    assert [sequence for batch in found for sequence in batch] == list(range(sequences))
    assert all(len(batch) == 1 or len(batch) * each <= most for batch in found)


@given(st.integers(1, 300), STAGES)
def test_batches_are_enough_to_keep_every_stage_busy(sequences, stages):
    assert len(batches(sequences, stages, 1)) >= min(sequences, 4 * stages)


@pytest.mark.parametrize(
    ("sequences", "stages", "each", "expected"),
    [(16, 1, 1, [range(i, i + 4) for i in (0, 4, 8, 12)]), (3, 2, 1, [range(0, 1), range(1, 2), range(2, 3)])],
)
def test_batches_of_a_small_run_are_these(sequences, stages, each, expected):
    assert batches(sequences, stages, each) == expected


@given(resumed_runs(), STAGES, PER_STAGE, st.data())
def test_suspect_has_its_window_to_itself(run, stages, per_stage, data):
    _, pending, boundaries = run
    suspects = data.draw(st.sets(st.sampled_from(sorted(pending))))
    left, stored, solved = set(pending), set(boundaries), set()
    while left:
        window = next_window(left, stored, stages, per_stage, left & suspects)
        assert len(window.collect) <= 1 or not window.collect & suspects
        assert not window.collect & solved
        solved |= window.collect
        left -= window.collect
        if window.save is not None:
            stored = (stored - {window.start}) | {0, window.save}
    assert solved == pending


def test_blocks_behind_one_that_nothing_passes_are_out_of_reach_unless_a_boundary_lies_between():
    assert reachable({1, 2, 3, 5}, {0}, {2}) == {1, 2}
    assert reachable({1, 2, 3, 5}, {0, 4}, {2}) == {1, 2, 5}
    assert reachable({1, 2, 3}, {0}, set()) == {1, 2, 3}


@given(st.sets(st.integers(0, 40), min_size=1), STAGES, PER_STAGE, st.sets(st.integers(0, 40)))
def test_windows_at_rest_hold_each_block_once_and_suspects_alone(ready, stages, per_stage, suspects):
    left, held = set(ready), []
    while left:
        window = next_window_at_rest(left, stages, per_stage, suspects)
        assert window.collect == set(window.blocks) <= left
        assert not window.passes and window.save is None
        assert all(1 <= len(stage) <= per_stage for stage in window.stages)
        assert len(window.blocks) == 1 or suspects.isdisjoint(window.blocks)
        left -= window.collect
        held += window.blocks
    assert sorted(held) == sorted(ready)


@st.composite
def resumed_walks(draw) -> tuple[int, set[int], set[int], set[int]]:
    """Blocks of a model, those without a sketch (at least one), boundaries and gradients that are stored."""
    count, pending, boundaries = draw(resumed_runs())
    return count, pending, boundaries, {count} | draw(st.sets(st.integers(1, count)))


@given(resumed_walks(), STAGES, PER_STAGE)
def test_walk_back_sketches_every_pending_block_once_from_the_end(walk, stages, per_stage):
    back = [window for window in follow_back(*walk, stages, per_stage) if window.then == "back"]
    sketched = [block for window in back for block in sorted(window.collect, reverse=True)]
    assert sketched == sorted(walk[1], reverse=True)


@given(resumed_walks(), STAGES, PER_STAGE)
def test_window_back_lies_between_a_boundary_and_gradients_that_are_there(walk, stages, per_stage):
    _, _, boundaries, gradients = walk
    for window in follow_back(*walk, stages, per_stage):
        assert window.blocks == list(range(window.start, window.start + len(window.blocks)))
        assert max(len(stage) for stage in window.stages) <= per_stage
        assert len(window.stages) <= stages
        assert window.start in boundaries
        if window.then == "back":
            assert window.blocks[-1] + 1 in gradients
            gradients = gradients | {window.save}
        else:
            assert window.save == window.blocks[-1] + 1
            boundaries = boundaries | {window.save}


@given(COUNTS, STAGES, PER_STAGE)
def test_walk_over_a_whole_model_passes_each_block_forward_once_and_back_once(count, stages, per_stage):
    windows = follow_back(count, range(count), {0}, {count}, stages, per_stage)
    forward, back = ([w for w in windows if w.then == then] for then in ("nothing", "back"))
    assert windows == forward + back
    last = back[0].start
    assert [block for window in forward for block in window.blocks] == list(range(last))
    assert sorted(block for window in back for block in window.blocks) == list(range(count))
    assert all(window.collect == set(window.blocks) for window in windows)
    assert back[-1].save is None
    assert len(windows) <= 2 * len(all_windows(count, stages, per_stage)) + 1
