"""The adapter folder: L and R of every quantized linear as one PEFT LoRA adapter whose scale is exactly 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that ``vllm serve --max-lora-rank`` accepts."""


def lora_names(linear: str) -> tuple[str, str]:
    """Names of L (``lora_B``) and R (``lora_A``) of a linear in the adapter file."""
    return f"{_PREFIX}{linear}{_LORA_B}", f"{_PREFIX}{linear}{_LORA_A}"


def adapter_tensors(name: str, L: torch.Tensor, R: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of the linear ``name`` from L bfloat16 [m, r] and R bfloat16 [r, n]; none where r is 0."""
    if L.shape[1] == 0:
        return {}
    name_L, name_R = lora_names(name)
    return {name_L: L.contiguous(), name_R: R.contiguous()}


def adapter_ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Rank of each linear, read from the shapes of the tensors of an adapter file."""
    return {
        name.removeprefix(_PREFIX).removesuffix(_LORA_A): shape[0]
        for name, shape in shapes.items()
        if name.endswith(_LORA_A)
    }


def adapter_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json`` for linears of these ranks (all > 0).

    PEFT multiplies ``L R`` by alpha / r. Both patterns name the same linears with the same numbers, so that the
    factor is 1 for each; they list only the linears below the largest rank, since PEFT tries every pattern on every
    module. Keys are regular expressions, hence the escapes.
    """
    largest = max(ranks.values())
    below = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": below,
        "alpha_pattern": below,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }


def legal_vllm_rank(rank: int) -> int | None:
    """Smallest ``--max-lora-rank`` of vLLM that holds ``rank``; None above 512, where it serves only merged weights."""
    return next((legal for legal in VLLM_MAX_RANKS if legal >= rank), None)
