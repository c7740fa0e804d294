"""Equal bytes, whatever happens: one run left alone, one killed half way and repeated, one with two workers.

The driver and all its workers are killed with SIGKILL as soon as half of the blocks are committed; then the same
command runs again. Printed are the hashes of the three manifests, which name every file's own hash.

    python benchmarks/identical.py --model M --calibration TEXT
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil


def command(arguments: argparse.Namespace, output: Path, *more: str) -> list[str]:
    given = ["--model", arguments.model, "--calibration", arguments.calibration, "--output", str(output)]
    size = ["--num-samples", str(arguments.num_samples), "--seq-len", str(arguments.seq_len)]
    return [sys.executable, "-m", "srr_dist.quantize", *given, *size, *more]


def committed(output: Path) -> dict[str, bytes]:
    """Records in an output: file name -> content."""
    return {path.name: path.read_bytes() for path in output.glob(".srr/*/blocks/*.json")}


def kill_half_way(run: list[str], output: Path) -> dict[str, bytes]:
    """Start a run and kill its whole process tree once half of its units are committed; the records it left."""
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
        units = 0
        while process.poll() is None and (not units or len(committed(output)) < units / 2):
            documents = list(output.glob(".srr/*/run.json"))
            units = len(json.loads(documents[0].read_text())["units"]) if documents else 0
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        tree = psutil.Process(process.pid)
        for member in [*tree.children(recursive=True), tree]:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGKILL)
    return committed(output)


def digest(output: Path) -> str:
    return hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {name: Path(scratch, name) for name in ("undisturbed", "killed", "two-workers")}
        subprocess.run(command(arguments, outputs["undisturbed"]), check=True, stderr=subprocess.DEVNULL)
        run = command(arguments, outputs["killed"])
        before = kill_half_way(run, outputs["killed"])
        subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
        redone = [name for name, record in before.items() if committed(outputs["killed"]).get(name) != record]
        subprocess.run(
            command(arguments, outputs["two-workers"], "--workers", "2"), check=True, stderr=subprocess.DEVNULL
        )
        print(f"killed with {len(before)} units committed, {len(redone)} of them redone")
        for name, output in outputs.items():
            print(f"{name:<12} {digest(output)}")
        if redone or len({digest(output) for output in outputs.values()}) > 1:
            raise SystemExit("the outputs differ")


if __name__ == "__main__":
    main()
