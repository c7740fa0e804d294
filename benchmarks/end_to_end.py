"""The price of the pipeline: calibration through Ray, stages and storage against the same work done plainly.

"Plainly" is one process with the same threads that holds the whole model, runs transformers' own forward pass on the
same tokens and adds ``xᵀ x`` of every shared input in one product per sequence.

    python benchmarks/end_to_end.py --model M --calibration TEXT
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.checkpoint.tokens import calibration_tokens
from srr_dist.config import RunConfig, load_recipe
from srr_dist.pipeline.driver import quantize


def plainly(model: str, calibration: str, num_samples: int, seq_len: int) -> dict[str, float]:
    """Seconds of the forward pass alone, and with the moment products, in this process."""
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(model)
    graph, decoder = build_graph(checkpoint), Decoder(checkpoint, dtype=torch.float32)
    vocab = checkpoint.config.get_text_config().vocab_size
    ids = calibration_tokens(
        calibration, checkpoint.tokenizer(), num_samples=num_samples, seq_len=seq_len, seed=0, vocab_size=vocab
    ).ids
    decoder.load_embedding()
    moments: dict[str, Tensor] = {}
    for block in graph.blocks:
        decoder.load_block(block.index)

    def walk() -> float:
        started = time.perf_counter()
        for row in ids:
            hidden = decoder.embed(row[None])
            for block in graph.blocks:
                hidden = decoder.run_block(block.index, hidden)
        return time.perf_counter() - started

    forward = walk()
    for block in graph.blocks:
        modules = decoder.linear_modules(block.index)
        for name in {linear.input for linear in block.linears}:
            moments[name] = torch.zeros(modules[name].in_features, modules[name].in_features, dtype=torch.float64)

            def add(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                x = args[0][0]
                moments[name] += x.mT @ x

            modules[name].register_forward_pre_hook(add)
    return {"forward": forward, "forward and moments": walk()}


def through_the_pipeline(arguments: argparse.Namespace, workers: int) -> dict[str, float]:
    """Wall seconds of the passes of a real run (start-up and reading excluded), of solving, and of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model": arguments.model,
            "calibration": arguments.calibration,
            "output": folder,
            "num_samples": arguments.num_samples,
            "seq_len": arguments.seq_len,
            "workers": workers,
        } | (load_recipe(arguments.recipe) if arguments.recipe else {})
        started = time.perf_counter()
        outcome = quantize(RunConfig.from_options(options))
        whole = time.perf_counter() - started
        report = json.loads(Path(folder, "report.json").read_text())
        in_workers = sum(sum(stage["seconds"].values()) for stage in report["stages"])
    return {
        "calibration": outcome.seconds["passes"],
        "solving": outcome.seconds["layers"],
        "whole": whole,
        "worker seconds": in_workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--recipe", help="options of the run, which decide how long solving takes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    plain = plainly(arguments.model, arguments.calibration, arguments.num_samples, arguments.seq_len)
    rows = {"plainly, one process": plain}
    print(f"plainly: forward {plain['forward']:.1f} s, with moments {plain['forward and moments']:.1f} s")
    print("\n| workers | calibration, s | over the plain pass | solving, s | whole run, s |\n|---|---|---|---|---|")
    for workers in arguments.workers:
        row = through_the_pipeline(arguments, workers)
        rows[f"{workers} workers"] = row
        ratio = row["calibration"] / plain["forward and moments"]
        print(
            f"| {workers} | {row['calibration']:.1f} | {ratio:.2f} × | {row['solving']:.1f} | {row['whole']:.1f} |",
            flush=True,
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
