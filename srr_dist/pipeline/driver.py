"""The main job: prepare, plan, work off the windows, assemble, report."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from srr_dist.config import RunConfig
from srr_dist.errors import OutputError, PipelineError, SrrError, StoppedError, StoreError
from srr_dist.export import Output, assemble, is_complete, write_views
from srr_dist.pipeline.boundaries import Boundaries
from srr_dist.pipeline.cluster import Actors, connected
from srr_dist.pipeline.plan import Plan, hidden_size, make_plan
from srr_dist.pipeline.prepare import make_run, open_sources, scan_weights
from srr_dist.pipeline.progress import Progress
from srr_dist.pipeline.run import Run, stored_dtype, unit_name, versions
from srr_dist.pipeline.stage import Stage, StagePlan
from srr_dist.pipeline.statistics import Statistics
from srr_dist.pipeline.windows import Window, batches, next_window, next_window_at_rest
from srr_dist.store import ObjectStore, RunArea
from srr_dist.store.records import REST

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Failures of workers in a row, without one block committed between them, after which a run gives up."""

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a run followed and how long it took.

    Attributes:
        plan: windows, memory, bytes.
        seconds: wall time of passing sequences ("passes") and of solving ("layers"), without start-up and reading.
    """

    plan: Plan
    seconds: Mapping[str, float]


def quantize(config: RunConfig) -> Outcome:
    """Run the whole job, or what is left of it; with ``dry_run`` only plan it.

    Raises:
        SrrError: see ``srr_dist.errors``; nothing committed is lost.
    """
    sources, store = open_sources(config.quantize), ObjectStore(config.job.output)
    statistics = ObjectStore(config.job.statistics).url if config.job.statistics else ""
    if not config.job.dry_run and not RunArea.find(store):
        scan_weights(sources.checkpoint, sources.graph)
    with connected(config.job) as cluster, stop_requests() as stop:
        run = make_run(sources, store.url, on_gpu=bool(cluster.gpus), statistics=statistics)
        plan = make_plan(run, cluster, config.job.blocks_per_stage)
        if config.job.dry_run:
            return Outcome(plan, {})
        area = RunArea(store, run.fingerprint)
        area.begin(run.document())
        seconds = work_off(plan, area, stop)
        finish(run, area, config.job.export, anew=bool(seconds))
        return Outcome(plan, seconds)


def work_off(plan: Plan, area: RunArea, stop: StopRequests) -> Mapping[str, float]:
    """Commit every unit that has no result yet, window by window, replacing workers that die.

    Returns:
        Wall seconds by kind of work.

    Raises:
        PipelineError: workers died ``ATTEMPTS`` times in a row without a block committed between.
        OutputError: what the workers commit does not arrive.
        StoppedError: a stop was asked for.
    """
    run = plan.run
    if not missing_units(run, area):
        return {}
    boundaries = Boundaries(area)
    actors = Actors(plan.cluster, Stage, run, plan.holding.placement, plan.cluster.cpus)
    failures, window_count, passed = 0, 0, None
    try:
        with _progress(run, area) as progress:
            while missing := missing_units(run, area):
                window = _next_window(plan, missing, boundaries)
                if window is not None and window == passed:
                    raise OutputError(
                        f"{area.store.url}: {_describe(window)} were worked off, but what the workers committed is not "
                        "here; use an output (and statistics) that every node of the cluster shares"
                    )
                try:
                    _work(actors, plan, window, window_count, missing, progress, stop)
                except (RayActorError, StoreError) as error:
                    failures = failures + 1 if len(missing_units(run, area)) == len(missing) else 1
                    if failures >= ATTEMPTS:
                        raise PipelineError(
                            f"{_describe(window)}: failed {failures} times in a row, last: {error}; what is committed "
                            "is kept, the same command goes on from there"
                        ) from error
                    log.warning("%s: %s; starting its workers anew", _describe(window), error)
                    passed = None
                    actors.start()
                else:
                    failures, window_count, passed = 0, window_count + 1, window
                    if window is not None and window.save is not None and window.start:
                        boundaries.discard(window.start)
        return progress.seconds
    finally:
        actors.stop()


def missing_units(run: Run, area: RunArea) -> dict[str, int]:
    """Unit without a valid record -> the generation its next record will have."""
    valid = area.records()
    generations = area.next_generations()
    return {unit: generations.get(unit, 1) for unit in run.units if unit not in valid}


def blocks_at_rest(run: Run) -> set[int]:
    """Blocks that can be solved without a forward pass: nothing is calibrated, or all their moments are kept."""
    if not run.token_ids.shape[0]:
        return {block.index for block in run.graph.blocks}
    kept = Statistics(run).available()
    needed = {
        block.index: {linear.input for linear in block.linears if linear.name in run.quantized}
        for block in run.graph.blocks
    }
    return {index for index, inputs in needed.items() if inputs <= kept}


def finish(run: Run, area: RunArea, export: str, *, anew: bool) -> None:
    """Assemble the output from the records and write the views of it.

    Unless ``anew``, an output that is complete already is left as it is.
    """
    if not anew and is_complete(area.store, export):
        log.info("%s is finished already", run.output)
    else:
        assemble(area.store, area.records(), _output(run), [export])
    write_views(area)
    boundaries = Boundaries(area)
    for block in sorted(boundaries.available() - {0}):
        boundaries.discard(block)


def _output(run: Run) -> Output:
    config = run.config
    weights = {linear.name for block in run.graph.blocks for linear in block.linears}
    dtypes = {stored_dtype(run.checkpoint.tensors[f"{name}.weight"]) for name in weights}
    return Output(
        block_count=len(run.graph.blocks),
        bits=config.bits,
        group_size=config.group_size,
        dtype=max(dtypes, key=lambda dtype: dtype.itemsize),
        companions=run.checkpoint.companions(),
        created_by=versions(),
    )


def _next_window(plan: Plan, missing: Mapping[str, int], boundaries: Boundaries) -> Window | None:
    """The next window, or None where only the tensors outside the blocks are missing."""
    pending = [int(unit) for unit in missing if unit != REST]
    if not pending:
        return None
    if ready := blocks_at_rest(plan.run).intersection(pending):
        return next_window_at_rest(ready, plan.cluster.workers, plan.holding.blocks)
    return next_window(pending, boundaries.available(), plan.cluster.workers, plan.holding.blocks)


def _work(
    actors: Actors,
    plan: Plan,
    window: Window | None,
    number: int,
    missing: Mapping[str, int],
    progress: Progress,
    stop: StopRequests,
) -> None:
    """One window: open the stages, pass the sequences through them, let each solve and commit its blocks."""
    solving: list[Any] = []
    if REST in missing:
        solving.append(actors.handles[-1].store_rest.remote(missing[REST]))
    if window is not None:
        stages = actors.handles[: len(window.stages)]
        plans = stage_plans(window, number, plan)
        progress.tick(f"{_describe(window)} · reading weights")
        _wait([stage.open.remote(part) for stage, part in zip(stages, plans, strict=True)], progress, stop)
        if window.passes:
            progress.begin(f"{_describe(window)} · calibrating")
            _pass_sequences(stages, plan, window, progress, stop)
        _wait([stage.end_forward.remote() for stage in stages], progress, stop)
        for stage, part in zip(stages, plans, strict=True):
            solving += [
                stage.solve.remote(index, missing[unit_name(index)]) for index in part.blocks if index in part.collect
            ]
    progress.begin(f"{_describe(window)} · solving")
    _wait(solving, progress, stop)


def stage_plans(window: Window, number: int, plan: Plan) -> list[StagePlan]:
    """What each stage is told of a window."""
    last = len(window.stages) - 1
    return [
        StagePlan(
            stage=index,
            window=number,
            blocks=blocks,
            collect=window.collect & frozenset(blocks),
            start=window.start if index == 0 and window.passes else None,
            save=window.save if index == last else None,
            last=index == last,
            planned_memory=plan.planned_memory(),
            passes=window.passes,
        )
        for index, blocks in enumerate(window.stages)
    ]


def _pass_sequences(stages: list[Any], plan: Plan, window: Window, progress: Progress, stop: StopRequests) -> None:
    """Send every sequence through the chain of stages, with a bounded number of messages under way."""
    run, passed = plan.run, 0
    count, seq_len = run.token_ids.shape
    sequence_bytes = seq_len * hidden_size(run.checkpoint) * run.dtype.itemsize
    under_way: deque[tuple[Any, int]] = deque()
    for batch in batches(count, len(stages), sequence_bytes):
        message = None
        for stage in stages:
            message = stage.forward.remote(tuple(batch), message)
        under_way.append((message, len(batch)))
        while len(under_way) > (len(stages) + 1 if batch.stop < count else 0):
            oldest, size = under_way.popleft()
            _wait([oldest], progress, stop)
            passed += size
            progress.note = f"{_describe(window)} · calibrating {passed}/{count}"
            progress.advance("passes", size * len(window.blocks))


def _wait(references: list[Any], progress: Progress, stop: StopRequests) -> None:
    """Wait until all are done, in whatever order; count what solved blocks report. Errors of workers come out here."""
    left = list(references)
    while left:
        done, left = ray.wait(left, num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            try:
                summary = ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, SrrError):
                    raise error.cause from error
                raise PipelineError(f"a worker failed: {error}") from error
            if isinstance(summary, dict):
                progress.advance("layers", summary["layers"])
                log.debug("unit %s committed: %s", summary["unit"], summary["seconds"])
        progress.tick()
        stop.check()


def _progress(run: Run, area: RunArea) -> Progress:
    missing = missing_units(run, area)
    pending = [block for block in run.graph.blocks if unit_name(block.index) in missing]
    layers = sum(1 for block in pending for linear in block.linears if linear.name in run.quantized)
    if len(missing) < len(run.units):
        log.info("resuming: %d of %d units are committed", len(run.units) - len(missing), len(run.units))
    at_rest = blocks_at_rest(run).intersection(block.index for block in pending)
    if at_rest and run.statistics:
        log.info("statistics: the moments of %d of %d blocks are kept, no passes for these", len(at_rest), len(pending))
    return Progress("quantize", run.token_ids.shape[0] * (len(pending) - len(at_rest)), layers)


def _describe(window: Window | None) -> str:
    return "rest" if window is None else f"blocks {window.blocks[0]}–{window.blocks[-1]}"


class StopRequests:
    """Remembers that a stop was asked for, until the driver reaches a point where it can."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise StoppedError if a stop was asked for."""
        if self.requested:
            raise StoppedError("stopped on request; run the same command again to go on")


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn SIGTERM into a stop at the next poll. Entered after ``ray.init``, which installs a handler of its own."""
    stop = StopRequests()

    def request(number: int, frame: object) -> None:
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
