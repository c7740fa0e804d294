"""A run: everything that is decided before the first weight is read, and that workers need to know."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from srr_dist import __version__
from srr_dist.calibration import first_token_weight
from srr_dist.checkpoint.graph import BlockGraph, Linear
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.checkpoint.tensors import DTYPES, TensorEntry
from srr_dist.config import QuantizeConfig
from srr_dist.errors import ConfigError
from srr_dist.solve import Grid, Quantizer, SolveOptions, make_grid
from srr_dist.store.records import REST

_MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Run:
    """One quantization, identified by its fingerprint; travels to every worker."""

    checkpoint: Checkpoint
    graph: BlockGraph
    config: QuantizeConfig
    dtype: torch.dtype
    """Type of the forward passes."""
    fingerprint: str
    output: str
    unquantized: dict[str, str]
    """Linear layers of the blocks left as they are -> reason."""
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    """Calibration tokens, int64 ``[N, T]``; N = 0 when nothing is calibrated."""
    tokens_sha256: str
    single_driver: bool = False
    """Whether the output's store is used without conditional writes."""
    statistics: str = ""
    """Where moments are kept for other runs, "" to keep none."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Bits of layers' codes as they were found for ``--mean-bits``; {} until then."""

    @property
    def grid(self) -> Grid:
        """The base quantizer of layers to which ``--widths`` gives no other bits."""
        return make_grid(self.config.grid, self.config.bits, self.config.group_size)

    def grid_of(self, layer: str) -> Grid:
        """The base quantizer of a layer."""
        bits = self.widths.get(layer) or self.config.bits_of(layer)
        return make_grid(self.config.grid, bits, self.config.group_size)

    @property
    def calibrated(self) -> bool:
        """Whether there are sequences to pass through the model."""
        return len(self.token_ids) > 0

    @property
    def held_out(self) -> int:
        """How many sequences no sketch sees, the last ones: an eighth, but no more than it takes to judge errors by."""
        return min(max(1, len(self.token_ids) // 8), _MOST_HELD_OUT)

    @property
    def first_token_weight(self) -> int:
        """How many tokens the first one of a sequence counts for, in moments and while blocks are tuned."""
        return first_token_weight(self.config.first_token_share, self.token_ids.shape[1])

    @property
    def units(self) -> list[str]:
        """Every unit of work: one per block, and the rest."""
        return [unit_name(block.index) for block in self.graph.blocks] + [REST]

    @property
    def quantized(self) -> frozenset[str]:
        """Full names of the layers to solve."""
        return frozenset(
            linear.name
            for block in self.graph.blocks
            for linear in block.linears
            if linear.name not in self.unquantized
        )

    def solve_options(self, grid: Grid) -> SolveOptions:
        """The solver's part of the configuration, for layers on this grid."""
        config = self.config
        quantizer = Quantizer(grid, config.scales, config.rounding)
        return SolveOptions(
            method=config.method,
            quantizer=quantizer,
            rank=config.rank,
            split=config.split,
            form=config.form,
            iterations=config.iterations,
            descent=config.descent,
            rounding_metric=config.rounding_metric,
            seed=config.seed,
        )

    def document(self) -> dict[str, Any]:
        """What run.json holds: the fingerprinted fields, and what ``status`` and the report show beside them."""
        identity = self.config.identity(
            source=self.checkpoint.identity, tokens=self.tokens_sha256, dtype=dtype_name(self.dtype)
        )
        return {
            "fingerprint": self.fingerprint,
            "identity": identity,
            "model": self.checkpoint.model,
            "calibration": {
                "source": self.config.calibration,
                "num_samples": int(self.token_ids.shape[0]),
                "seq_len": int(self.token_ids.shape[1]),
                "sha256": self.tokens_sha256,
            },
            "units": self.units,
            "layers": len(self.quantized),
            "unquantized": [{"name": name, "reason": reason} for name, reason in sorted(self.unquantized.items())],
            "source_bytes": self.checkpoint.total_bytes,
            "dense_bytes": sum(
                math.prod(entry.shape) * stored_dtype(entry).itemsize for entry in self.checkpoint.tensors.values()
            ),
            "created_by": versions(),
        }


def stored_dtype(entry: TensorEntry) -> torch.dtype:
    """The type a source tensor is read in; GGUF is dequantized to float32."""
    return DTYPES.get(entry.dtype, torch.float32)


def unit_name(block: int) -> str:
    """The unit of a decoder block."""
    return f"{block:05d}"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Versions that a record notes, because last bits may depend on them."""
    packages = {name: version(name) for name in ("torch", "transformers", "ray")}
    return {"srr_dist": __version__, "python": platform.python_version(), **packages}


def leave_unquantized(graph: BlockGraph, config: QuantizeConfig, grid: Grid) -> dict[str, str]:
    """Layers that are not quantized -> reason.

    Raises:
        ConfigError: nothing would be left to quantize.
    """
    reasons: dict[str, str] = {}
    linears: list[Linear] = [linear for block in graph.blocks for linear in block.linears]
    for linear in linears:
        if not config.selects(linear.name):
            reasons[linear.name] = "not selected by --include and --exclude"
        elif not grid.fits(linear.in_features):
            reasons[linear.name] = f"{linear.in_features} inputs are no multiple of the group size {grid.group_size}"
    if len(reasons) == len(linears):
        raise ConfigError(
            f"include, exclude, group_size: none of the {len(linears)} linear layers would be quantized; "
            f"the first, {linears[0].name}: {reasons[linears[0].name]}"
        )
    return reasons
