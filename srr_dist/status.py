"""``python -m srr_dist.status OUT``: how far a run is, from storage alone; needs no cluster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from srr_dist.command import run_command
from srr_dist.store import ObjectStore
from srr_dist.store.overview import Overview, overview


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state of every run in an output."""
    parser = argparse.ArgumentParser(prog="srr-dist status", description="How far the run in an output is.")
    parser.add_argument("output", help="folder or URL of the output")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)

    def work() -> int:
        state = overview(ObjectStore(options.output))
        print(json.dumps(state.as_json()) if options.json else _lines(state))
        return 0

    return run_command(work)


def _lines(state: Overview) -> str:
    left = "" if state.seconds_left is None else f", about {state.seconds_left / 60:.1f} minutes of work left"
    lines = [
        f"model        {state.model}",
        f"fingerprint  {state.fingerprint}",
        f"units        {state.done}/{state.total} committed{left}",
        f"finished     {'yes' if state.complete else 'no'}",
    ]
    lines += [f"damaged      unit {unit}: its record does not count, the next run redoes it" for unit in state.damaged]
    if state.last_commit is not None:
        lines.append(f"last commit  {state.last_commit}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
