"""Whom a failure is counted against: together, alone, set aside."""

from __future__ import annotations

import pytest
import torch

from srr_dist.errors import CalibrationError, PipelineError, QuarantineError
from srr_dist.pipeline.failures import ATTEMPTS, ISOLATE_AFTER, Failure, Ledger, UnitError, blame
from srr_dist.store import ObjectStore, RunArea
from srr_dist.store.events import EventLog, read_events
from srr_dist.store.failures import read_failures


class Counter:
    """Stands where Ray's counter is, which needs a cluster."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def inc(self, tags: dict[str, str]) -> None:
        self.kinds.append(tags["kind"])


class Metrics:
    def __init__(self) -> None:
        self.failures = Counter()


@pytest.fixture
def area(tmp_path) -> RunArea:
    return RunArea(ObjectStore(str(tmp_path / "out")), "ab" * 32)


@pytest.fixture
def ledger(area) -> Ledger:
    return Ledger(area, EventLog(area), Metrics())


def lost(*units: str, kind: str = "lost", doing: str = "solving") -> Failure:
    return Failure(kind, doing, units, "the worker died")


def test_units_that_fail_together_are_suspects_and_then_alone(ledger):
    for _ in range(ISOLATE_AFTER - 1):
        ledger.add([lost("00001", "00002")])
        assert ledger.suspects == set()
    ledger.add([lost("00001", "00002")])
    assert ledger.suspects == {"00001", "00002"}
    ledger.committed(["00001"])
    assert ledger.suspects == {"00002"}


def test_unit_that_keeps_failing_is_set_aside_and_named(ledger, area):
    for _ in range(ATTEMPTS):
        assert ledger.quarantined == {}
        ledger.add([lost("00002")])
    assert set(ledger.quarantined) == {"00002"}
    assert ledger.suspects == set()
    assert [(each.attempt, each.quarantined) for each in read_failures(area)] == [
        (count, count == ATTEMPTS) for count in range(1, ATTEMPTS + 1)
    ]
    with pytest.raises(QuarantineError, match=r"unit 00002: the worker died; unit 00003 cannot be reached without"):
        ledger.close(["00002", "00003"])


def test_only_a_unit_that_failed_before_its_solution_is_impassable(ledger):
    for _ in range(ATTEMPTS):
        ledger.add([lost("00001", doing="calibrating"), lost("00002")])
    assert ledger.impassable == {"00001"}


def test_run_whose_units_are_all_done_closes_in_peace(ledger):
    ledger.close([])


@pytest.mark.parametrize("kind", ["storage", "message"])
def test_failures_that_are_nobodys_fault_end_the_run_when_nothing_comes_between(ledger, area, kind):
    for _ in range(ATTEMPTS - 1):
        ledger.add([lost("00001", kind=kind)])
    ledger.committed(["00000"])
    for _ in range(ATTEMPTS - 1):
        ledger.add([lost("00001", kind=kind)])
    with pytest.raises(PipelineError, match=f"failed {ATTEMPTS} times in a row"):
        ledger.add([lost("00001", kind=kind)])
    assert read_failures(area) == []
    assert ledger.quarantined == {}


def test_nodes_that_are_taken_away_count_against_nothing(ledger, area):
    for _ in range(5 * ATTEMPTS):
        ledger.add([lost("00001", kind="preempted")])
    assert (ledger.suspects, ledger.quarantined, read_failures(area)) == (set(), {}, [])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "memory"),
        (RuntimeError("the algorithm failed to converge"), "error"),
    ],
    ids=str,
)
def test_unexpected_error_names_its_unit_and_kind(error, kind):
    with pytest.raises(UnitError) as caught, blame("00007"):
        raise error
    assert (caught.value.unit, caught.value.kind) == ("00007", kind)
    assert type(error).__name__ in caught.value.reason


def test_deliberate_error_passes_as_it_is():
    with pytest.raises(CalibrationError, match="too many"), blame("00007"):
        raise CalibrationError("too many")


def test_events_are_read_in_order_without_what_is_damaged(area):
    with EventLog(area) as log:
        log.note("started", workers=2)
        log.flush(now=True)
        log.note("committed", unit="00000")
    assert [event["event"] for event in read_events(area)] == ["started", "committed", "finished"]
    (part, *_) = area.store.list(area.path("events"))
    area.store.put(part, area.store.get(part) + b"{half\n[1]\n\xff\n")
    assert [event["event"] for event in read_events(area)] == ["started", "committed", "finished"]


def test_events_say_how_a_run_ended(area):
    with pytest.raises(PipelineError), EventLog(area):
        raise PipelineError("no worker")
    (event,) = read_events(area)
    assert (event["event"], event["code"], event["reason"]) == ("ended", 1, "no worker")
