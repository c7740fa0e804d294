"""What happened in a run, as JSON lines in storage: the log outlives the cluster.

Objects cannot be appended to, so a run writes numbered parts, one every few seconds while there is something to tell:

    events/20250131T235959-1f2e3d4c/00001.jsonl      {"time": <unix>, "event": "started", …} and so on, one per line
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from srr_dist.errors import SrrError, StoreError
from srr_dist.store.records import READ_THREADS, RunArea

EVENTS = "events"
FLUSH_SECONDS = 5.0

logger = logging.getLogger(__name__)


class EventLog:
    """The events of one process, written in the background: storage that is slow or away never holds the run up."""

    def __init__(self, area: RunArea) -> None:
        self._area = area
        self._folder = f"{EVENTS}/{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
        self._lines: list[str] = []
        self._parts = 0
        self._flushed = 0.0
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last event says how it ended; then everything is written."""
        if error is None:
            self.note("finished")
        else:
            code = error.exit_code if isinstance(error, SrrError) else 1
            self.note("ended", code=code, reason=str(error) or type(error).__name__)
        self._write()
        self._writer.shutdown()

    def note(self, event: str, **fields: Any) -> None:
        """Something happened; ``fields`` are JSON values."""
        self._lines.append(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))

    def flush(self, *, now: bool = False) -> None:
        """Write what was noted, if the last time is long enough ago or ``now``."""
        due = now or time.monotonic() - self._flushed >= FLUSH_SECONDS
        if due and self._lines and (self._writing is None or self._writing.done()):
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        self._parts += 1
        self._flushed = time.monotonic()
        path = self._area.path(f"{self._folder}/{self._parts:05d}.jsonl")
        self._writing = self._writer.submit(self._put, path, "".join(f"{line}\n" for line in lines).encode())

    def _put(self, path: str, data: bytes) -> None:
        try:
            self._area.store.put(path, data)
        except StoreError as error:
            logger.warning("events are lost: %s", error)


def read_events(area: RunArea, parts: int = 20) -> list[dict[str, Any]]:
    """The newest events, oldest first: those of the last ``parts`` objects. What is damaged is left out."""
    paths = list(area.store.list(area.path(EVENTS)))[-parts:]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        texts = pool.map(lambda path: area.store.get(path).decode(errors="replace"), paths)
        return [event for text in texts for line in text.splitlines() if (event := _event(line))]


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None
