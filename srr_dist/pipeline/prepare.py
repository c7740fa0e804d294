"""Before anything expensive starts: open the checkpoint, choose the layers, read the tokens, fix the fingerprint."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srr_dist.checkpoint.graph import BlockGraph, build_graph, shared_inputs
from srr_dist.checkpoint.rotation import rotated
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.checkpoint.tokens import calibration_tokens
from srr_dist.config import QuantizeConfig
from srr_dist.errors import CalibrationError, ConfigError, OutputError
from srr_dist.pipeline.host import release_memory
from srr_dist.pipeline.run import Run, dtype_name, leave_unquantized
from srr_dist.solve import make_grid

log = logging.getLogger(__name__)

SCAN_BYTES = 8 * 2**30

FEW_SEQUENCES = 128
"""Below this many a sketch, which sees a sequence as one sample, saves less than half of what it can."""


@dataclass(frozen=True)
class Sources:
    """What a run is made from, opened and checked; knows of no cluster, so that bad input is refused before one starts.

    Attributes as in ``Run``.
    """

    config: QuantizeConfig
    checkpoint: Checkpoint
    graph: BlockGraph
    unquantized: dict[str, str]
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    tokens_sha256: str


def open_sources(config: QuantizeConfig) -> Sources:
    """Everything that is decided by the options, the model and the text; no weight is read.

    Raises:
        CheckpointError, CalibrationError, ConfigError: what is wrong with the model, the text or the options.
    """
    grid = make_grid(config.grid, config.bits, config.group_size)
    checkpoint = open_checkpoint(config.model, revision=config.revision)
    if config.incoherence:
        checkpoint = rotated(checkpoint, config.seed)
    graph = build_graph(checkpoint)
    unquantized = leave_unquantized(graph, config, grid)
    check_widths(graph, config, unquantized)
    if config.sketch and config.num_samples < FEW_SEQUENCES:
        log.warning(
            "num_samples: a sketch of %d sequences is noisy, whatever their length; %d or more of 128 to 256 tokens "
            "(--num-samples, --seq-len) serve it better",
            config.num_samples,
            FEW_SEQUENCES,
        )
    return Sources(config, checkpoint, graph, unquantized, *_tokens(config, checkpoint))


def check_widths(graph: BlockGraph, config: QuantizeConfig, unquantized: Collection[str]) -> None:
    """Warn of quantized layers whose widths vLLM will not serve.

    Raises:
        ConfigError: a rule of ``--widths`` gives no layer its bits.
    """
    names = [linear.name for block in graph.blocks for linear in block.linears if linear.name not in unquantized]
    left = names
    for pattern, bits in config.width_rules:
        if len(others := [name for name in left if not pattern.search(name)]) == len(left):
            raise ConfigError(
                f"widths: {pattern.pattern}={bits} gives no layer its bits: none has such a name, or rules before it "
                f"have them all; the first of {len(names)} layers is {names[0]}"
            )
        left = others
    groups = (group for block in graph.blocks for group in shared_inputs(block, frozenset(names)))
    if mixed := [group[0].name for group in groups if len({config.bits_of(each.name) for each in group}) > 1]:
        log.warning(
            "widths: in %d places layers that read one input differ in bits, first beside %s; transformers reads them, "
            "but vLLM, which runs such layers as one, does not",
            len(mixed),
            mixed[0],
        )


def make_run(sources: Sources, output: str, *, on_gpu: bool, single_driver: bool = False, statistics: str = "") -> Run:
    """The run that these sources make on this kind of hardware, with its fingerprint."""
    config, checkpoint = sources.config, sources.checkpoint
    dtype = forward_dtype(config.dtype, checkpoint, on_gpu=on_gpu)
    fingerprint = config.fingerprint(source=checkpoint.identity, tokens=sources.tokens_sha256, dtype=dtype_name(dtype))
    return Run(
        checkpoint,
        sources.graph,
        config,
        dtype,
        fingerprint,
        output,
        sources.unquantized,
        sources.token_ids,
        sources.tokens_sha256,
        single_driver,
        statistics,
    )


def scan_weights(checkpoint: Checkpoint, graph: BlockGraph) -> None:
    """Read every weight once, a block at a time, so that NaN and Inf are found before anything else is done.

    Only checkpoints of up to ``SCAN_BYTES`` are: larger ones take longer than the first minute, and each of their
    blocks is checked when it is read, before it is used.

    Raises:
        CheckpointError: names file and tensor.
    """
    if checkpoint.total_bytes <= SCAN_BYTES:
        for block in graph.blocks:
            checkpoint.check(block.tensors)
            release_memory()
        checkpoint.check(graph.rest)


def forward_dtype(name: str, checkpoint: Checkpoint, *, on_gpu: bool) -> torch.dtype:
    """The type of the forward passes: as told, else float32 on a CPU, on a GPU bfloat16 unless the source is wider."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    stored = {entry.dtype for entry in checkpoint.tensors.values()}
    return torch.bfloat16 if on_gpu and stored & {"BF16", "F16"} else torch.float32


def check_positions(checkpoint: Checkpoint, seq_len: int) -> None:
    """Refuse sequences that are longer than the model was made for.

    Raises:
        CalibrationError: names both lengths.
    """
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise CalibrationError(
            f"seq_len: {seq_len} tokens, but the model has {limit} positions; use a shorter --seq-len"
        )


def refuse_own_folder(checkpoint: Checkpoint, output: str) -> None:
    """Refuse an output whose files would replace the model's own, such as its README.md.

    Raises:
        OutputError: the two are one folder.
    """
    if output.rstrip("/") == checkpoint.url or ("://" not in output and str(Path(output).resolve()) == checkpoint.url):
        raise OutputError(f"{output}: is the model's own folder; name another --output")


def _tokens(
    config: QuantizeConfig, checkpoint: Checkpoint
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], str]:
    if not config.calibration:
        return np.zeros((0, config.seq_len), dtype=np.int64), ""
    check_positions(checkpoint, config.seq_len)
    tokens = calibration_tokens(
        config.calibration,
        checkpoint.tokenizer(),
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        vocab_size=checkpoint.config.get_text_config().vocab_size,
    )
    return tokens.ids.numpy(), tokens.sha256
