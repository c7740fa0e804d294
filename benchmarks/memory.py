"""Peak memory of checkpoints of one width and some depths: of the whole process tree, and of a worker beside its plan.

Random Llama checkpoints are written block by block, quantized by ``python -m srr_dist.quantize`` in a process of its
own, and the proportional set sizes of it and all its descendants (Ray's included) are added up while it runs. What the
worker was planned to take, what it took and how long are read from the records that it left.

    python benchmarks/memory.py --depths 4 24
    python benchmarks/memory.py --depths 2 --hidden 8192 --intermediate 28672 --heads 64 --kv-heads 8
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from srr_dist.store import ObjectStore, RunArea

VOCAB = 512
HEAD = """\
| blocks | source, MiB | process tree's peak, MiB | largest process, MiB | planned for a worker | its peak | ratio |
|---|---|---|---|---|---|---|"""


def write_checkpoint(
    folder: Path, depth: int, hidden: int, intermediate: int, heads: int = 0, kv_heads: int = 0
) -> Path:
    """A random Llama of that depth, one shard per block, with a byte tokenizer; without ``heads`` they are 64 wide."""
    folder.mkdir()
    heads = heads or hidden // 64
    kv_heads = kv_heads or heads
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
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
        square = {f"{p}self_attn.{q}_proj.weight": (hidden, hidden) for q in "qo"}
        narrow = {f"{p}self_attn.{k}_proj.weight": (hidden // heads * kv_heads, hidden) for k in "kv"}
        norms: dict[str, tuple[int, ...]] = {
            f"{p}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")
        }
        wide = {f"{p}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        down = {f"{p}mlp.down_proj.weight": (hidden, intermediate)}
        shard(f"block-{i}.safetensors", norms | square | narrow | wide | down)
    shard("rest.safetensors", {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def peak_of_tree(command: list[str]) -> tuple[int, int]:
    """Run a command; bytes at the peak of its process tree, and of its largest single process."""
    tree = largest = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            started, sizes = time.perf_counter(), []
            for member in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    sizes.append(member.memory_full_info().pss)
            tree, largest = max(tree, sum(sizes)), max(largest, *sizes, 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                # To look through a large process takes long, and holds it up.
                process.wait(timeout=max(0.2, 20 * (time.perf_counter() - started)))
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read())
    return tree, largest


def of_the_worker(output: Path) -> dict[str, Any]:
    """Bytes planned for the worker and at its peak, seconds by kind of work, and where: from the records of a run."""
    store = ObjectStore(str(output))
    records = [record for record in RunArea(store, RunArea.find(store)[0]).records().values() if record.stage]
    seconds = Counter[str]()
    for record in records:
        seconds.update(record.seconds)
    return {
        "planned": max(record.stage["planned_memory"]["host"] for record in records),
        "peak": max(record.stage["peak_memory"]["host"] for record in records),
        "seconds": dict(seconds),
        "versions": records[0].versions,
    }


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=0, help="default: heads of 64 columns")
    parser.add_argument("--kv-heads", type=int, default=0, help="default: as many")
    parser.add_argument("--scratch", type=Path, help="folder for models and results; default: that of temporary files")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="last: more options for quantize")
    arguments = parser.parse_args()
    shape = (arguments.hidden, arguments.intermediate, arguments.heads, arguments.kv_heads)
    rows: dict[int, dict[str, Any]] = {}
    print(HEAD)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        text = Path(scratch, "text.txt")
        text.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(20_000)))
        for depth in arguments.depths:
            model = write_checkpoint(Path(scratch, f"model-{depth}"), depth, *shape)
            command = [sys.executable, "-m", "srr_dist.quantize", "--model", str(model), "--calibration", str(text)]
            output = Path(scratch, f"out-{depth}")
            command += ["--output", str(output), "--num-samples", "8", "--seq-len", "256"]
            tree, largest = peak_of_tree([*command, *arguments.options])
            worker = of_the_worker(output)
            sizes = [sum(path.stat().st_size for path in model.glob("*.safetensors")), tree, largest]
            sizes += [worker["planned"], worker["peak"]]
            rows[depth] = dict(zip(("source", "tree", "largest"), sizes, strict=False)) | worker
            cells = " | ".join(f"{size / 2**20:.0f}" for size in sizes)
            print(f"| {depth} | {cells} | {worker['planned'] / worker['peak']:.3f} |", flush=True)
    trees = [row["tree"] for row in rows.values()]
    print(f"\ndeepest over shallowest: {trees[-1] / trees[0]:.3f}")
    for depth, row in rows.items():
        print(f"{depth} blocks: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in row["seconds"].items()))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"shape": shape, "options": arguments.options, "rows": rows}
        figures |= {"processor": processor(), "date": str(date.today())}
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
