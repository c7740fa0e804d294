"""``python -m srr_dist.verify OUT``: check a finished output against its manifest and itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from srr_dist.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every problem found; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(prog="srr-dist verify", description="Check every file of a finished output.")
    parser.add_argument("output", help="folder or URL of the output")
    options = parser.parse_args(arguments)

    def work() -> int:
        from srr_dist.export import verify_output

        problems = verify_output(options.output)
        for problem in problems:
            print(problem)
        print(f"{options.output}: " + (f"{len(problems)} problems" if problems else "everything is as recorded"))
        return 1 if problems else 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
