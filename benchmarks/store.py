"""Whether a storage server keeps the promises that records and leases rest on, and what its requests take.

Race: writers, in processes of their own and each with connections of its own, write different contents to one object at
the same moment, by ``create`` and by ``replace`` (compare-and-swap). In each round exactly one must win, and what it
wrote must be there. Latency: single small requests one after the other. Against a server on this machine:

    export AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_ENDPOINT_URL=http://127.0.0.1:8333
    weed mini -dir=/tmp/s3 -ip=127.0.0.1 -bucket=bucket &
    python benchmarks/store.py --url s3://bucket/trial
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from srr_dist.store import ObjectStore

WRITERS_PER_PROCESS = 8
LATENCY_REQUESTS = 100


def race(url: str, kind: str, writers: int, rounds: int) -> list[dict[str, Any]]:
    """One row per round: winners, whether the object holds the winner's content, seconds from start to last answer."""
    spawn = multiprocessing.get_context("spawn")
    store, together, answers = ObjectStore(url), spawn.Barrier(writers + 1), spawn.SimpleQueue()
    processes = [
        spawn.Process(target=write_rounds, args=(url, kind, range(first, last), rounds, together, answers), daemon=True)
        for first in range(0, writers, WRITERS_PER_PROCESS)
        for last in [min(first + WRITERS_PER_PROCESS, writers)]
    ]
    for process in processes:
        process.start()
    rows = []
    for number in range(rounds):
        if kind == "replace":
            store.put(f"{kind}/{number}", b"old")
        together.wait()
        started = time.perf_counter()
        won = [content for content, success in (answers.get() for _ in range(writers)) if success]
        stored = store.get(f"{kind}/{number}").decode()
        rows.append({"winners": len(won), "kept": won == [stored], "seconds": time.perf_counter() - started})
        print(f"{kind} {number}: {len(won)} won in {rows[-1]['seconds']:.1f} s", file=sys.stderr)
    for process in processes:
        process.join()
    return rows


def write_rounds(url: str, kind: str, writers: range, rounds: int, together: Any, answers: Any) -> None:
    """What one process does: its writers meet all others before each round."""

    def write(writer: int) -> None:
        store = ObjectStore(url)
        for number in range(rounds):
            path, content = f"{kind}/{number}", f"{writer} {uuid.uuid4().hex}"
            together.wait()
            success = store.create(path, content.encode()) if kind == "create" else store.replace(
                path, b"old", content.encode()
            )  # fmt: skip
            answers.put((content, success))

    with ThreadPoolExecutor(len(writers)) as pool:
        list(pool.map(write, writers))


def latency(store: ObjectStore) -> dict[str, dict[str, float]]:
    """Milliseconds of requests of some hundred bytes, median and 90th percentile."""
    content = [os.urandom(300) for _ in range(LATENCY_REQUESTS + 1)]
    requests: dict[str, Callable[[int], object]] = {
        "create": lambda i: store.create(f"latency/create-{i}", content[i]),
        "put": lambda i: store.put("latency/put", content[i]),
        "get": lambda i: store.get("latency/put"),
        "replace": lambda i: store.replace("latency/replace", content[i], content[i + 1]),
        "list of 100": lambda i: store.list("latency"),
    }
    store.put("latency/replace", content[0])
    figures = {}
    for name, request in requests.items():
        times = []
        for i in range(LATENCY_REQUESTS):
            started = time.perf_counter()
            request(i)
            times.append(1000 * (time.perf_counter() - started))
        figures[name] = {"median_ms": median(times), "p90_ms": quantiles(times, n=10)[-1]}
    return figures


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of a race: how many rounds were as they must be, and how long they took."""
    seconds = [row["seconds"] for row in rows]
    sound = sum(row["winners"] == 1 and row["kept"] for row in rows)
    return {"rounds": len(rows), "sound": sound, "median_seconds": median(seconds), "longest_seconds": max(seconds)}


def report(races: dict[str, dict[str, float]], latencies: dict[str, dict[str, float]]) -> str:
    """Both tables."""
    lines = [
        "| race | rounds | exactly one winner, its content kept | median s | longest s |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, row in races.items():
        seconds = f"{row['median_seconds']:.2f} | {row['longest_seconds']:.2f}"
        lines.append(f"| {kind} | {row['rounds']} | {row['sound']} | {seconds} |")
    lines += ["", "| request | median ms | 90 % ms |", "|---|---:|---:|"]
    lines += [f"| {name} | {figure['median_ms']:.1f} | {figure['p90_ms']:.1f} |" for name, figure in latencies.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="folder or URL of the store; what is made there is removed again")
    parser.add_argument("--writers", type=int, default=64, help="writers at once")
    parser.add_argument("--rounds", type=int, default=100, help="objects that they write one after the other")
    parser.add_argument("--server", default="", help="what the server is, for the JSON")
    parser.add_argument("--output", type=Path, help="also write the figures and their circumstances as JSON")
    arguments = parser.parse_args()
    url = f"{arguments.url.rstrip('/')}/benchmark-{uuid.uuid4().hex}"
    store = ObjectStore(url)
    store.probe("probe")
    latencies = latency(store)
    races = {kind: summary(race(url, kind, arguments.writers, arguments.rounds)) for kind in ("create", "replace")}
    for folder in ("latency", *races):
        store.delete_tree(folder)
    print(report(races, latencies))
    if arguments.output:
        circumstances = {
            "server": arguments.server,
            "writers": arguments.writers,
            "writers_per_process": WRITERS_PER_PROCESS,
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "s3fs": version("s3fs"),
        }
        content = {"circumstances": circumstances, "latency": latencies, "races": races}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["sound"] == row["rounds"] for row in races.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
