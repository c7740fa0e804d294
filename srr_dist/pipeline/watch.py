"""What the driver does while workers work: tells how far it is, hears stop requests, finds workers that hang."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from srr_dist.errors import StoppedError
from srr_dist.pipeline.cluster import POLL_SECONDS, Worker
from srr_dist.pipeline.metrics import Metrics
from srr_dist.pipeline.progress import Progress
from srr_dist.store.events import EventLog

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 15.0
PROBE_SECONDS = 10.0


class StopRequests:
    """Remembers that a stop was asked for, until the driver reaches a point where it can."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether no new work is to be begun."""
        return self._since is not None

    def request(self, number: int, frame: object) -> None:
        """Signal handler; a second signal ends the patience with work under way."""
        self._grace = self._grace if self._since is None else 0.0
        self._since = time.monotonic() if self._since is None else self._since

    def check(self, *, finishing: bool = False) -> None:
        """Raise StoppedError if a stop was asked for; while ``finishing`` only when the grace is over."""
        if self._since is not None and not (finishing and time.monotonic() - self._since < self._grace):
            raise StoppedError("stopped on request; run the same command again to go on")


@contextmanager
def stop_requests(grace: float) -> Iterator[StopRequests]:
    """Turn SIGTERM into a stop request. Entered after ``ray.init``, which installs a handler of its own."""
    stop = StopRequests(grace)
    previous = signal.signal(signal.SIGTERM, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


class Watch:
    """Everything that goes on beside the work itself.

    Args:
        progress, events, metrics: whom to tell.
        stop: raises where a stop was asked for.
        fence: raises where another driver has taken over.
        silence: seconds without a sign of life after which a worker is killed; 0 for never.
    """

    def __init__(
        self,
        progress: Progress,
        events: EventLog,
        metrics: Metrics,
        stop: StopRequests,
        fence: Callable[[], None],
        silence: float,
    ) -> None:
        self.progress, self.events, self.metrics, self.stop = progress, events, metrics, stop
        self.silence, self._fence = silence, fence
        self._asked: dict[Worker, tuple[Any, float]] = {}
        self._told = time.monotonic()

    def tick(self, *, finishing: bool = False) -> None:
        """Tell and hear; raises what ``stop`` and ``fence`` raise."""
        self.progress.tick()
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            share, left = self.progress.share(), self.progress.seconds_left()
            self.events.note("progress", doing=self.progress.note, share=round(share, 4), seconds_left=left)
            self.metrics.share.set(share)
        self.events.flush()
        self.stop.check(finishing=finishing)
        self._fence()

    def wait(
        self, references: Sequence[Any], workers: Sequence[Worker], *, finishing: bool = False
    ) -> tuple[list[Any], list[Any]]:
        """Those that are done and those that are not, a second later at most; silent workers are killed meanwhile."""
        done, left = ray.wait(list(references), num_returns=1, timeout=POLL_SECONDS)
        if self.silence:
            self._kill_silent(workers)
        self.tick(finishing=finishing)
        return done, left

    def committed(self, summary: Mapping[str, Any]) -> None:
        """A worker says that a unit has its result."""
        seconds = sum(summary["seconds"].values())
        self.progress.advance("layers", summary["layers"])
        self.events.note("committed", unit=summary["unit"], seconds=round(seconds, 3), bytes=summary["bytes"])
        self.metrics.units.inc()
        self.metrics.unit_seconds.observe(seconds)
        self.metrics.bytes.inc(summary["bytes"])

    def dead(self, workers: Sequence[Worker]) -> list[Worker]:
        """Workers that do not answer now."""
        asked = [worker.handle.pulse.remote() for worker in workers]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PROBE_SECONDS)
        return [
            worker
            for worker, reference in zip(workers, asked, strict=True)
            if reference not in answered or not _well(reference)
        ]

    def _kill_silent(self, workers: Sequence[Worker]) -> None:
        """Ask each worker for a sign of life, one question at a time; an error is an answer, and seen elsewhere."""
        now = time.monotonic()
        for worker in workers:
            if worker not in self._asked:
                self._asked[worker] = worker.handle.pulse.remote(), now
        for worker, (reference, since) in list(self._asked.items()):
            answered = bool(ray.wait([reference], timeout=0)[0])
            if answered and (now - since > self.silence / 4 or worker not in workers):
                del self._asked[worker]
            elif not answered and now - since > self.silence and worker in workers:
                log.warning("a worker gave no sign of life for %.0f s and is killed", now - since)
                worker.silent = True
                worker.kill()
                del self._asked[worker]


def _well(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayError:
        return False
    return True
