"""``python -m srr_dist.zoo FILE --output OUT``: many models under many recipes. The same command again goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from srr_dist.catalog.entries import Entry, read_zoo
from srr_dist.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every result that is not there yet. Exit codes: 0 all done, 1 some failed, 2 bad input, 75 resumable."""
    parser = argparse.ArgumentParser(prog="srr-dist zoo", description="Quantize many models under many recipes.")
    parser.add_argument("file", help="YAML file of models and recipes, see jobs/zoo.yaml")
    parser.add_argument("--output", required=True, help="folder or URL; every result has a folder of its name in it")
    parser.add_argument("--concurrency", type=int, default=1, help="results made at the same time (default: 1)")
    parser.add_argument("--ray-address", default=None, help="Ray cluster to join (default: RAY_ADDRESS, else one each)")
    parser.add_argument("--dry-run", action="store_true", help="check the file, print the order and stop")
    options = parser.parse_args(arguments)
    if options.concurrency < 1:
        parser.error(f"argument --concurrency: expected at least 1, found {options.concurrency}")

    def work() -> int:
        from srr_dist.catalog.queue import Queue
        from srr_dist.store import ObjectStore

        store = ObjectStore(options.output)
        entries = read_zoo(options.file, store.url, options.ray_address)
        queue = Queue(entries, store, options.concurrency)
        if options.dry_run:
            print("\n".join(_line(entry, queue.rows[entry.name].status) for entry in entries))
        else:
            queue.run()
            print(f"index      {store.location('index.html')}")
        return 0

    return run_command(work)


def _line(entry: Entry, status: str) -> str:
    chosen = " ".join(flag for flag in entry.config.flags() if not flag.startswith(("--output=", "--statistics=")))
    return f"{status:<7} {entry.name}: {chosen}"


if __name__ == "__main__":
    sys.exit(main())
