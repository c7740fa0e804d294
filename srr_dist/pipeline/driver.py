"""The main job: prepare, plan, work off the windows, assemble, report."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from srr_dist.config import JobConfig, RunConfig
from srr_dist.errors import OutputError
from srr_dist.export import Output, assemble, is_complete, write_views
from srr_dist.pipeline.boundaries import Boundaries, crossings
from srr_dist.pipeline.cluster import Actors, connected
from srr_dist.pipeline.failures import Ledger
from srr_dist.pipeline.gradients import unsketched
from srr_dist.pipeline.metrics import Metrics
from srr_dist.pipeline.plan import Plan, make_plan, smaller
from srr_dist.pipeline.prepare import Sources, make_run, open_sources, refuse_own_folder, scan_weights
from srr_dist.pipeline.progress import Progress
from srr_dist.pipeline.run import Run, stored_dtype, unit_name, versions
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.statistics import Statistics
from srr_dist.pipeline.watch import StopRequests, Watch, stop_requests
from srr_dist.pipeline.widths import spend
from srr_dist.pipeline.windows import Window, next_window, next_window_at_rest, next_window_back, reachable
from srr_dist.pipeline.work import WindowWork, describe
from srr_dist.store import ObjectStore, RunArea, read_complete
from srr_dist.store.events import EventLog
from srr_dist.store.lease import Lease, held_lease
from srr_dist.store.records import REST

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run followed and how long it took.

    Attributes:
        plan: windows, memory, bytes; None where the output was finished already.
        seconds: wall time of passing sequences ("passes") and of solving ("layers"), without start-up and reading.
    """

    plan: Plan | None
    seconds: Mapping[str, float]


def quantize(config: RunConfig) -> Outcome:
    """Run the whole job, or what is left of it; with ``dry_run`` only plan it.

    Raises:
        SrrError: see ``srr_dist.errors``; nothing committed is lost.
    """
    job, sources = config.job, open_sources(config.quantize)
    store = ObjectStore(job.output, job.single_driver)
    refuse_own_folder(sources.checkpoint, store.url)
    if not job.dry_run:
        if finished := finished_run(sources, store, job.export):
            finish(finished, RunArea(store, finished.fingerprint), job.export, anew=False)
            return Outcome(None, {})
        if not RunArea.find(store):
            scan_weights(sources.checkpoint, sources.graph)
    statistics = ObjectStore(job.statistics).url if job.statistics else ""
    with connected(job) as cluster, stop_requests(job.grace) as stop:
        on_gpu = bool(cluster.gpus)
        run = make_run(sources, store.url, on_gpu=on_gpu, single_driver=store.single_driver, statistics=statistics)
        plan = make_plan(run, cluster, job.blocks_per_stage)
        if job.dry_run:
            return Outcome(plan, {})
        area = RunArea(store, run.fingerprint)
        area.begin(run.document())
        holder = f"{socket.gethostname()} process {os.getpid()}"
        with held_lease(area, holder) as lease, EventLog(area) as events:
            seconds = work_off(plan, area, job, stop, lease, events)
            lease.check()
            finish(run, area, job.export, anew=bool(seconds))
        return Outcome(plan, seconds)


def finished_run(sources: Sources, store: ObjectStore, export: str) -> Run | None:
    """The run of these sources, if the output holds its finished result; needs no cluster and reads no weights."""
    if not is_complete(store, export):
        return None
    area = RunArea(store, read_complete(store).fingerprint)
    runs = (make_run(sources, store.url, on_gpu=on_gpu) for on_gpu in (False, True))
    run = next((run for run in runs if run.fingerprint == area.fingerprint), None)
    return run if run is not None and not missing_units(run, area) else None


def work_off(
    plan: Plan, area: RunArea, job: JobConfig, stop: StopRequests, lease: Lease, events: EventLog
) -> Mapping[str, float]:
    """Commit every unit that has no result yet, window by window, whatever becomes of workers.

    Returns:
        Wall seconds by kind of work.

    Raises:
        PipelineError: something that is no unit's fault failed too often in a row, or no worker starts.
        QuarantineError: all is done but for units that kept failing.
        OutputError: what the workers commit does not arrive.
        StoppedError: a stop was asked for.
        LeaseError: another driver has taken over.
    """
    run, missing = plan.run, missing_units(plan.run, area)
    if not missing:
        return {}
    metrics, boundaries, gradients = Metrics(area.store.url), *crossings(plan.run, area)
    ledger = Ledger(area, events, metrics)
    _note_start(events, plan, missing)
    actors = Actors(plan.cluster, Stage, run, plan.holding.placement, plan.cluster.cpus)
    passed: Window | None = None
    try:
        with _progress(run, missing) as progress:
            watch = Watch(progress, events, metrics, stop, lease.check, job.watchdog)
            for number in count():
                todo = {unit: generation for unit, generation in missing.items() if unit not in ledger.quarantined}
                workers = actors.gather(job.patience, job.watchdog, watch.tick) if todo else []
                window = _next_window(plan, area, todo, boundaries, gradients, ledger, len(workers))
                if window is None and REST not in todo:
                    break
                if window is not None and window == passed:
                    raise OutputError(
                        f"{area.store.url}: {describe(window)} were worked off, but what the workers committed is not "
                        "here; use an output (and statistics) that every node of the cluster shares"
                    )
                metrics.workers.set(len(workers))
                events.note("window", work=describe(window), workers=len(workers))
                failures = WindowWork(plan, workers, window, number, todo, watch).run()
                left = missing_units(run, area)
                ledger.committed(missing.keys() - left.keys())
                if any(failure.kind == "memory" for failure in failures) and (less := smaller(plan)):
                    plan = less
                    log.warning("memory ran out; from here on %d blocks per stage", plan.holding.blocks)
                    events.note("smaller", blocks_per_stage=plan.holding.blocks)
                    ledger.add(failure for failure in failures if failure.kind != "memory")
                else:
                    ledger.add(failures)
                missing, passed = left, None if failures else window
                if not failures and not ledger.quarantined and window:
                    _discard_used(window, boundaries, gradients)
        ledger.close(missing)
        return progress.seconds
    finally:
        actors.stop()


def missing_units(run: Run, area: RunArea) -> dict[str, int]:
    """Unit without a valid record -> the generation its next record will have."""
    valid = area.records()
    generations = area.next_generations()
    return {unit: generations.get(unit, 1) for unit in run.units if unit not in valid}


def blocks_at_rest(run: Run) -> set[int]:
    """Blocks that can be solved without a forward pass: nothing is calibrated, or all their moments are kept.

    Tuning needs the sequences themselves.
    """
    if not run.calibrated:
        return {block.index for block in run.graph.blocks}
    if run.config.tune_steps:
        return set()
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
    for kind in crossings(run, area):
        kind.clear()
    area.collect_garbage()


def _output(run: Run) -> Output:
    config = run.config
    weights = {linear.name for block in run.graph.blocks for linear in block.linears}
    dtypes = {stored_dtype(run.checkpoint.tensors[f"{name}.weight"]) for name in weights}
    return Output(
        block_count=len(run.graph.blocks),
        group_size=config.group_size,
        dtype=max(dtypes, key=lambda dtype: dtype.itemsize),
        companions=run.checkpoint.companions(),
        created_by=versions(),
        symmetric=run.grid.symmetric,
        codebook=run.grid.codebook,
    )


def _next_window(
    plan: Plan,
    area: RunArea,
    missing: Mapping[str, int],
    boundaries: Boundaries,
    gradients: Boundaries,
    ledger: Ledger,
    workers: int,
) -> Window | None:
    """The next window, or None where no block is missing that can be reached."""
    pending = {int(unit) for unit in missing if unit != REST}
    suspects = {int(unit) for unit in ledger.suspects if unit != REST}
    if to_sketch := pending & unsketched(plan.run):
        if ledger.quarantined:  # gradients reach no block before it
            return None
        missing_moments = pending - blocks_at_rest(plan.run)
        capacity = (1, 1) if suspects else (workers, plan.holding.blocks)
        places = boundaries.available(), gradients.available()
        return next_window_back(to_sketch, missing_moments, *places, *capacity)
    if to_weigh := spend(plan.run, area) if pending else ():
        if ledger.quarantined:  # bits are spent on all layers at once
            return None
        return next_window_at_rest(to_weigh, workers, plan.holding.blocks, suspects, then="weigh")
    if ready := pending & blocks_at_rest(plan.run):
        return next_window_at_rest(ready, workers, plan.holding.blocks, suspects)
    starts = boundaries.available()
    pending = reachable(pending, starts, [int(unit) for unit in ledger.impassable if unit != REST])
    return next_window(pending, starts, workers, plan.holding.blocks, pending & suspects) if pending else None


def _discard_used(window: Window, boundaries: Boundaries, gradients: Boundaries) -> None:
    """Remove what this window alone began from. Boundaries stay until gradients have come back to them."""
    if window.then == "back":
        gradients.discard(window.blocks[-1] + 1)
    elif window.then == "solve" and window.save is not None and window.start:
        boundaries.discard(window.start)


def _progress(run: Run, missing: Mapping[str, int]) -> Progress:
    pending = [block for block in run.graph.blocks if unit_name(block.index) in missing]
    layers = sum(1 for block in pending for linear in block.linears if linear.name in run.quantized)
    if len(missing) < len(run.units):
        log.info("resuming: %d of %d units are committed", len(run.units) - len(missing), len(run.units))
    at_rest = blocks_at_rest(run).intersection(block.index for block in pending)
    if at_rest and run.statistics:
        log.info("statistics: the moments of %d of %d blocks are kept, no passes for these", len(at_rest), len(pending))
    to_sketch = unsketched(run).intersection(block.index for block in pending)
    passes = len(pending) - len(at_rest) + 2 * len(to_sketch)  # the way back begins with a pass forward
    return Progress("quantize", run.token_ids.shape[0] * passes, layers)


def _note_start(events: EventLog, plan: Plan, missing: Mapping[str, int]) -> None:
    events.note(
        "started",
        versions=versions(),
        workers=plan.cluster.workers,
        cpus=plan.cluster.cpus,
        gpus=plan.cluster.gpus,
        blocks_per_stage=plan.holding.blocks,
        moments=plan.holding.placement,
        units=len(plan.run.units),
        missing=len(missing),
    )
    events.flush(now=True)
