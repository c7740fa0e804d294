"""What durability costs: the share of a run that goes into storage, and the seconds of resuming a finished run.

The same run is made by ``python -m srr_dist.quantize``, each time with a Ray of its own: into ``--storage`` (a folder,
unless told otherwise), written through to the disk; and into a folder in memory, where nothing waits for a disk. Their
difference is what the disk or the server adds. What remains of durability in both, serializing and hashing, is in the
seconds that the records give as "write": these count as a whole, so that they and the difference are bounds from above
and below. Runs alternate, and the smallest time of each kind counts; on a busy machine the difference says nothing.

    python benchmarks/durability.py --model demo/SmolLM2-135M-Instruct.Q4_1.gguf --calibration demo/text-calibration.txt
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from srr_dist.store import ObjectStore, RunArea

MEMORY = Path("/dev/shm")


def seconds_of(command: list[str], output: str) -> float:
    """Wall seconds of one run into ``output``."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = time.perf_counter()
    done = subprocess.run([*command, "--output", output], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds


def recorded_seconds(output: str) -> dict[str, float]:
    """Seconds that the records of a run give for each of its steps, added up over blocks."""
    store = ObjectStore(output)
    total: dict[str, float] = {}
    for fingerprint in RunArea.find(store):
        for record in RunArea(store, fingerprint).records().values():
            for step, seconds in record.seconds.items():
                total[step] = total.get(step, 0.0) + seconds
    return total


def measure(command: list[str], storage: str, repeats: int) -> dict[str, Any]:
    """Times of runs into ``storage`` and into memory, in turn."""
    times: dict[str, list[float]] = {"storage": [], "memory": [], "finished again": []}
    steps: dict[str, float] = {}
    for repeat in range(repeats):
        output = f"{storage}/durability-{os.getpid()}-{repeat}"
        times["storage"].append(seconds_of(command, output))
        times["finished again"].append(seconds_of(command, output))
        steps = recorded_seconds(output)
        store = ObjectStore(output)
        for path in store.list():
            store.delete(path)
        with tempfile.TemporaryDirectory(prefix="durability-", dir=MEMORY) as folder:
            times["memory"].append(seconds_of(command, f"{folder}/out"))
    return {"seconds": times, "recorded": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--storage", help="folder or URL to store into (default: a folder under the system's for files)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options for quantize, at the end")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "srr_dist.quantize", "--model", arguments.model]
    command += ["--calibration", arguments.calibration, *arguments.options]
    scratch = None if arguments.storage else tempfile.mkdtemp(prefix="durability-")
    try:
        measured = measure(command, arguments.storage or str(scratch), arguments.repeats)
    finally:
        if scratch:
            shutil.rmtree(scratch)
    best = {kind: min(seconds) for kind, seconds in measured["seconds"].items()}
    overhead = best["storage"] - best["memory"]
    figures = measured | {
        "overhead_seconds": overhead,
        "overhead_percent": 100 * overhead / best["storage"],
        "written_percent": 100 * measured["recorded"].get("write", 0.0) / best["storage"],
        "resume_of_finished_seconds": best["finished again"],
        "command": command[3:],
        "storage": arguments.storage or "folder",
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
    }
    print("| run | seconds, smallest | all |\n|---|---|---|")
    for kind, seconds in measured["seconds"].items():
        print(f"| {kind} | {best[kind]:.1f} | {', '.join(f'{value:.1f}' for value in seconds)} |")
    print(f"\noverhead of storage: {overhead:.1f} s, {figures['overhead_percent']:.1f} % of the run")
    print(f"recorded as writing: {figures['written_percent']:.1f} % of the run")
    print("recorded by blocks: " + ", ".join(f"{step} {value:.1f} s" for step, value in measured["recorded"].items()))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
