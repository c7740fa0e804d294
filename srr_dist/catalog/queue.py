"""Entries of a zoo as processes: each result is made by the verbs themselves, and fails alone.

Higher priorities start first, within the limit on how many run at once, but of entries that share moments only one
runs until a first one is quantized: it calibrates, the others find its moments.
"""

from __future__ import annotations

import ctypes
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from srr_dist.catalog import results
from srr_dist.catalog.entries import Entry
from srr_dist.catalog.index import Row, write_index
from srr_dist.errors import PipelineError, QuarantineError, StoppedError
from srr_dist.scratch import Scratch
from srr_dist.store import ObjectStore

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an entry may be stopped (exit code 75) or killed before the zoo leaves it for another day."""

PAUSE_SECONDS = 30.0
"""Before such an entry runs again."""

POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: a forked child should do next to nothing


@dataclass
class _Running:
    """An entry at one of its steps."""

    entry: Entry
    log: Path
    left: list[tuple[str, list[str]]]
    step: str = ""
    told_to_stop: bool = False
    process: subprocess.Popen[bytes] = field(init=False)

    def next_step(self) -> None:
        """Start the next verb."""
        self.step, command = self.left.pop(0)
        with self.log.open("ab") as stream:
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=_stop_with_parent,  # noqa: PLW1509  (one system call, so that threads do no harm)
            )


class Queue:
    """What is left of a zoo, and what of it runs.

    Args:
        entries: in the order in which they start.
        store: the zoo's output.
        concurrency: how many may run at once.
        pause: seconds before an entry that was stopped is tried again.
    """

    def __init__(
        self, entries: Sequence[Entry], store: ObjectStore, concurrency: int, pause: float = PAUSE_SECONDS
    ) -> None:
        self.store, self.concurrency, self.pause = store, concurrency, pause
        self.rows = {entry.name: Row.of(entry) for entry in entries}
        self.waiting: list[Entry] = []
        self.running: list[_Running] = []
        self.attempts: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}
        self.calibrated = set[object]()
        self.stopping = False
        for entry in entries:
            if not self._is_done(entry):
                self.waiting.append(entry)

    def run(self) -> None:
        """Make every result that is not finished yet.

        Raises:
            StoppedError: a stop was asked for, or an entry was stopped ``ATTEMPTS`` times.
            PipelineError: entries failed; all others are done.
        """
        with Scratch() as scratch, self._stop_requests():
            write_index(self.store, list(self.rows.values()))
            try:
                while self.running or (self.waiting and not self.stopping):
                    self._start(scratch)
                    self._advance()
                    time.sleep(POLL_SECONDS)
            finally:
                for each in self.running:
                    each.process.terminate()
        self._conclude()

    def _start(self, scratch: Path) -> None:
        """Start what may start now."""
        for entry in list(self.waiting):
            if self.stopping or len(self.running) >= self.concurrency:
                return
            if self._may_start(entry):
                self.waiting.remove(entry)
                each = _Running(entry, scratch / f"{entry.name}.log", steps(entry))
                each.next_step()
                self.running.append(each)
                self._show(entry, "running", each.step)

    def _may_start(self, entry: Entry) -> bool:
        shared = entry.calibration
        taken = {each.entry.calibration for each in self.running} - self.calibrated - {None}
        return shared not in taken and time.monotonic() >= self.not_before.get(entry.name, 0.0)

    def _advance(self) -> None:
        """Look at what runs: go to the next step, or take leave of what has ended."""
        for each in list(self.running):
            if self.stopping and not each.told_to_stop:
                each.process.terminate()
                each.told_to_stop = True
            code = each.process.poll()
            if code is None:
                continue
            if code == 0:
                self.calibrated.add(each.entry.calibration)  # quantized at least
                if each.left and not self.stopping:
                    each.next_step()
                    self._show(each.entry, "running", each.step)
                    continue
            self.running.remove(each)
            self.store.put(log_path(each.entry), each.log.read_bytes())
            self._end(each, code)

    def _end(self, each: _Running, code: int) -> None:
        entry, step = each.entry, each.step
        killed = code < 0 or code == StoppedError.exit_code
        if code == 0 and not each.left:
            results.record(self.store, entry)
            if self._is_done(entry):
                write_index(self.store, list(self.rows.values()))
            else:
                self._show(entry, "failed", "its output was changed meanwhile")
        elif self.stopping or (killed and self.attempts[entry.name] >= ATTEMPTS - 1):
            self._show(entry, "stopped", f"{step} was stopped; the same command goes on from there")
        elif killed:
            self.attempts[entry.name] += 1
            self.not_before[entry.name] = time.monotonic() + self.pause
            self.waiting.append(entry)
            self._show(entry, "queued", f"{step} was stopped, to be tried again")
        else:
            status = "quarantined" if code == QuarantineError.exit_code else "failed"
            self._show(entry, status, f"{step}: {last_words(each.log)}")

    def _is_done(self, entry: Entry) -> bool:
        figures = results.figures(self.store, entry)
        if figures is None:
            return False
        self.calibrated.add(entry.calibration)
        kept = self.store.exists(log_path(entry))
        self.rows[entry.name] = replace(Row.of(entry), status="done", figures=figures, log=kept)
        log.info("%s: done", entry.name)
        return True

    def _show(self, entry: Entry, status: str, note: str) -> None:
        log.info("%s: %s, %s", entry.name, status, note)
        kept = self.rows[entry.name].log or status != "running"
        self.rows[entry.name] = replace(self.rows[entry.name], status=status, note=note, log=kept)
        write_index(self.store, list(self.rows.values()))

    def _conclude(self) -> None:
        left = [row for row in self.rows.values() if row.status != "done"]
        counts = f"{len(self.rows) - len(left)} of {len(self.rows)} results are done"
        bad = [f"\n  {row.name}, {row.status}: {row.note}" for row in left if row.status in ("failed", "quarantined")]
        if left and self.stopping:
            raise StoppedError(f"stopped on request, {counts}; run the same command again to go on")
        if bad:
            raise PipelineError(f"{counts}, {len(bad)} failed; the same command tries them again{''.join(bad)}")
        if left:
            raise StoppedError(f"{counts}, {len(left)} were stopped; run the same command again to go on")

    @contextmanager
    def _stop_requests(self) -> Iterator[None]:
        """Remember SIGTERM and SIGINT: they are handed on to what runs, and nothing new is started."""

        def request(number: int, frame: object) -> None:
            self.stopping = True

        previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def log_path(entry: Entry) -> str:
    """Where in the zoo's output an entry's log lies."""
    return f"logs/{entry.name}.log"


def steps(entry: Entry) -> list[tuple[str, list[str]]]:
    """The verbs that make an entry's result, with their commands."""
    quantize, job, evaluation = entry.config.quantize, entry.config.job, entry.evaluation
    commands = [("quantize", entry.config.flags())]
    if evaluation is not None:
        given = {"model": quantize.model, "quantized": job.output, "dtype": quantize.dtype} | vars(evaluation)
        shared = {name: getattr(quantize, name, None) or getattr(job, name, None) for name in _ALSO_EVALUATE}
        given |= {name: value for name, value in shared.items() if value}
        commands.append(("evaluate", [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]))
    commands.append(("verify", [job.output]))
    return [(verb, [sys.executable, "-m", f"srr_dist.{verb}", *arguments]) for verb, arguments in commands]


_ALSO_EVALUATE = ("revision", "workers", "ray_address", "gpu_memory", "host_memory", "blocks_per_stage", "model_root")


def last_words(path: Path) -> str:
    """Why a command failed: the last error that it named, else the last line that it printed."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("srr-dist: ") for line in lines if line.startswith("srr-dist: ")]
    return (said or lines)[-1]


def _stop_with_parent() -> None:
    """In a new child: be asked to stop when the zoo is killed, so that its runs do not go on unseen."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
