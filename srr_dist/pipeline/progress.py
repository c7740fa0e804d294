"""What a person sees while a run goes on: a bar on a terminal, one clear line every few seconds in a job's log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0


class Progress:
    """Counts work in two kinds, block passes of sequences and solved layers, and tells when it may end.

    Args:
        title: first words of every line.
        passes: block passes in all (sequences × blocks).
        layers: layers to solve in all.
    """

    def __init__(self, title: str, passes: int, layers: int) -> None:
        self.title = title
        self.totals = {"passes": passes, "layers": layers}
        self.done = {"passes": 0, "layers": 0}
        self.seconds = {"passes": 0.0, "layers": 0.0}
        self.note = "starting"
        self.started = self._mark = time.monotonic()
        self._last_line = 0.0
        self._bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {postfix}") if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, note: str) -> None:
        """A phase starts: what came before it counts for no kind of work."""
        self._mark = time.monotonic()
        self.tick(note)

    def advance(self, kind: str, amount: int) -> None:
        """Some work of a kind is done; the time since the last call is counted for it."""
        now = time.monotonic()
        self.seconds[kind] += now - self._mark
        self._mark = now
        self.done[kind] += amount
        self.tick()

    def tick(self, note: str | None = None) -> None:
        """Show the state, if the last time is long enough ago."""
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.n = round(100 * self.share(), 1)
            self._bar.set_description_str(self.title, refresh=False)
            self._bar.set_postfix_str(self.line())
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            log.info("%s %3.0f %% · %s", self.title, 100 * self.share(), self.line())

    def line(self) -> str:
        """Where the run is, how long it took and how long it will take."""
        elapsed = time.monotonic() - self.started
        left = self.seconds_left()
        eta = "estimating" if left is None else f"{clock(left)} left"
        return f"{self.note} · layers {self.done['layers']}/{self.totals['layers']} · {clock(elapsed)} · {eta}"

    def seconds_left(self) -> float | None:
        """Remaining work at the speed of each kind so far; None while one of them was not seen yet."""
        left = 0.0
        for kind, total in self.totals.items():
            remaining = total - self.done[kind]
            if remaining > 0:
                if not self.done[kind]:
                    return None
                left += self.seconds[kind] / self.done[kind] * remaining
        return left

    def share(self) -> float:
        """Share of the work that is done, the two kinds weighted by the time they take."""
        left = self.seconds_left()
        spent = sum(self.seconds.values())
        if left is not None:
            return spent / (spent + left) if spent + left else 1.0
        total = sum(self.totals.values())
        return 0.5 * sum(self.done.values()) / total if total else 1.0


def clock(seconds: float) -> str:
    """``1h02m``, ``3m07s`` or ``12s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
