"""Peak memory of the whole process tree for checkpoints of one width and two depths.

Random Llama checkpoints are written block by block, quantized by ``python -m srr_dist.quantize`` in a process of its
own, and the proportional set sizes of it and all its descendants (Ray's included) are added up while it runs.

    python benchmarks/memory.py --depths 4 24
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCAB = 512


def write_checkpoint(folder: Path, depth: int, hidden: int, intermediate: int) -> Path:
    """A random Llama of that depth, one shard per block, with a byte tokenizer."""
    folder.mkdir()
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    vocabulary = {chr(i + 33): i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    weight_map: dict[str, str] = {}

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(len(weight_map))
        tensors = {
            key: (
                torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            ).bfloat16()
            for key, shape in shapes.items()
        }
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for i in range(depth):
        p = f"model.layers.{i}."
        square = {f"{p}self_attn.{q}_proj.weight": (hidden, hidden) for q in "qkvo"}
        norms = {f"{p}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        wide = {f"{p}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shard(f"block-{i}.safetensors", {**square, **norms, **wide, f"{p}mlp.down_proj.weight": (hidden, intermediate)})
    shard("rest.safetensors", {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def peak_of_tree(command: list[str]) -> tuple[int, int]:
    """Run a command; bytes at the peak of its process tree, and of its largest single process."""
    tree = largest = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = []
            for member in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    sizes.append(member.memory_full_info().pss)
            tree, largest = max(tree, sum(sizes)), max(largest, *sizes, 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read())
    return tree, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="last: more options for quantize")
    arguments = parser.parse_args()
    rows = {}
    print("| blocks | source, MiB | peak of the process tree, MiB | largest process, MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        text.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(20_000)))
        for depth in arguments.depths:
            model = write_checkpoint(Path(scratch, f"model-{depth}"), depth, arguments.hidden, arguments.intermediate)
            command = [sys.executable, "-m", "srr_dist.quantize", "--model", str(model), "--calibration", str(text)]
            command += ["--output", str(Path(scratch, f"out-{depth}")), "--num-samples", "8", "--seq-len", "256"]
            tree, largest = peak_of_tree([*command, *arguments.options])
            source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            rows[depth] = {"source": source, "tree": tree, "largest": largest}
            print(f"| {depth} | {source / 2**20:.0f} | {tree / 2**20:.0f} | {largest / 2**20:.0f} |", flush=True)
    trees = [row["tree"] for row in rows.values()]
    print(f"\ndeepest over shallowest: {trees[-1] / trees[0]:.3f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
