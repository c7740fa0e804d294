"""Random SIGKILLs of workers, drivers and whole nodes; every output must come out the same and nothing is done twice.

A Ray cluster of its own (the driver's node and ``--nodes`` of one CPU each) quantizes a small random model into one
fresh output after another. At random instants a process is killed: a stage's worker, the driver (the same command then
goes on, with another number of workers) or a node's raylet (another node takes its place). Counted are outputs whose
manifest differs from that of an undisturbed run, or that do not verify; units whose record changed after it was there;
and runs that stopped getting on.

    python benchmarks/kills.py --kills 200 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from memory import write_checkpoint
from ray.cluster_utils import Cluster

from srr_dist.export import verify_output

VICTIMS = {"worker": 5, "driver": 3, "raylet": 2}
HANG_SECONDS = 600.0
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
NODE: dict[str, Any] = {"object_store_memory": 100 * 10**6}


class Trial:
    """One cluster, one model, and what was counted."""

    def __init__(self, folder: Path, nodes: int, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.model = write_checkpoint(folder / "model", depth=6, hidden=128, intermediate=256)
        self.text = folder / "text.txt"
        self.text.write_text("\n".join("".join(self.chance.choices("abcdefgh", k=80)) for _ in range(200)))
        os.environ.update(ENVIRONMENT)
        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, **NODE}
        )
        for _ in range(nodes):
            self.cluster.add_node(num_cpus=1, **NODE)
        self.nodes = nodes
        self.kills: Counter[str] = Counter()
        self.exits: Counter[int] = Counter()
        self.corrupted: list[str] = []
        self.redone: list[str] = []
        self.hangs = 0

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        options = {
            "model": self.model,
            "calibration": self.text,
            "output": output,
            "num-samples": 8,
            "seq-len": 64,
            "rank": 8,
            "host-memory": "4GiB",
            "blocks-per-stage": self.chance.choice([1, 2, 3]),
            "workers": self.chance.randint(1, self.nodes),
            "patience": 2,
            "watchdog": 30,
            "ray-address": self.cluster.address,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "srr_dist.quantize", *flags], stdout=log, stderr=log)

    def stages(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.worker_nodes:
            for child in psutil.Process(raylet(node)).children(recursive=True):
                try:
                    found += [child] if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Stage") else []
                except psutil.Error:
                    continue
        return found

    def kill(self, driver: subprocess.Popen[bytes]) -> str | None:
        """Kill something; what it was, or None where there is none of it now."""
        victim = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        if victim == "driver":
            driver.kill()
            driver.wait()
        elif victim == "worker":
            stages = self.stages()
            if not stages:
                return None
            self.chance.choice(stages).kill()
        else:
            node = self.chance.choice(sorted(self.cluster.worker_nodes, key=raylet))
            os.kill(raylet(node), 9)
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=1, **NODE)
        return victim

    def disturb(self, output: Path, typical: float, most: int) -> int:
        """Make one output, with at most that many kills; returns how many there were."""
        kills, seen, driver, last = 0, dict[str, bytes](), self.start(output), time.monotonic()
        next_kill = last + self.chance.uniform(0, 0.6 * typical)
        while True:
            if (code := driver.poll()) is not None:
                self.exits[code] += 1
                if code == 0:
                    break
                driver, last = self.start(output), time.monotonic()
            elif kills < most and time.monotonic() >= next_kill:
                seen |= {name: data for name, data in records(output).items() if name not in seen}
                if victim := self.kill(driver):
                    kills, last = kills + 1, time.monotonic()
                    self.kills[victim] += 1
                next_kill = time.monotonic() + self.chance.uniform(0, 0.6 * typical)
            elif time.monotonic() - last > HANG_SECONDS:
                self.hangs += 1
                driver.kill()
                driver.wait()
            time.sleep(0.02)
        found = records(output)
        self.redone += [f"{output.name} {name}" for name, data in seen.items() if found.get(name) != data]
        self.redone += [f"{output.name} {name}" for name in found if ".g" in name]
        return kills


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def records(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob(".srr/*/blocks/*.json")}


def digest(output: Path) -> str:
    return hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--kills-per-output", type=int, default=10)
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), arguments.nodes, arguments.seed)
        begun = time.monotonic()
        undisturbed = Path(scratch, "undisturbed")
        trial.disturb(undisturbed, 0.0, 0)
        typical = time.monotonic() - begun
        outputs, killed, begun = 0, 0, time.monotonic()
        while killed < arguments.kills:
            output = Path(scratch, f"out-{outputs:04d}")
            killed += trial.disturb(output, typical, min(arguments.kills_per_output, arguments.kills - killed))
            outputs += 1
            if digest(output) != digest(undisturbed) or verify_output(str(output)):
                trial.corrupted.append(output.name)
            figures = {
                "kills": dict(trial.kills),
                "outputs": outputs,
                "corrupted": trial.corrupted,
                "redone": trial.redone,
                "hangs": trial.hangs,
                "exit_codes": {str(code): count for code, count in sorted(trial.exits.items())},
                "manifest_sha256": digest(undisturbed),
                "undisturbed_seconds": round(typical, 1),
                "seconds_per_kill": round((time.monotonic() - begun) / max(killed, 1), 1),
                "seed": arguments.seed,
            }
            print(json.dumps(figures), file=sys.stderr, flush=True)
            if arguments.output is not None:  # after every output, so that a run that is stopped has said something
                arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
        trial.cluster.shutdown()
    print(json.dumps(figures))
    if trial.corrupted or trial.redone or trial.hangs:
        raise SystemExit("a promise was broken")


if __name__ == "__main__":
    main()
