"""A lease on a run: a second driver on the same output waits or leaves, instead of paying for the same work again.

    <output>/.srr/<fingerprint>/lease.json      {"epoch", "holder", "nonce", "place", "since", "ttl"}

It is taken and renewed by compare-and-swap. It saves money and nothing else: results stay right if two drivers work at
once, because records are create-only. So no clocks are compared: who wants a lease watches it, by his own clock, and
takes it if nobody renewed it for its whole time to live.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from srr_dist.errors import LeaseError, StoreError
from srr_dist.store.documents import encode, parse
from srr_dist.store.records import RunArea

TTL_SECONDS = 60.0
LONGEST_TTL_SECONDS = 3600.0
RENEWALS = 4
"""Times that a lease is renewed within its time to live."""

LOOK_SECONDS = 1.0
"""How often at least one who waits looks at the lease."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseDocument:
    """What lease.json says.

    ``epoch`` counts holders from 1. ``holder`` is for people: host and process; "" once given back. ``nonce`` differs
    from write to write. ``place``: the boot and process namespace within which the holder's process id means something,
    then that id. ``since``: unix time at which it was taken. ``ttl``: seconds without a change after which it is free.
    """

    epoch: int
    holder: str
    nonce: str
    place: str
    since: float
    ttl: float

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise StoreError(f"epoch {self.epoch}: expected 1 or more")
        if not 0 < self.ttl <= LONGEST_TTL_SECONDS:
            raise StoreError(f"ttl {self.ttl}: expected more than 0 and at most {LONGEST_TTL_SECONDS} seconds")
        if not 0 <= self.since < 2**33:
            raise StoreError(f"since {self.since}: expected a unix time")
        if not self.holder.isprintable() or len(self.holder) > 200:
            raise StoreError(f"holder {self.holder[:200]!r}: expected at most 200 printable characters")

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return encode(self, "lease")

    def describe(self) -> str:
        """Holder and time, for messages."""
        return f"{self.holder} since {datetime.fromtimestamp(self.since, UTC).isoformat(timespec='seconds')}"

    def is_free(self) -> bool:
        """Given back, or held by a process of this machine that is no more."""
        place, _, process = self.place.rpartition(" ")
        died = bool(place) and place == _place() and process.isdecimal() and not Path("/proc", process).exists()
        return not self.holder or died


class Lease:
    """A lease that is held, and renewed by a thread until ``release``."""

    def __init__(self, area: RunArea, document: LeaseDocument) -> None:
        self.lost = False
        self._area = area
        self._document = document
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    @property
    def epoch(self) -> int:
        """How many drivers held the lease of this run, this one included."""
        return self._document.epoch

    def check(self) -> None:
        """Raise LeaseError if somebody else has taken the lease, because this process did not renew it in time."""
        if self.lost:
            raise LeaseError(
                f"{self._area.store.url}: another driver has taken over this output, since this one was out of touch "
                f"with it for {self._document.ttl:g} s. What is committed is kept; run the same command again to go on "
                "once the other has ended"
            )

    def release(self) -> None:
        """Stop renewing, and give the lease back if it still is ours."""
        self._released.set()
        self._renewing.join()
        with suppress(StoreError):  # then it runs out by itself
            self._write(replace(self._document, holder=""))

    def _renew(self) -> None:
        while not self.lost and not self._released.wait(self._document.ttl / RENEWALS):
            try:
                self.lost = not self._write(self._document)
            except StoreError as error:
                logger.warning("the lease could not be renewed: %s", error)

    def _write(self, document: LeaseDocument) -> bool:
        renewed = replace(document, nonce=uuid.uuid4().hex)
        written = self._area.store.replace(_path(self._area), self._document.to_json(), renewed.to_json())
        if written:
            self._document = renewed
        return written


@contextmanager
def held_lease(area: RunArea, holder: str, ttl: float = TTL_SECONDS) -> Iterator[Lease]:
    """Hold the lease of a run, as ``holder`` (host and process), while the body runs.

    A lease that was given back, or whose holder died on this machine, is taken at once. Another is watched: it is taken
    when it has not changed for its time to live, and when it is renewed meanwhile this run is refused.

    Raises:
        LeaseError: somebody else is at work here.
    """
    lease = Lease(area, _take(area, holder, ttl))
    try:
        yield lease
    finally:
        lease.release()


def _take(area: RunArea, holder: str, ttl: float) -> LeaseDocument:
    path = _path(area)
    mine = LeaseDocument(1, holder, uuid.uuid4().hex, f"{_place()} {os.getpid()}", time.time(), ttl)
    while not area.store.create(path, mine.to_json()):
        found = area.store.get(path)
        current = _parse(found, area.store.location(path))
        if current is not None:
            if not current.is_free():
                _wait_until_abandoned(area, found, current)
            mine = replace(mine, epoch=current.epoch + 1, nonce=uuid.uuid4().hex, since=time.time())
        if area.store.replace(path, found, mine.to_json()):
            break
    return mine


def _parse(data: bytes, source: str) -> LeaseDocument | None:
    """None for a damaged lease, which nobody holds: its holder would have replaced it."""
    try:
        return parse(LeaseDocument, data, source)
    except StoreError as error:
        logger.warning("the lease does not count: %s", error)
        return None


def _wait_until_abandoned(area: RunArea, seen: bytes, current: LeaseDocument) -> None:
    """Return once the lease has not changed for its time to live, or is free; LeaseError if its holder renews it."""
    logger.warning("held by %s; waiting up to %g s for a sign of life", current.describe(), current.ttl)
    deadline = time.monotonic() + current.ttl
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, current.ttl / RENEWALS / 4, LOOK_SECONDS))
        data = area.store.get(_path(area))
        now = current if data == seen else _parse(data, area.store.location(_path(area)))
        if now is None or now.is_free():
            return
        if data != seen:
            raise LeaseError(
                f"{area.store.url} is being worked on by {now.describe()}; wait for it to end, or stop it, and run the "
                "same command again"
            )
    logger.warning("no sign of life of %s for %g s; taking over", current.describe(), current.ttl)


def _path(area: RunArea) -> str:
    return area.path("lease.json")


def _place() -> str:
    """The boot and the namespace that process ids here belong to; "" where the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
