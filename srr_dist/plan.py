"""``python -m srr_dist.plan``: what ``quantize`` with the same options would do, and how long it would take."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from srr_dist.command import run_command, run_config, run_parser
from srr_dist.config import RunConfig
from srr_dist.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print windows, memory and bytes; with ``--gpus`` also hours and, at a price, cost.

    Nothing is written, and the output need not be named. Exit codes: 0 done, 1 failed, 2 bad input.
    """
    parser = run_parser("plan", "Print what quantize with the same options would do, and how long it would take.")
    parser.add_argument("--gpus", default="", help="number and kind, as 8xH100: plan for these, without a cluster")
    parser.add_argument("--gpu-hour", type=float, help="price of an hour of one of --gpus, in any currency")
    flags = {"output": "memory://plan", **vars(parser.parse_args(arguments))}
    gpus, gpu_hour = flags.pop("gpus"), flags.pop("gpu_hour")

    def work() -> int:
        if gpu_hour is not None and not (gpus and 0.0 < gpu_hour < float("inf")):
            raise ConfigError(f"gpu_hour: expected a price above 0 for an hour of one of --gpus, found {gpu_hour:g}")
        config = run_config(flags | {"dry_run": True})
        print(_forecast(config, gpus, gpu_hour) if gpus else _plan(config))
        return 0

    return run_command(work)


def _plan(config: RunConfig) -> str:
    """What the cluster at hand would do."""
    from srr_dist.pipeline.driver import quantize  # Ray and torch load only once the options are known to be right

    plan = quantize(config).plan
    assert plan is not None, "a dry run always plans"
    return plan.describe()


def _forecast(config: RunConfig, gpus: str, gpu_hour: float | None) -> str:
    """What workers with one of these GPUs each would do, and how long they would take."""
    from srr_dist.pipeline.forecast import forecast
    from srr_dist.pipeline.hardware import imagined_cluster
    from srr_dist.pipeline.plan import make_plan
    from srr_dist.pipeline.prepare import make_run, open_sources

    cluster, hardware = imagined_cluster(gpus, config.job)
    run = make_run(open_sources(config.quantize), config.job.output, on_gpu=bool(cluster.gpus))
    plan = make_plan(run, cluster, config.job.blocks_per_stage)
    return f"{plan.describe()}\n{forecast(plan, hardware).describe(gpu_hour)}"


if __name__ == "__main__":
    sys.exit(main())
