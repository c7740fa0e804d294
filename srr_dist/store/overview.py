"""How far a run is, read from its records alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from srr_dist.errors import OutputError
from srr_dist.store.manifest import COMMIT
from srr_dist.store.objects import ObjectStore
from srr_dist.store.records import REST, RunArea


@dataclass(frozen=True)
class Overview:
    """The state of the run in an output.

    Attributes:
        model, fingerprint: which run.
        total, done: units of work, and those with a valid record.
        damaged: units that have a record, but none that is valid.
        complete: whether the output is assembled and committed, and nothing is known to be damaged.
        seconds_left: worker seconds that the missing units will take at the mean of those done; None before the first.
        last_commit: time of the newest record, ISO 8601, UTC.
    """

    model: str
    fingerprint: str
    total: int
    done: int
    damaged: list[str]
    complete: bool
    seconds_left: float | None
    last_commit: str | None

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def overview(store: ObjectStore) -> Overview:
    """The state of the run in ``store``; OutputError if there is none."""
    found = RunArea.find(store)
    if not found:
        raise OutputError(f"{store.url}: no run has begun here; expected {store.location('.srr')}")
    area = RunArea(store, found[-1])
    records, units = area.records(), area.units()
    blocks = [record for unit, record in records.items() if unit != REST]
    missing = len(units - records.keys())
    spent = sum(sum(record.seconds.values()) for record in blocks)
    newest = max((record.finished for record in records.values()), default=None)
    return Overview(
        model=str(area.run().get("model")),
        fingerprint=area.fingerprint,
        total=len(units),
        done=len(units) - missing,
        damaged=sorted(area.next_generations().keys() - records.keys()),
        complete=store.exists(COMMIT) and not area.is_condemned() and not missing,
        seconds_left=spent / len(blocks) * missing if blocks else None,
        last_commit=None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
    )
