"""What goes wrong in a window, whom it is counted against, and when a unit is set aside.

A worker that is lost takes the blocks it held with it, and one of them may be the reason. They are tried again
together, then each in a window of its own, where only one can be to blame, and a block that still fails is quarantined,
so that the others finish. What is nobody's fault (storage, a lost message, a node that was taken away) counts against
no block.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from srr_dist.errors import PipelineError, QuarantineError, SrrError, StoreError
from srr_dist.pipeline.metrics import Metrics
from srr_dist.store import RunArea
from srr_dist.store.events import EventLog
from srr_dist.store.failures import FailedAttempt, record_failure

log = logging.getLogger(__name__)

ISOLATE_AFTER = 2
"""Failed attempts in company, after which a unit is worked on alone."""
ATTEMPTS = 4
"""Failed attempts after which a unit is quarantined; blameless failures in a row after which a run gives up."""

_ON_THE_WAY = {"reading", "calibrating"}
"""What is done with a unit before sequences have passed it."""

_BLAMELESS = {"preempted", "storage", "message"}
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class UnitError(Exception):
    """Work on a unit raised something that nobody expected. Made on the worker, crosses Ray."""

    def __init__(self, unit: str, kind: str, reason: str) -> None:
        super().__init__(unit, kind, reason)
        self.unit, self.kind, self.reason = unit, kind, reason


@contextmanager
def blame(unit: str) -> Iterator[None]:
    """Turn what is raised unexpectedly into a UnitError of this unit; deliberate errors pass."""
    try:
        yield
    except SrrError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnitError(unit, "memory" if is_out_of_memory(error) else "error", reason) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of a GPU or the host, ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(sign in text for sign in _NO_MEMORY)


@dataclass(frozen=True)
class Failure:
    """Something that went wrong in a window.

    Attributes:
        kind: as in ``FailedAttempt``; or ``preempted``, ``storage``, ``message``, which are nobody's fault.
        doing: ``reading``, ``calibrating``, ``sketching``, ``solving`` or ``committing``.
        units: without a result, and one of them may be to blame.
        reason: in words.
    """

    kind: str
    doing: str
    units: tuple[str, ...]
    reason: str


class Ledger:
    """Counts failed attempts of this process; another one begins with a clean sheet."""

    def __init__(self, area: RunArea, events: EventLog, metrics: Metrics) -> None:
        self._area, self._events, self._metrics = area, events, metrics
        self._failed: Counter[str] = Counter()
        self._blameless = 0
        self.quarantined: dict[str, Failure] = {}

    @property
    def suspects(self) -> set[str]:
        """Units that are to be worked on alone."""
        return {unit for unit, count in self._failed.items() if count >= ISOLATE_AFTER}

    @property
    def impassable(self) -> set[str]:
        """Quarantined units through which not even sequences pass."""
        return {unit for unit, failure in self.quarantined.items() if failure.doing in _ON_THE_WAY}

    def committed(self, units: Collection[str]) -> None:
        """These units have results: nothing is held against them, and the run gets on."""
        for unit in units:
            self._failed.pop(unit, None)
        if units:
            self._blameless = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Count what went wrong in a window.

        Raises:
            PipelineError: too many blameless failures in a row.
        """
        for failure in failures:
            log.warning("%s %s: %s", failure.doing, _names(failure.units), failure.reason)
            self._events.note("failure", **dataclasses.asdict(failure))
            self._metrics.failures.inc(tags={"kind": failure.kind})
            if failure.kind in _BLAMELESS or not failure.units:
                self._bear(failure)
            for unit in failure.units if failure.kind not in _BLAMELESS else ():
                self._count(unit, failure)

    def close(self, missing: Collection[str]) -> None:
        """The run has done what it could: raise QuarantineError if units are left."""
        if missing:
            cut_off = sorted(set(missing) - self.quarantined.keys())
            raise QuarantineError(
                "; ".join(f"unit {unit}: {failure.reason}" for unit, failure in sorted(self.quarantined.items()))
                + (f"; {_names(cut_off)} cannot be reached without" if cut_off else "")
                + f". Each failed {ATTEMPTS} times and is set aside, all others are committed; the same command tries "
                "these again"
            )

    def _bear(self, failure: Failure) -> None:
        self._blameless += failure.kind != "preempted"
        if self._blameless >= ATTEMPTS:
            raise PipelineError(
                f"{failure.doing} {_names(failure.units)}: failed {self._blameless} times in a row, last: "
                f"{failure.reason}; what is committed is kept, the same command goes on from there"
            )

    def _count(self, unit: str, failure: Failure) -> None:
        self._failed[unit] += 1
        count = self._failed[unit]
        given_up = count >= ATTEMPTS
        attempt = FailedAttempt(unit, count, failure.kind, failure.doing, failure.reason, time.time(), given_up)
        try:
            record_failure(self._area, attempt)
        except StoreError as error:
            log.warning("a failed attempt is not recorded: %s", error)
        if given_up:
            del self._failed[unit]
            self.quarantined[unit] = failure
            log.error("unit %s is quarantined after %d failed attempts: %s", unit, count, failure.reason)
            self._events.note("quarantined", unit=unit, attempts=count, why=failure.reason)


def _names(units: Collection[str]) -> str:
    return f"unit{'s' if len(units) > 1 else ''} {', '.join(units)}" if units else "no unit"
