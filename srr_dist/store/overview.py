"""How far a run is and what happened in it, read from storage alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from srr_dist.errors import OutputError
from srr_dist.store.events import read_events
from srr_dist.store.failures import FailedAttempt, read_failures
from srr_dist.store.manifest import COMMIT
from srr_dist.store.objects import ObjectStore
from srr_dist.store.records import REST, RunArea

LAST_EVENTS = 8


@dataclass(frozen=True)
class Overview:
    """The state of the run in an output.

    Attributes:
        model, fingerprint: which run.
        total, done: units of work, and those with a valid record.
        damaged: units that have a record, but none that is valid.
        complete: whether the output is assembled and committed, and nothing is known to be damaged.
        seconds_left: as the driver reckoned last; where it has not yet, the worker seconds that the missing units will
            take at the mean of those done; None before the first.
        last_commit: time of the newest record, ISO 8601, UTC.
        failures: failed attempts at units that have no result, in the order of time.
        events: the newest events, oldest first.
    """

    model: str
    fingerprint: str
    total: int
    done: int
    damaged: list[str]
    complete: bool
    seconds_left: float | None
    last_commit: str | None
    failures: list[FailedAttempt]
    events: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def overview(store: ObjectStore) -> Overview:
    """The state of the run in ``store``; OutputError if there is none."""
    found = RunArea.find(store)
    if not found:
        raise OutputError(f"{store.url}: no run has begun here; expected {store.location('.srr')}")
    area = RunArea(store, found[-1])
    records, units, events = area.records(), area.units(), read_events(area)
    blocks = [record for unit, record in records.items() if unit != REST]
    missing = len(units - records.keys())
    spent = sum(sum(record.seconds.values()) for record in blocks)
    reckoned = _reckoned(events)
    if reckoned is None and blocks:
        reckoned = spent / len(blocks) * missing
    newest = max((record.finished for record in records.values()), default=None)
    return Overview(
        model=str(area.run().get("model")),
        fingerprint=area.fingerprint,
        total=len(units),
        done=len(units) - missing,
        damaged=sorted(area.next_generations().keys() - records.keys()),
        complete=store.exists(COMMIT) and not area.is_condemned() and not missing,
        seconds_left=reckoned,
        last_commit=None if newest is None else iso_time(newest),
        failures=[failure for failure in read_failures(area) if failure.unit not in records],
        events=events[-LAST_EVENTS:],
    )


def iso_time(seconds: float) -> str:
    """Unix time in ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _reckoned(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds left by the last word of a driver that has not ended; None if there is none."""
    if not events or events[-1]["event"] in {"finished", "ended"}:
        return None
    for event in reversed(events):
        if event["event"] == "started":
            return None
        if event["event"] == "progress" and event.get("seconds_left") is not None:
            return max(0.0, float(event["seconds_left"]) - (time.time() - float(event["time"])))
    return None
