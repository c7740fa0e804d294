"""Tiny random checkpoints, one per model family, saved the way a user would save them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 256 + 64
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_HYBRID = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {**_HYBRID, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, {**_HYBRID, "query_pre_attn_scalar": 16}),
    "phi3": (Phi3Config, {}),
    "opt": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 32, "init_std": 0.1}),
}
"""Name -> configuration class and what it sets beside the sizes all families share."""

TEXT = """The river rises in the hills above the town and runs south for forty miles before it meets the sea.
Its upper course is narrow, and the mills that were built along it in the last century are mostly ruins now.
In spring the water is high; in a dry summer one can cross it on foot at the old ford near the church.
The bridge was finished in 1874, was widened twice, and carries the road to the market and the railway station.
"""


def build(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **overrides: Any
) -> Path:
    """Save a random checkpoint of ``family`` with its tokenizer in ``folder`` and return it.

    Weights depend on nothing but the arguments. ``overrides`` are configuration fields.
    """
    config_class, fields = FAMILIES[family]
    config = config_class(**{**_SIZES, **fields, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a missing one
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def build_gguf(path: Path, *, architecture: str = "llama", truncate: int = 0) -> Path:
    """Write a random Llama with several GGML types, laid out as llama.cpp's converter does, and return ``path``.

    ``truncate`` bytes are cut off its end.
    """
    config = LlamaConfig(**{**_SIZES, "vocab_size": len(tokenizer())})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = LlamaForCausalLM(config).state_dict()
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_gguf_tokenizer(writer)
    for name, tensor in state.items():
        gguf_name, kind = _gguf_tensor(name)
        values = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:  # llama.cpp interleaves each head's rotary halves
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(gguf_name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - truncate)
    return path


_GGUF_NAMES: dict[str, tuple[str, GGMLQuantizationType]] = {
    "model.embed_tokens": ("token_embd", GGMLQuantizationType.Q8_0),
    "model.norm": ("output_norm", GGMLQuantizationType.F32),
    "lm_head": ("output", GGMLQuantizationType.BF16),
    "self_attn.q_proj": ("attn_q", GGMLQuantizationType.Q8_0),
    "self_attn.k_proj": ("attn_k", GGMLQuantizationType.Q4_0),
    "self_attn.v_proj": ("attn_v", GGMLQuantizationType.F16),
    "self_attn.o_proj": ("attn_output", GGMLQuantizationType.Q5_0),
    "mlp.gate_proj": ("ffn_gate", GGMLQuantizationType.Q4_1),
    "mlp.up_proj": ("ffn_up", GGMLQuantizationType.Q5_1),
    "mlp.down_proj": ("ffn_down", GGMLQuantizationType.Q4_1),
    "input_layernorm": ("attn_norm", GGMLQuantizationType.F32),
    "post_attention_layernorm": ("ffn_norm", GGMLQuantizationType.F32),
}


def _gguf_tensor(name: str) -> tuple[str, GGMLQuantizationType]:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        gguf_name, kind = _GGUF_NAMES[module]
        return f"{gguf_name}.weight", kind
    _, _, index, leaf = module.split(".", 3)
    gguf_name, kind = _GGUF_NAMES[leaf]
    return f"blk.{index}.{gguf_name}.weight", kind


def _add_gguf_tokenizer(writer: GGUFWriter) -> None:
    bpe = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in (BOS, EOS, PAD) else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)


@cache
def tokenizer(prepend_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``VOCAB_SIZE`` tokens at most, trained on ``TEXT``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    if prepend_bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)
