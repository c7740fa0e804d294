"""What a person is told of a run's progress."""

from __future__ import annotations

import logging

import pytest

from srr_dist.pipeline import progress as module
from srr_dist.pipeline.progress import Progress, clock


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hands = Clock()
    monkeypatch.setattr(module, "time", hands)
    return hands


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (187, "3m07s"), (3600, "1h00m"), (3725, "1h02m")]
)
def test_clock_reads_as_people_write_durations(seconds, text):
    assert clock(seconds) == text


def test_time_left_is_unknown_until_every_kind_of_work_was_seen(time):
    progress = Progress("quantize", passes=10, layers=4)
    time.now += 10
    progress.advance("passes", 5)
    assert progress.seconds_left() is None
    assert "estimating" in progress.line()


def test_time_left_extrapolates_each_kind_at_its_own_speed(time):
    progress = Progress("quantize", passes=10, layers=4)
    time.now += 10
    progress.advance("passes", 5)
    time.now += 6
    progress.advance("layers", 1)
    assert progress.seconds_left() == pytest.approx(5 * 2 + 3 * 6)
    assert progress.share() == pytest.approx(16 / (16 + 28))
    assert "28s left" in progress.line()


def test_time_before_a_phase_counts_for_no_kind_of_work(time):
    progress = Progress("quantize", passes=2, layers=0)
    time.now += 100
    progress.begin("calibrating")
    time.now += 3
    progress.advance("passes", 1)
    assert progress.seconds == {"passes": 3.0, "layers": 0.0}


def test_share_grows_from_nothing_to_all(time):
    progress = Progress("quantize", passes=8, layers=8)
    shares = [progress.share()]
    for kind in ("passes", "layers"):
        for _ in range(8):
            time.now += 1
            progress.advance(kind, 1)
            shares.append(progress.share())
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_share_of_a_run_without_work_is_a_number():
    assert 0.0 <= Progress("quantize", passes=0, layers=0).share() <= 1.0


def test_lines_in_a_log_come_seconds_apart(time, caplog):
    caplog.set_level(logging.INFO, logger="srr_dist")
    progress = Progress("quantize", passes=100, layers=0)
    for _ in range(100):
        time.now += 0.25
        progress.advance("passes", 1)
    lines = [record.getMessage() for record in caplog.records]
    assert 25 / module.LINE_SECONDS - 1 <= len(lines) <= 25 / module.LINE_SECONDS + 1
    assert all(line.startswith("quantize") for line in lines)
