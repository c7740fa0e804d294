"""Quality of every method at the same calibration and evaluation tokens: KL, perplexity, bits per weight.

Statistics come from the original model and blocks do not depend on each other's quantization, so one walk over the
blocks calibrates once, solves every recipe, and carries one stream of evaluation hidden states per recipe. The solver,
the moments and the comparison are the library's own; what differs from ``srr_dist.quantize`` is only that nothing is
stored.

    python benchmarks/quality.py --model M --calibration TEXT --text TEXT --bits 2 3 4 --output results/quality.json
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from itertools import product
from pathlib import Path

import torch
from rows import (
    USUAL_SHRINKAGE,
    Original,
    PeerRow,
    PrefixRow,
    Row,
    SolvedRow,
    calibrate,
    columns,
    recipes,
    score,
    show,
)
from torch import Tensor

from srr_dist.calibration import first_token_weight
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.rotation import rotated
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.checkpoint.tokens import calibration_tokens, evaluation_tokens


def calibration_ids(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Tensor:
    """The calibration tokens ``[N, T]`` that the options ask for."""
    return calibration_tokens(
        arguments.calibration,
        checkpoint.tokenizer(),
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        vocab_size=checkpoint.config.get_text_config().vocab_size,
    ).ids


def run(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    checkpoint = open_checkpoint(arguments.model)
    if arguments.incoherence:
        checkpoint = rotated(checkpoint, arguments.seed)
    graph = build_graph(checkpoint)
    text = evaluation_tokens(
        arguments.text,
        checkpoint.tokenizer(),
        num_samples=arguments.eval_samples,
        seq_len=arguments.eval_len,
        vocab_size=checkpoint.config.get_text_config().vocab_size,
    )
    decoder, other = (Decoder(checkpoint, dtype=torch.float32) for _ in range(2))
    decoder.load_embedding()
    hidden = [decoder.embed(row[None]) for row in calibration_ids(checkpoint, arguments)]
    original = [decoder.embed(row[None]) for row in text.ids]
    decoder.drop_rest()
    chosen = {
        recipe.name: recipe
        for shape in product(
            arguments.bits,
            arguments.grid,
            arguments.group_size,
            arguments.rank,
            arguments.shrinkage,
            [first_token_weight(share, arguments.seq_len) for share in arguments.first_token_share],
        )
        for recipe in recipes(*shape, arguments.tune_steps, arguments.tune_batch)
        if any(re.search(pattern, recipe.name) for pattern in arguments.only)
    }
    rows: list[Row] = [SolvedRow(recipe, original) for recipe in chosen.values()]
    if arguments.prefix:
        rows += [PrefixRow(recipe, original, hidden) for recipe in chosen.values()]
    rows += [PeerRow(folder, original) for folder in arguments.peers]
    kinds = {recipe.kind for recipe in chosen.values()}
    for block in graph.blocks:
        started = time.perf_counter()
        weights = checkpoint.read(block.tensors)
        decoder.load_block(block.index, weights)
        inputs = hidden
        hidden, metrics = calibrate(decoder, block, inputs, kinds)
        original = [decoder.run_block(block.index, h) for h in original]
        decoder.drop_block(block.index)
        held = Original(block, weights, metrics, inputs, hidden)
        for row in rows:
            row.advance(other, held)
        print(f"block {block.index} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    score(decoder, original, text.ids, rows)
    return [row.figures(arguments.kl_samples) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--incoherence", action="store_true", help="rotate the weights first")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration sequences")
    parser.add_argument("--eval-samples", type=int, default=8, help="sequences for every figure")
    parser.add_argument("--eval-len", type=int, default=1024, help="tokens of each of them")
    parser.add_argument("--kl-samples", type=int, default=4, help="KL over the first of them as well")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--grid", nargs="+", default=["mxint"])
    parser.add_argument("--group-size", type=int, nargs="+", default=[32])
    parser.add_argument("--rank", type=int, nargs="+", default=[32])
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[USUAL_SHRINKAGE])
    parser.add_argument(
        "--first-token-share",
        type=float,
        nargs="+",
        default=[0.0],
        help="of its sequence that a first token counts for",
    )
    parser.add_argument("--tune-steps", type=int, nargs="*", default=[], help="a row more for each number of steps")
    parser.add_argument("--tune-batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--only", nargs="*", default=[""], help="recipes whose name matches one of these expressions")
    parser.add_argument("--prefix", action="store_true", help="each recipe once more, on inputs from quantized blocks")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="folders that peer.py wrote")
    parser.add_argument("--output", type=Path, help="JSON with the figures, the versions and the machine")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = run(arguments)
    more = {
        "top-1 agreement": ("top1_agreement", ".3f"),
        "mean relative objective": ("mean_relative_objective", ".4f"),
        "seconds": ("seconds", ".0f"),
    }
    show(rows, columns(arguments.kl_samples) | more, arguments)


if __name__ == "__main__":
    main()
