"""Linears of the grid ``nf4``, stored as bitsandbytes stores a weight that it has quantized to 4 bits itself.

In the place of the weight are two codes to a byte; beside it lie one scale per block (``absmax``, float32), the table
(``quant_map``, float32), and the rest of bitsandbytes' ``QuantState`` as the bytes of a JSON text. Blocks run through
the weight row after row, and groups that fill rows are such blocks. Codes stay packed in transformers: bitsandbytes
expands each layer where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from srr_dist.solve.grids import dequantize
from srr_dist.solve.normalfloat import VALUES, values

WEIGHT, ABSMAX, TABLE, STATE = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4",
)  # fmt: skip


def nf4_tensors(name: str, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of the linear ``name`` from codes int8 [m, n], 0 to 15, and scale bfloat16 [m, groups]."""
    m, n = codes.shape
    pairs = codes.to(torch.uint8).view(-1, 2)
    return {
        name + WEIGHT: (pairs[:, :1] << 4) | pairs[:, 1:],  # the first of two codes in the high bits
        name + ABSMAX: scale.float().flatten(),
        name + TABLE: torch.tensor(VALUES),
        name + STATE: _state(m, n, n // scale.shape[1]),
    }


def nf4_weight(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight, bfloat16 [m, n], that bitsandbytes computes with, from a shard's tensors.

    It multiplies value and scale in float32 and rounds to the type that it computes in, which is bfloat16.
    """
    packed, absmax = tensors[name + WEIGHT], tensors[name + ABSMAX]
    m, n = json.loads(bytes(tensors[name + STATE].tolist()))["shape"]
    codes = torch.cat((packed >> 4, packed & 15), dim=1).view(m, n)
    return dequantize(values(codes), absmax.bfloat16().view(m, -1), torch.bfloat16)


def nf4_shapes(name: str, m: int, n: int, group_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors of the linear ``name``."""
    return {
        name + WEIGHT: (m * n // 2, 1),
        name + ABSMAX: (m * n // group_size,),
        name + TABLE: (len(VALUES),),
        name + STATE: tuple(_state(m, n, group_size).shape),
    }


def nf4_config(ignore: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json; ``ignore`` lists the modules whose matrices are stored dense."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": sorted(ignore),
    }


def _state(m: int, n: int, group_size: int) -> torch.Tensor:
    """What bitsandbytes needs to know beside the tensors: the UTF-8 bytes of a JSON text, uint8."""
    fields = {"quant_type": "nf4", "blocksize": group_size, "dtype": "bfloat16", "shape": [m, n]}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
