"""One window on the workers: read, calibrate, then solve or sketch.

What goes wrong is collected, so that the rest is not lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from srr_dist.calibration.sketches import sketch_passes
from srr_dist.errors import SrrError, StoreError
from srr_dist.pipeline.cluster import Worker
from srr_dist.pipeline.failures import Failure, UnitError
from srr_dist.pipeline.plan import Plan, hidden_size
from srr_dist.pipeline.run import unit_name
from srr_dist.pipeline.stage_plan import StagePlan, stage_plans
from srr_dist.pipeline.watch import Watch
from srr_dist.pipeline.windows import Window, batches, following
from srr_dist.store.records import REST


@dataclass(frozen=True)
class Task:
    """Something a worker was asked to do.

    Attributes:
        units: those that may be to blame if it fails.
    """

    reference: Any
    worker: Worker
    doing: str
    units: tuple[str, ...]


class WindowWork:
    """The work on one window.

    Args:
        plan: of the run.
        workers: at hand, as many as the window has stages or more.
        window: None where only the tensors outside the blocks are missing.
        number: counts the windows of this process.
        missing: unit without a result -> generation of its next record.
        watch: waits.
    """

    def __init__(
        self,
        plan: Plan,
        workers: Sequence[Worker],
        window: Window | None,
        number: int,
        missing: Mapping[str, int],
        watch: Watch,
    ) -> None:
        self._plan, self._window, self._missing, self._watch = plan, window, missing, watch
        pending = [int(unit) for unit in missing if unit != REST]
        solved = window if window is not None and window.then == "solve" else None
        ahead = following(solved, pending, len(workers), plan.holding.blocks) if solved is not None else None
        parts = stage_plans(window, number, plan.planned_memory(), ahead) if window is not None else []
        self._stages = list(zip(workers, parts, strict=False))
        self._workers = [worker for worker, _ in self._stages] or [workers[-1]]
        self._spare = workers[-1]
        self._tainted: set[Worker] = set()
        self.name = describe(window)

    def run(self) -> list[Failure]:
        """Commit what can be committed; returns what went wrong. Workers that raised something unexpected are killed.

        Raises:
            SrrError: what no repetition would mend.
            StoppedError: a stop was asked for.
        """
        failures = self._read() or self._calibrate() or self._finish()
        for worker in self._tainted:
            worker.kill()
        return failures

    def _read(self) -> list[Failure]:
        self._watch.progress.tick(f"{self.name} · reading weights")
        tasks = []
        if REST in self._missing:
            reference = self._spare.handle.store_rest.remote(self._missing[REST])
            tasks.append(Task(reference, self._spare, "reading", (REST,)))
        for worker, part in self._stages:
            tasks.append(Task(worker.handle.open.remote(part), worker, "reading", _units(part)))
        return self._settle(tasks)

    def _calibrate(self) -> list[Failure]:
        """Sequences pass forward, and are used for moments."""
        if self._window is None:
            return []
        passing = self._window.passes and self._stream("forward", self._stages, "calibrating")
        return passing or self._on_all("end_forward", "calibrating")

    def _finish(self) -> list[Failure]:
        """What follows once the sequences have passed."""
        match self._window.then if self._window is not None else "solve":
            case "back":
                return self._sketch()
            case "weigh":
                self._watch.progress.begin(f"{self.name} · weighing")
                return self._on_all("weigh", "weighing")
            case "nothing":
                return []
        return self._solve()

    def _sketch(self) -> list[Failure]:
        """Gradients come back, as often as a sketch has to see them."""
        for _ in range(sketch_passes(self._plan.run.config.sketch)):
            failures = self._stream("backward", self._stages[::-1], "sketching")
            if failures := failures or self._on_all("end_backward", "sketching"):
                return failures
        return []

    def _stream(self, method: str, stages: Sequence[tuple[Worker, StagePlan]], doing: str) -> list[Failure]:
        """Send every sequence through the chain of stages, with a bounded number of messages under way."""
        assert self._window is not None
        self._watch.progress.begin(f"{self.name} · {doing}")
        run, passed = self._plan.run, 0
        count, seq_len = run.token_ids.shape
        sequence_bytes = seq_len * hidden_size(run.checkpoint) * run.dtype.itemsize
        under_way: deque[tuple[Any, int]] = deque()
        for batch in batches(count, len(stages), sequence_bytes):
            message = None
            for worker, _ in stages:
                message = getattr(worker.handle, method).remote(tuple(batch), message)
            under_way.append((message, len(batch)))
            while len(under_way) > (len(stages) + 1 if batch.stop < count else 0):
                oldest, size = under_way.popleft()
                if failure := self._passed(oldest, doing):
                    return [failure]
                passed += size
                self._watch.progress.note = f"{self.name} · {doing} {passed}/{count}"
                self._watch.progress.advance("passes", size * len(self._window.blocks))
        return []

    def _on_all(self, method: str, doing: str) -> list[Failure]:
        """Call a method of every stage, and wait for all."""
        return self._settle(
            Task(getattr(worker.handle, method).remote(), worker, doing, _units(part)) for worker, part in self._stages
        )

    def _passed(self, message: Any, doing: str) -> Failure | None:
        """Wait for a message to leave the last stage. If it does not, stages that do not answer are to blame."""
        left = [message]
        while left:
            _, left = self._watch.wait(left, self._workers)
        try:
            ray.get(message)
        except RayError as error:
            dead = self._watch.dead(self._workers)
            units = [unit for worker, part in self._stages if worker in dead for unit in _units(part)]
            lost = dead[0] if dead else self._workers[0]
            return self._failure(error, Task(message, lost, doing, tuple(units)))
        return None

    def _solve(self) -> list[Failure]:
        """Each worker solves its blocks one after the other, while those before are committed.

        A stop lets blocks that are begun come to their end.
        """
        self._watch.progress.begin(f"{self.name} · solving")
        self._watch.events.note("solving", work=self.name)
        self._watch.events.flush(now=True)
        queues = {worker: deque(_units(part)) for worker, part in self._stages}
        tasks = [self._next_block(worker, queue) for worker, queue in queues.items() if queue]
        failures: list[Failure] = []
        while tasks:
            done, _ = self._watch.wait([task.reference for task in tasks], self._workers, finishing=True)
            for task in [task for task in tasks if task.reference in done]:
                tasks.remove(task)
                outcome = self._outcome(task)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                if task.doing == "committing":
                    continue
                if outcome is True:
                    (unit,) = task.units
                    tasks.append(Task(task.worker.handle.commit.remote(unit), task.worker, "committing", task.units))
                lost = isinstance(outcome, Failure) and outcome.kind not in {"error", "memory"}
                if queues[task.worker] and not lost and not self._watch.stop.requested:
                    tasks.append(self._next_block(task.worker, queues[task.worker]))
        self._watch.stop.check()
        return failures

    def _next_block(self, worker: Worker, queue: deque[str]) -> Task:
        unit = queue.popleft()
        return Task(worker.handle.solve.remote(int(unit), self._missing[unit]), worker, "solving", (unit,))

    def _settle(self, tasks: Iterable[Task]) -> list[Failure]:
        """Wait for all tasks, whatever becomes of them."""
        left, failures = list(tasks), []
        while left:
            done, _ = self._watch.wait([task.reference for task in left], self._workers)
            outcomes = [self._outcome(task) for task in left if task.reference in done]
            failures += [outcome for outcome in outcomes if isinstance(outcome, Failure)]
            left = [task for task in left if task.reference not in done]
        return failures

    def _outcome(self, task: Task) -> Failure | bool:
        """What became of a task that is done; if it did not fail, whether a commit is to follow."""
        try:
            answer = ray.get(task.reference)
        except RayError as error:
            return self._failure(error, task)
        if isinstance(answer, dict):
            self._watch.committed(answer)
        return answer is True

    def _failure(self, error: RayError, task: Task) -> Failure:
        """Say whose failure it is; deliberate errors that a repetition would not mend are raised."""
        cause = _cause(error)
        if isinstance(cause, UnitError):
            units = (cause.unit,) if cause.unit in self._missing else ()
            self._tainted.add(self._holder(cause.unit))
            return Failure(cause.kind, task.doing, units, cause.reason)
        if isinstance(cause, SrrError) and not isinstance(cause, StoreError):
            raise cause from error
        if task.worker.silent:
            return Failure("silent", task.doing, task.units, f"no sign of life for {self._watch.silence:.0f} s")
        return Failure(_kind(error, cause), task.doing, task.units, " ".join(str(cause).split()))

    def _holder(self, unit: str) -> Worker:
        return next((worker for worker, part in self._stages if unit in map(unit_name, part.blocks)), self._spare)


def _cause(error: BaseException) -> BaseException:
    """What a worker raised, at the bottom of Ray's wrappings."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _kind(error: RayError, cause: BaseException) -> str:
    if isinstance(cause, StoreError):
        return "storage"
    if isinstance(cause, OutOfMemoryError):
        return "memory"
    if isinstance(cause, RayActorError):
        return "preempted" if cause.preempted else "lost"
    return "error" if isinstance(error, RayTaskError) and not isinstance(cause, RayError) else "message"


def describe(window: Window | None) -> str:
    """A window's blocks, for people."""
    return "rest" if window is None else f"blocks {window.blocks[0]}–{window.blocks[-1]}"


def _units(part: StagePlan) -> tuple[str, ...]:
    return tuple(unit_name(index) for index in part.blocks if index in part.collect)
