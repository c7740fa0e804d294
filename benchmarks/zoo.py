"""What shared statistics save: a second recipe of a model, with the moments of the first and without any.

Three runs with start-up: a first recipe that keeps its moments, a second that takes them, and the second without them.
The last two must end with the same manifest.

    python benchmarks/zoo.py --model M --calibration TEXT
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST = ["--bits=3", "--split=criterion"]
SECOND = ["--bits=4", "--split=criterion"]


def run(arguments: argparse.Namespace, output: Path, *recipe: str) -> dict[str, float]:
    """Seconds of a whole run, and of its workers by phase."""
    given = [f"--model={arguments.model}", f"--calibration={arguments.calibration}", f"--output={output}"]
    size = [f"--num-samples={arguments.num_samples}", f"--seq-len={arguments.seq_len}"]
    started = time.perf_counter()
    command = [sys.executable, "-m", "srr_dist.quantize", *given, *size, *recipe]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - started
    stages = json.loads((output / "report.json").read_text())["stages"]
    phases = {name: sum(stage["seconds"][name] for stage in stages) for name in stages[0]["seconds"]}
    return {"whole": whole} | phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keep = f"--statistics={folder / 'statistics'}"
        rows = {
            "first, keeps its moments": run(arguments, folder / "first", *FIRST, keep),
            "second, takes them": run(arguments, folder / "with", *SECOND, keep),
            "second, without": run(arguments, folder / "without", *SECOND),
        }
        kept = sum(file.stat().st_size for file in (folder / "statistics").rglob("*.safetensors"))
        manifests = [(folder / name / "manifest.json").read_bytes() for name in ("with", "without")]
    phases = list(rows["second, without"])
    print("| recipe | " + " | ".join(f"{phase}, s" for phase in phases) + " |\n|---" + "|---" * len(phases) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[phase]:.1f}" for phase in phases) + " |")
    ratio = rows["second, takes them"]["whole"] / rows["second, without"]["whole"]
    print(f"\nthe second recipe takes {ratio:.2f} × the time without; {kept / 2**20:.0f} MiB of moments are kept")
    if manifests[0] != manifests[1]:
        raise SystemExit("the outputs differ")


if __name__ == "__main__":
    main()
