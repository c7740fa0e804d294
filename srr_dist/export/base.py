"""The base folder: packed linears, and the configuration and index that let transformers and vLLM read them.

A quantized linear with integer codes is stored as compressed-tensors ``pack-quantized`` does it: ``weight_packed``
(int32), ``weight_scale`` (bfloat16), ``weight_shape`` (int64), and under a grid with zero points ``weight_zero_point``
(int32); one of the grid ``nf4`` as in :mod:`srr_dist.export.nf4`. Every decoder block is one shard; one more, the last,
holds the tensors outside the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from srr_dist.export.nf4 import ABSMAX, STATE, TABLE, nf4_weight
from srr_dist.export.packing import pack, packed_width, unpack
from srr_dist.solve.grids import PER_CHANNEL, dequantize

INDEX_NAME = "model.safetensors.index.json"
PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"


def linear_tensors(
    name: str, codes: torch.Tensor, scale: torch.Tensor, bits: int, zero: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The stored tensors of the linear ``name``.

    Args:
        name: full module name.
        codes: integers [m, n], without zero points.
        scale: bfloat16 [m, groups].
        bits: width of a stored code.
        zero: integers [m, groups], added to the codes that are stored.
    """
    tensors = {
        name + SCALE: scale.to(torch.bfloat16).contiguous(),
        name + SHAPE: torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        codes = codes + _by_input(zero, codes)
        tensors[name + ZERO] = pack(zero.mT, bits).mT.contiguous()  # along the outputs
    return {name + PACKED: pack(codes, bits), **tensors}


def dequantized(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The dense weight [m, n] that transformers holds after loading, from codes [m, n] and scale bfloat16 [m, groups].

    compressed-tensors multiplies in the scale's own type and transformers casts the product, so the value is
    ``bfloat16(code · scale)`` whatever ``dtype`` the model is loaded in. It equals ``code · scale`` exactly where
    scales are powers of two.
    """
    return dequantize(codes, scale, torch.bfloat16).to(dtype)


def dense_tensors(tensors: Mapping[str, torch.Tensor], bits: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """A shard's tensors under their original names: packed linears :func:`dequantized`, all others as they are.

    ``bits``: linear -> width of its codes; of packed integers alone it is asked for.
    """
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith(PACKED):
            module = name.removesuffix(PACKED)
            (m, n), width = tensors[module + SHAPE].tolist(), bits[module]
            codes = unpack(tensor, width, n)
            if module + ZERO in tensors:
                codes = codes.to(torch.int16) - _by_input(unpack(tensors[module + ZERO].mT, width, m).mT, codes)
            dense[module + ".weight"] = dequantized(codes, tensors[module + SCALE])
        elif (module := name.removesuffix(".weight")) + STATE in tensors and name != module:
            dense[name] = nf4_weight(module, tensors)
        elif not name.endswith((SCALE, SHAPE, ZERO, ABSMAX, TABLE, STATE)):
            dense[name] = tensor
    return dense


def quantized_linears(tensors: Iterable[str]) -> list[str]:
    """The linears that are stored packed, from the names of a shard's tensors."""
    return [name.removesuffix(mark) for name in tensors for mark in (PACKED, STATE) if name.endswith(mark)]


def _by_input(zero: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Zero points of groups, repeated for each of their codes."""
    return zero.repeat_interleave(codes.shape[1] // zero.shape[1], dim=1)


def quantization_config(
    bits: Mapping[str, int], group_size: int, ignore: Iterable[str], *, symmetric: bool = True
) -> dict[str, Any]:
    """``quantization_config`` of config.json; ``group_size`` −1 means one scale per output channel.

    ``bits`` are those of every linear. Of one width, they are the group of all ``Linear`` modules; each of several
    widths has a group that names its modules. ``dequantize`` makes transformers expand the weights while loading,
    without which PEFT finds no ``weight`` to attach an adapter to; transformers 5 does so by the first group alone, so
    that several widths are expanded by a call after loading. ``ignore`` lists the modules whose matrices are stored
    dense. ``symmetric``: without zero points.
    """
    strategy = {"strategy": "channel"} if group_size == PER_CHANNEL else {"strategy": "group", "group_size": group_size}
    weights = {"type": "int", "symmetric": symmetric, **strategy, "dynamic": False}
    groups = {width: sorted(name for name, its in bits.items() if its == width) for width in sorted(set(bits.values()))}
    if len(groups) == 1:
        groups = {width: ["Linear"] for width in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "dequantize": len(groups) == 1,
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": {"num_bits": width, **weights}}
            for i, (width, targets) in enumerate(groups.items())
        },
    }


def shard_name(i: int, count: int) -> str:
    """File name of shard ``i``, counted from 1, of ``count``."""
    return f"model-{i:05d}-of-{count:05d}.safetensors"


def shard_index(shards: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Content of ``model.safetensors.index.json`` from each shard's tensor names and their sizes in bytes."""
    return {
        "metadata": {"total_size": sum(sum(sizes.values()) for sizes in shards.values())},
        "weight_map": {name: shard for shard, sizes in shards.items() for name in sizes},
    }


def bits_per_weight(layers: Iterable[Mapping[str, Any]]) -> float:
    """Bits stored for codes, scales, zero points and adapters, per quantized weight; NaN if there is none.

    Args:
        layers: a manifest's ``layers``: each with ``shape`` [m, n], ``bits``, ``group_size``, ``rank``,
            ``symmetric``, true where it is absent, and ``codebook``, with which scales are float32.
    """
    stored = weights = 0
    for layer in layers:
        (m, n), bits = layer["shape"], layer["bits"]
        groups = group_count(n, layer["group_size"])
        per_scale = 32 if layer.get("codebook") else 16
        stored += m * (32 * packed_width(n, bits) + per_scale * groups) + 16 * layer["rank"] * (m + n)
        stored += 0 if layer.get("symmetric", True) else 32 * packed_width(m, bits) * groups
        weights += m * n
    return stored / weights if weights else math.nan


def group_count(n: int, group_size: int) -> int:
    """Scales in a row of ``n`` inputs."""
    return 1 if group_size == PER_CHANNEL else n // group_size
