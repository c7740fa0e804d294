"""Failed attempts at units, kept in storage: who looks for a block's trouble finds it after the cluster is gone.

failures/00003/<uuid>.json      one object per failed attempt; nothing depends on them
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from srr_dist.store.documents import encode, parse
from srr_dist.store.records import READ_THREADS, RunArea

FAILURES = "failures"


@dataclass(frozen=True)
class FailedAttempt:
    """One attempt at a unit that came to nothing.

    Attributes:
        unit: which.
        attempt: how many of one run it is, from 1.
        kind: ``lost`` (the worker died), ``silent`` (it gave no sign of life), ``memory`` or ``error``.
        doing: ``reading``, ``calibrating``, ``sketching``, ``solving`` or ``committing``.
        error: the reason in words.
        time: unix time.
        quarantined: whether the unit was set aside after it.
    """

    unit: str
    attempt: int
    kind: str
    doing: str
    error: str
    time: float
    quarantined: bool


def record_failure(area: RunArea, failure: FailedAttempt) -> None:
    """Keep a failed attempt; StoreError if it cannot be written."""
    name = area.path(f"{FAILURES}/{failure.unit}/{uuid.uuid4().hex}.json")
    area.store.put(name, encode(failure, "failed attempt"))


def read_failures(area: RunArea) -> list[FailedAttempt]:
    """Every failed attempt, in the order of time; StoreError if one is damaged."""
    paths = area.store.list(area.path(FAILURES))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = pool.map(lambda path: parse(FailedAttempt, area.store.get(path), area.store.location(path)), paths)
        return sorted(found, key=lambda failure: failure.time)
