"""``python -m srr_dist.quantize``: quantize a checkpoint. The same command again resumes an unfinished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from srr_dist.command import parse_run, run_command, run_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, say where the result is. Exit codes: 0 done, 1 failed, 2 bad input, 3 units set aside, 75 stopped."""
    parser = run_parser("quantize", "Quantize a decoder-only checkpoint into W ≈ Q + L·R, block by block, on Ray.")
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        config = parse_run(parser, given)
        from srr_dist.pipeline.driver import quantize  # Ray and torch load only once the options are known to be right

        outcome = quantize(config)
        if config.job.dry_run and outcome.plan is not None:
            print(outcome.plan.describe())
        else:
            print(f"checkpoint {config.job.output}\nreport     {config.job.output.rstrip('/')}/report.html")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
