"""Committed runs of small random models, as the exports find them: random codes, scales and adapters, real records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from srr_dist.export.adapter import adapter_tensors
from srr_dist.export.assemble import Output
from srr_dist.export.base import linear_tensors
from srr_dist.export.nf4 import nf4_tensors
from srr_dist.store.objects import ObjectStore
from srr_dist.store.records import REST, BlockRecord, RunArea

FINGERPRINT = "ab" * 32


@dataclass
class Linear:
    """What stands for one linear: codes [m, n], scale and zero [m, groups], factors L [m, r] and R [r, n]."""

    codes: torch.Tensor
    scale: torch.Tensor
    L: torch.Tensor
    R: torch.Tensor
    zero: torch.Tensor | None = None


@dataclass
class CommittedRun:
    """A run whose units are all committed in ``store`` and not yet assembled."""

    store: ObjectStore
    output: Output
    model: PreTrainedModel
    linears: dict[str, Linear] = field(default_factory=dict)
    records: dict[str, BlockRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How the random linears are made; ``rank`` says each linear's, None leaves it unquantized."""

    bits: int = 3
    group_size: int = 32
    power_of_two: bool = True
    rank: Callable[[str], int | None] = lambda name: 4
    symmetric: bool = True
    codebook: str | None = None
    others: tuple[tuple[str, int], ...] = ()
    """Endings of names whose linears have other bits."""

    def bits_of(self, name: str) -> int:
        """Of a linear."""
        return next((bits for ending, bits in self.others if name.endswith(ending)), self.bits)


def llama_config(**options: object) -> PreTrainedConfig:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=128, **{**sizes, **heads, **options})


def random_linear(weight: torch.Tensor, rank: int, recipe: Recipe, bits: int) -> Linear:
    m, n = weight.shape
    limit = 1 << bits - 1
    codes = torch.randint(-limit, limit, (m, n), dtype=torch.int8)
    if recipe.codebook:
        codes += limit
    scale = torch.rand(m, 1 if recipe.group_size == -1 else n // recipe.group_size) / 50 + 1e-3
    if recipe.power_of_two:
        scale = torch.exp2(scale.log2().floor())
    else:
        scale[::2].neg_()
    L, R = torch.randn(m, rank) / 20, torch.randn(rank, n) / 20
    if recipe.symmetric:
        return Linear(codes, scale.bfloat16(), L.bfloat16(), R.bfloat16())
    zero = torch.randint(-limit, limit, scale.shape, dtype=torch.int16)
    codes = codes - zero.repeat_interleave(n // scale.shape[1], dim=1)
    return Linear(codes, scale.bfloat16(), L.bfloat16(), R.bfloat16(), zero)


def commit_run(
    store: ObjectStore, scratch: Path, config: PreTrainedConfig, recipe: Recipe | None = None
) -> CommittedRun:
    """Make a random model of ``config`` in its own dtype and commit a run that quantizes its blocks' linears."""
    recipe = recipe or Recipe()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    blocks = [(name, block) for name, block in model.named_modules() if name.rpartition(".layers.")[2].isdigit()]
    config.architectures = [type(model).__name__]
    companions = {"config.json": config.to_json_string(use_diff=False).encode(), "tokenizer_config.json": b"{}\n"}
    output = Output(
        len(blocks),
        recipe.group_size,
        config.dtype,
        companions,
        {"srr_dist": "0"},
        recipe.symmetric,
        recipe.codebook,
    )
    run = CommittedRun(store, output, model)
    area = RunArea(store, FINGERPRINT)
    rest = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    if config.tie_word_embeddings:
        del rest["lm_head.weight"]
    for index, (prefix, block) in enumerate(blocks):
        base = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
        adapter: dict[str, torch.Tensor] = {}
        layers = []
        for suffix, module in block.named_modules():
            name = f"{prefix}.{suffix}"
            if not isinstance(module, torch.nn.Linear) or (rank := recipe.rank(name)) is None:
                continue
            bits = recipe.bits_of(name)
            linear = run.linears[name] = random_linear(base.pop(f"{name}.weight"), rank, recipe, bits)
            if recipe.codebook:
                base |= nf4_tensors(name, linear.codes, linear.scale)
            else:
                base |= linear_tensors(name, linear.codes, linear.scale, bits, linear.zero)
            adapter |= adapter_tensors(name, linear.L, linear.R)
            shape, values = list(linear.codes.shape), [1 / (i + 1) for i in range(rank)]
            chosen = {"k": rank // 2, "rank": rank, "bits": bits, "singular_values": values}
            layers.append({"name": name, "shape": shape, **chosen})
        _commit(area, scratch, f"{index:05d}", {"base": base, "adapter": adapter}, layers)
    _commit(area, scratch, REST, {"base": rest}, [])
    run.records = area.records()
    return run


def _commit(area: RunArea, scratch: Path, unit: str, files: dict[str, dict[str, torch.Tensor]], layers: list) -> None:
    entries = {}
    for kind, tensors in files.items():
        if tensors:
            local = scratch / f"{kind}.safetensors"
            contiguous = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, local, metadata={"format": "pt"})
            entries[kind] = area.store.upload(local, area.attempt_path(unit, "a", local.name))
    area.commit(BlockRecord(unit, 1, FINGERPRINT, "a", entries, layers, "00" * 32, {}, {}, "CPU", 0.0, {}))
