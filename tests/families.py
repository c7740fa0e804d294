"""Tiny random checkpoints, one per model family, saved the way a user would save them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
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
