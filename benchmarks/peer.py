"""One peer's quantization of a model, run in the environment that ``peers.py`` makes for it.

Every peer gets the same calibration tokens and threads, and the model in the type that suits it, and leaves what its
linear layers have become, dequantized: ``weights.safetensors`` by the names of the source, and ``peer.json`` with bits
per weight, seconds and peak memory. That codes are of the width that was asked for is counted from the weights.

    python benchmarks/peer.py auto-round --model FOLDER --tokens tokens.safetensors --bits 3 --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SCALE_BITS = 16


def auto_round(model: Any, tokenizer: Any, ids: Tensor, arguments: argparse.Namespace) -> Any:
    """AutoRound: rounding and clips by signed gradients against each block's output."""
    from auto_round import AutoRound

    tuner = AutoRound(
        model,
        tokenizer,
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        iters=arguments.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[row.unsqueeze(0) for row in ids],
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
    )
    quantized, _ = tuner.quantize()
    return quantized


def llm_compressor(model: Any, tokenizer: Any, ids: Tensor, arguments: argparse.Namespace) -> Any:
    """llm-compressor's GPTQ."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme = {"num_bits": arguments.bits, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": scheme | {"group_size": arguments.group_size}}
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    return model


def hqq(model: Any, tokenizer: Any, ids: Tensor, arguments: argparse.Namespace) -> Any:
    """HQQ: zero points by half-quadratic splitting, without data."""
    from hqq.core.quantize import Quantizer

    for module in linears(model).values():
        codes, meta = Quantizer.quantize(
            module.weight.data,
            nbits=arguments.bits,
            group_size=arguments.group_size,
            optimize=True,
            axis=1,
            compute_dtype=torch.float32,
            device="cpu",
        )
        module.weight.data = Quantizer.dequantize(codes, meta).reshape(module.weight.shape).float()
    return model


PEERS: dict[str, tuple[Callable[..., Any], int, torch.dtype]] = {
    "auto-round": (auto_round, SCALE_BITS, torch.bfloat16),
    "llm-compressor": (llm_compressor, SCALE_BITS, torch.float32),
    "hqq": (hqq, 2 * SCALE_BITS, torch.float32),
}
"""By name: what quantizes, the bits stored for each group beside its codes, and the type of the model it is given.

AutoRound trains in the model's type, and bfloat16 is twice as fast on processors that multiply it.
"""


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def most_values(weight: Tensor, group_size: int) -> int:
    """The largest number of different values in any group of a dequantized weight."""
    ordered = weight.float().reshape(-1, group_size).sort(dim=1).values
    steps = ordered.diff(dim=1) > 1e-5 * ordered.abs().amax(1, keepdim=True)
    return int(steps.sum(1).max()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", required=True, help="a safetensors folder")
    parser.add_argument("--tokens", required=True, help="safetensors file with the calibration tokens, ids [N, T]")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    quantize, group_bits, dtype = PEERS[arguments.peer]
    ids = safetensors.torch.load_file(arguments.tokens)["ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    names = list(linears(model))
    started = time.perf_counter()
    model = quantize(model, tokenizer, ids, arguments)
    seconds = time.perf_counter() - started
    state = model.state_dict()
    weights = {f"{name}.weight": state[f"{name}.weight"].contiguous() for name in names}
    values = max(most_values(weight, arguments.group_size) for weight in weights.values())
    if values > 2**arguments.bits:
        raise SystemExit(
            f"{arguments.peer}: {values} values in one group, {arguments.bits} bits have {2**arguments.bits}"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, arguments.output / "weights.safetensors")
    steps = f", {arguments.iterations} iterations" if arguments.peer == "auto-round" else ""
    figures = {
        "name": f"int{arguments.bits} {arguments.peer}, groups of {arguments.group_size}{steps}",
        "bits_per_weight": arguments.bits + group_bits / arguments.group_size,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (arguments.output / "peer.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
