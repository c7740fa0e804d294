"""``python -m srr_dist.status OUT``: how far a run is, from storage alone; needs no cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from srr_dist.command import run_command
from srr_dist.store import ObjectStore
from srr_dist.store.overview import Overview, iso_time, overview

WATCH_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state of every run in an output."""
    parser = argparse.ArgumentParser(prog="srr-dist status", description="How far the run in an output is.")
    parser.add_argument("output", help="folder or URL of the output")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"print it again every so many seconds ({WATCH_SECONDS:g}) until the run is finished",
    )
    options = parser.parse_args(arguments)

    def work() -> int:
        store = ObjectStore(options.output)
        while True:
            state = overview(store)
            print(json.dumps(state.as_json()) if options.json else _lines(state), flush=True)
            if options.watch is None or state.complete:
                return 0
            time.sleep(options.watch)

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
    lines += [
        f"{'set aside' if failure.quarantined else 'failed':<12} unit {failure.unit}, attempt {failure.attempt}, "
        f"{failure.doing}: {failure.error}"
        for failure in state.failures
    ]
    if state.last_commit is not None:
        lines.append(f"last commit  {state.last_commit}")
    lines += [f"event        {_event(event)}" for event in state.events]
    return "\n".join(lines)


def _event(event: Mapping[str, Any]) -> str:
    facts = (f"{name} {value}" for name, value in event.items() if name not in {"time", "event"})
    return f"{iso_time(event['time'])} {event['event']}: {', '.join(facts)}"[:200]


if __name__ == "__main__":
    sys.exit(main())
