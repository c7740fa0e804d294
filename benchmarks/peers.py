"""Other people's quantizers on the tokens of ``quality.py``, each in an environment of its own.

Makes the environments (once, below ``--folder``), hands every peer the same model and calibration tokens, and leaves a
folder for each, which ``quality.py --peers`` evaluates beside our recipes, on the same tokens, in one run:

    python benchmarks/peers.py --model M --calibration TEXT --folder /tmp/peers --bits 3
    python benchmarks/quality.py --model M --calibration TEXT --text TEXT --peers /tmp/peers/int3-*
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from quality import calibration_ids

from srr_dist.checkpoint.source import Checkpoint, open_checkpoint

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
PINNED = "torch=="
"""Peers get the torch that we have; what else they need they choose themselves."""


@dataclass(frozen=True)
class Peer:
    """A peer: what to install, and the options of ``peer.py`` with which it runs."""

    packages: tuple[str, ...]
    variants: tuple[tuple[str, ...], ...]


PEERS = {
    "hqq": Peer(("hqq==0.2.8.post1",), (("--group-size", "64"),)),
    "llm-compressor": Peer(("llmcompressor==0.14.0.1",), (("--group-size", "32"), ("--group-size", "64"))),
    "auto-round": Peer(
        ("auto-round==0.16.1",),
        tuple(("--group-size", "32", "--iterations", count) for count in ("0", "50", "200")),
    ),
}


def environment(folder: Path, name: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of a peer's environment, made if it is not there yet."""
    python = folder / f"env-{name}" / "bin" / "python"
    ready = python.parent.parent / "ready"
    if not ready.exists():
        torch = [line for line in CONSTRAINTS.read_text().split() if line.startswith(PINNED)]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *torch, *packages, "transformers"], check=True)
        ready.touch()
    return python


def write_model(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint as a folder with one safetensors file, which every peer reads."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read(checkpoint.tensors).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in checkpoint.companions().items():
        (folder / name).write_bytes(content)


def write_tokens(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Path:
    """The calibration tokens of ``quality.py`` with the same options."""
    ids = calibration_ids(checkpoint, arguments)
    path: Path = arguments.folder / "tokens.safetensors"
    safetensors.torch.save_file({"ids": ids.contiguous()}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration sequences")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True, help="environments, tokens and results")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    model, tokens = arguments.folder / "model", write_tokens(checkpoint, arguments)
    write_model(checkpoint, model)
    for name in arguments.only:
        peer = PEERS[name]
        python = environment(arguments.folder, name, peer.packages)
        for bits in arguments.bits:
            for variant in peer.variants:
                output = arguments.folder / "-".join((f"int{bits}", name, *variant[1::2]))
                if (output / "peer.json").exists():
                    continue
                command = [str(python), str(Path(__file__).with_name("peer.py")), name, "--model", str(model)]
                command += ["--tokens", str(tokens), "--bits", str(bits), *variant, "--output", str(output)]
                subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                print(f"{output}: {(output / 'peer.json').read_text().strip()}", flush=True)


if __name__ == "__main__":
    main()
