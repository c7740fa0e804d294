"""How fast each kind of work goes on this machine, and how near the forecast made of that comes to real runs.

Rates are measured one by one, on shapes other than those of the runs, and printed as a file of ``jobs/hardware``. Then
a random Llama is quantized: first by one stage in this process, whose processor seconds do not depend on what else the
machine does, then on a local Ray, in wall seconds. Those of each phase are printed beside the predicted ones.

    python benchmarks/forecast.py --workers 1 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import VOCAB, processor, write_checkpoint

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, build_graph
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.config import RunConfig
from srr_dist.export.packing import pack
from srr_dist.pipeline import operations
from srr_dist.pipeline.cluster import Actors, Cluster, connected
from srr_dist.pipeline.driver import quantize
from srr_dist.pipeline.forecast import forecast
from srr_dist.pipeline.hardware import Hardware
from srr_dist.pipeline.memory import Budget
from srr_dist.pipeline.operations import KINDS, LayerWork, Work
from srr_dist.pipeline.plan import make_plan
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.pipeline.run import unit_name
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.solve import Metric, Quantizer, SolveOptions, make_grid
from srr_dist.solve.lowrank import orthonormal, uniform
from srr_dist.solve.metric import eigh, gram
from srr_dist.solve.rounding import feedback_of
from srr_dist.store import ObjectStore

WIDTH, SEQ_LEN, REPEATS = 1024, 256, 5
HEAD = "| workers | phase | predicted, s | real, s | predicted / real |\n|---|---|---|---|---|"
RUN_WIDTH, RUN_INTERMEDIATE, RUN_SAMPLES, RUN_SEQ_LEN = 512, 1408, 8, 512


class Rates:
    """Amounts per second by kind of work; those not measured yet take no time."""

    def __init__(self) -> None:
        self.found = dict.fromkeys(KINDS, math.inf)

    def measure(
        self, kind: str, work: Work, task: Callable[[], Any], clock: Callable[[], float] = time.process_time
    ) -> None:
        """Time a task and give the seconds that the other kinds in it do not explain to this one."""
        seconds = median(self._timed(task, clock) for _ in range(REPEATS))
        rest = seconds - replace(work, **{kind: 0.0}).seconds(self.found)
        self.found[kind] = getattr(work, kind) / max(rest, 0.05 * seconds)

    @staticmethod
    def _timed(task: Callable[[], Any], clock: Callable[[], float]) -> float:
        started = clock()
        task()
        return clock() - started


def measure_solving(rates: Rates) -> None:
    """The kinds of work of which solving consists, on one thread."""
    n, generator = WIDTH, torch.Generator().manual_seed(0)
    W, X = (torch.randn(n, n, generator=generator) for _ in range(2))
    metric = Metric.of(X @ X.mT, 0.1)
    grid, thin = make_grid("mxint", 3, 32), torch.randn(n, 48, generator=generator)
    basis, small = torch.randn(n, 144, generator=generator), torch.randn(144, 144, generator=generator).double()

    def layer(rounding: str, rows: int) -> LayerWork:
        return LayerWork(rows, n, SolveOptions("none", Quantizer(grid, "search", rounding), 0), full=True)

    def rounded(rounding: str, rows: int) -> tuple[Work, Callable[[], Any]]:
        work = layer(rounding, rows)

        def task() -> torch.Tensor:
            codes, scale = work.options.quantizer.quantize(W[:rows], metric)
            return W[:rows] - grid.dequantize(codes, scale)

        return work.rounding(work.options.quantizer), task

    rates.measure("elementwise", *rounded("nearest", n))
    rates.measure("products", layer("nearest", n).energy(), lambda: metric.energy(W))
    rates.measure("narrow", Work(narrow=4 * n * n * 48), lambda: W @ (W.mT @ thin))
    rates.measure("calls", *rounded("gptq", 8))
    rates.measure("feedback", *rounded("gptq", n))
    rates.measure("thin", Work(thin=2 * n * 144 * 48), lambda: gram(basis, thin))
    rates.measure("reflections", Work(reflections=4 * n * 48**2), lambda: orthonormal(thin))
    rates.measure("cholesky", operations.factored(n), lambda: feedback_of(metric.H))
    rates.measure("eigen", Work(eigen=144**3), lambda: eigh(small))
    rates.measure("draws", Work(draws=n * n), lambda: uniform((n, n), torch.Generator(), torch.device("cpu")))


def measure_passing(rates: Rates, checkpoint: Checkpoint, block: Block) -> None:
    """A whole block's pass, and the moments of its inputs, on one thread."""
    decoder, hidden = Decoder(checkpoint, dtype=torch.float32), torch.randn(1, SEQ_LEN, WIDTH)
    decoder.load_block(0)
    rates.measure("forward", operations.passing(block, SEQ_LEN, WIDTH), lambda: decoder.run_block(0, hidden))
    moment, name = InputMoment(WIDTH, "exact"), block.linears[0].input
    work = operations.moments(block, frozenset({name}), SEQ_LEN, "exact", away=False)
    rates.measure("moments", work, lambda: moment.update(hidden[0]))


def measure_storing(rates: Rates, checkpoint: Checkpoint, block: Block, folder: Path) -> None:
    """Reading a block, packing, hashing, and writing what a block leaves."""
    codes, store = torch.zeros(WIDTH, WIDTH, dtype=torch.int8), ObjectStore(str(folder / "store"))
    data = bytes(block.nbytes // 3)
    packed = replace(block, nbytes=0, linears=block.linears[:1])
    rates.measure("host", operations.storing(packed, frozenset({block.linears[0].name})), lambda: pack(codes, 3))
    rates.measure("digest", Work(digest=len(data)), lambda: hashlib.sha256(data))
    rates.measure("read", Work(read=block.nbytes), lambda: checkpoint.read(block.tensors), time.perf_counter)
    rates.measure(
        "write", Work(write=len(data), digest=len(data)), lambda: store.put("object", data), time.perf_counter
    )


def seconds_to_start(options: dict[str, Any]) -> float:
    """Until a worker of a run answers."""
    started = time.perf_counter()
    config = RunConfig.from_options(options)
    run = make_run(open_sources(config.quantize), config.job.output, on_gpu=False)
    with connected(config.job) as cluster:
        actors = Actors(cluster, Stage, run, "host", 1)
        actors.gather(0.0, 0.0, lambda: None)
        actors.stop()
    return time.perf_counter() - started


def measured_hardware(folder: Path, options: dict[str, Any]) -> Hardware:
    """This machine, one thread."""
    torch.set_grad_enabled(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates, checkpoint = Rates(), open_checkpoint(str(write_checkpoint(folder / "measured", 1, WIDTH, 2816)))
    block = build_graph(checkpoint).blocks[0]
    measure_solving(rates)
    measure_passing(rates, checkpoint, block)
    measure_storing(rates, checkpoint, block, folder)
    torch.set_num_threads(threads)
    where = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {date.today()}"
    return Hardware("CPU", "thread of a CPU", where, None, 8 * 2**30, seconds_to_start(options), rates.found)


def as_file(hardware: Hardware) -> str:
    """In the form of the files of ``jobs/hardware``."""
    head = [f"name: {hardware.name}", f"measured: {hardware.measured}", "host_memory: 8GiB"]
    rates = [f"  {kind}: {'.inf' if math.isinf(rate) else f'{rate:.2e}'}" for kind, rate in hardware.rates.items()]
    return "\n".join([*head, f"start: {hardware.start:.0f}", "rates:", *rates])


def alone(hardware: Hardware, options: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Processor seconds of one stage in this process, all blocks in one window; predicted, and taken."""
    config = RunConfig.from_options(options)
    run = make_run(open_sources(config.quantize), config.job.output, on_gpu=False)
    stage, blocks = Stage(run, "host", 1), tuple(range(len(run.graph.blocks)))
    stage.area.begin(run.document())
    stage.open(StagePlan(0, 0, blocks, frozenset(blocks), start=0, save=None, last=True, planned_memory={}))
    clock = [time.process_time()]
    stage.forward(range(len(run.token_ids)), None)
    clock.append(time.process_time())
    stage.end_forward()
    for index in blocks:
        stage.solve(index, 1)
        stage.commits.result(unit_name(index))
    clock.append(time.process_time())
    cluster = Cluster(1, cpus=1, gpus=0, budget=Budget(hardware.host_memory, None))
    predicted = forecast(make_plan(run, cluster, len(blocks)), hardware).seconds
    real = {"calibrating": clock[1] - clock[0], "solving": clock[2] - clock[1]}
    return {phase: (predicted[phase], seconds) for phase, seconds in real.items()}


def compare(hardware: Hardware, options: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Quantize once; phase -> seconds predicted, and seconds it took."""
    started = time.perf_counter()
    outcome = quantize(RunConfig.from_options(options))
    whole = time.perf_counter() - started
    assert outcome.plan is not None
    predicted = forecast(outcome.plan, hardware).seconds
    real = {"calibrating": outcome.seconds["passes"], "solving": outcome.seconds["layers"]}
    rest = sum(seconds for phase, seconds in predicted.items() if phase not in real)
    pairs = {phase: (predicted[phase], seconds) for phase, seconds in real.items()}
    return pairs | {"the rest": (rest, whole - sum(real.values())), "all": (sum(predicted.values()), whole)}


def show(run: str, pairs: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Print the rows of a run; returns them for the file of figures."""
    rows = []
    for phase, (predicted, real) in pairs.items():
        print(f"| {run} | {phase} | {predicted:.1f} | {real:.1f} | {predicted / real:.2f} |", flush=True)
        rows.append({"run": run, "phase": phase, "predicted": predicted, "real": real})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        text.write_text("".join(random.Random(0).choices([chr(33 + i) for i in range(VOCAB - 1)], k=20_000)))
        model = write_checkpoint(folder / "model", arguments.blocks, RUN_WIDTH, RUN_INTERMEDIATE)
        options: dict[str, Any] = {"model": str(model), "calibration": str(text), "output": str(folder / "start")}
        options |= {"num_samples": RUN_SAMPLES, "seq_len": RUN_SEQ_LEN, "blocks_per_stage": 2}
        hardware = measured_hardware(folder, options)
        print(f"{as_file(hardware)}\n\n{HEAD}")
        rows = show("1, processor seconds", alone(hardware, options | {"output": str(folder / "alone")}))
        for workers in arguments.workers:
            pairs = compare(hardware, options | {"workers": workers, "output": str(folder / f"out-{workers}")})
            rows += show(str(workers), pairs)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"hardware": as_file(hardware), "rows": rows}
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
