"""Evaluation: the original and the quantized model side by side, block by block, through the same kind of stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from srr_dist.calibration.adapted import attach_adapters
from srr_dist.calibration.head import tokens_at_once
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.rotation import as_in
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.checkpoint.tokens import evaluation_tokens
from srr_dist.config import JobConfig
from srr_dist.errors import ConfigError, OutputError
from srr_dist.export import QuantizedModel
from srr_dist.export.base import bits_per_weight
from srr_dist.pipeline import hidden_states
from srr_dist.pipeline.cluster import Actors, Cluster, Pulse, connected
from srr_dist.pipeline.comparison import Comparison, compare
from srr_dist.pipeline.host import worker_device
from srr_dist.pipeline.memory import Workload, choose_holding
from srr_dist.pipeline.plan import graph_needs, hidden_size, rest_bytes
from srr_dist.pipeline.prepare import check_positions, forward_dtype
from srr_dist.pipeline.progress import Progress
from srr_dist.pipeline.run import dtype_name
from srr_dist.pipeline.windows import all_windows, batches
from srr_dist.store import RunArea

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared, on which text."""

    model: str
    quantized: str
    text: str
    num_samples: int
    seq_len: int
    dtype: str = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("num_samples", self.num_samples, 1), ("seq_len", self.seq_len, 2)):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, found {value}")


class EvaluationStage(Pulse):
    """Holds consecutive blocks twice, original and quantized, and runs both on their own hidden states."""

    def __init__(self, checkpoint: Checkpoint, quantized: QuantizedModel, dtype: torch.dtype, threads: int) -> None:
        self.threads = threads
        self.quantized, self.dtype = quantized, dtype
        self.vocabulary = checkpoint.config.get_text_config().vocab_size
        self.device = worker_device()
        self.original = Decoder(checkpoint, dtype=dtype, device=self.device)
        self.other = Decoder(checkpoint, dtype=dtype, device=self.device)
        self.blocks: tuple[int, ...] = ()

    def open(self, blocks: tuple[int, ...], *, first: bool) -> None:
        """Replace the blocks held; the first stage of the first window embeds tokens as well."""
        torch.set_num_threads(self.threads)  # here, because both settings belong to the thread that does the work
        torch.set_grad_enabled(False)
        for index in self.blocks:
            self.original.drop_block(index)
            self.other.drop_block(index)
        self.original.drop_rest()
        self.blocks = blocks
        for index in blocks:
            self.original.load_block(index)
            self._load_quantized(index)
        if first:
            self.original.load_embedding()

    def embed(self, ids: Any) -> hidden_states.Payload:
        """Hidden states of token ids ``[B, T]``, for the original and the quantized model: ``[2 B, T, d]``."""
        hidden = [self.original.embed(row.unsqueeze(0)) for row in torch.tensor(ids)]
        return hidden_states.pack([*hidden, *hidden])

    def forward(self, payload: hidden_states.Payload) -> hidden_states.Payload:
        """Both halves of ``[2 B, T, d]`` through this stage's blocks."""
        sequences = hidden_states.unpack(payload, self.dtype)
        half = len(sequences) // 2
        out = [
            self._through(decoder, hidden)
            for decoder, part in ((self.original, sequences[:half]), (self.other, sequences[half:]))
            for hidden in part
        ]
        return hidden_states.pack(out)

    def open_head(self) -> None:
        """Keep only what turns hidden states into logits."""
        self.open((), first=False)
        self.original.load_head()

    def score(self, payload: hidden_states.Payload, ids: Any) -> Comparison:
        """Compare the two models' predictions of token ids ``[B, T]`` from their last hidden states ``[2 B, T, d]``."""
        sequences = hidden_states.unpack(payload, self.dtype)
        half = len(sequences) // 2
        total = Comparison()
        for row, *states in zip(torch.tensor(ids), sequences[:half], sequences[half:], strict=True):
            total += self._compared(row, *states)
        return total

    def _compared(self, ids: Tensor, original: Tensor, quantized: Tensor) -> Comparison:
        """Of one sequence ``[T]`` with hidden states ``[1, T, d]``, whose logits need not fit into memory together."""
        total, at_once = Comparison(), tokens_at_once(self.vocabulary)
        for start in range(0, len(ids) - 1, at_once):
            stop = min(start + at_once, len(ids) - 1)
            states = (hidden[:, start:stop].to(self.device) for hidden in (original, quantized))
            logits = [self.original.logits(piece)[0] for piece in states]
            total += compare(logits[0], logits[1], ids[start : stop + 1].to(self.device))
        return total

    def _load_quantized(self, index: int) -> None:
        tensors, adapters = self.quantized.block(index)
        block = self.other.load_block(index, tensors)
        attach_adapters(block, self.other.linear_modules(index), adapters)

    def _through(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.device)
        for index in self.blocks:
            hidden = decoder.run_block(index, hidden)
        return hidden


def evaluate(config: EvaluationConfig, job: JobConfig) -> dict[str, Any]:
    """Perplexity of both models, and how far the quantized one's predictions are from the original's.

    Returns:
        The figures of ``Comparison.figures``, ``bits_per_weight`` over the quantized weights (codes, scales and
        adapters), and what was read: text, its hash, num_samples, seq_len.

    Raises:
        OutputError: the quantized model is unfinished or made from another model.
        SrrError: the model or the text cannot be read.
    """
    quantized = QuantizedModel.open(config.quantized)
    checkpoint = as_in(open_checkpoint(config.model, revision=config.revision), quantized.config_json)
    graph = build_graph(checkpoint)
    _refuse_another_model(quantized, checkpoint, len(graph.blocks))
    check_positions(checkpoint, config.seq_len)
    tokens = evaluation_tokens(
        config.text,
        checkpoint.tokenizer(),
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        vocab_size=checkpoint.config.get_text_config().vocab_size,
    )
    with connected(job) as cluster:
        dtype = forward_dtype(config.dtype, checkpoint, on_gpu=bool(cluster.gpus))
        work = Workload(
            seq_len=config.seq_len,
            hidden_size=hidden_size(checkpoint),
            compute_bytes=dtype.itemsize,
            scaling="identity",
            quantized=frozenset(),
            on_gpu=bool(cluster.gpus),
            copies=2,
            outside=rest_bytes(checkpoint, graph, dtype.itemsize),
        )
        needs = graph_needs(checkpoint, graph, work, dtype_name(dtype))
        holding = choose_holding(graph.blocks, needs, work, cluster.budget, job.blocks_per_stage)
        actors = Actors(cluster, EvaluationStage, checkpoint, quantized, dtype, cluster.cpus)
        try:
            total = _stream(
                actors.handles, cluster, len(graph.blocks), holding.blocks, tokens.ids.numpy(), checkpoint, dtype
            )
        finally:
            actors.stop()
    read = {
        "text": config.text,
        "text_sha256": tokens.sha256,
        "num_samples": config.num_samples,
        "seq_len": config.seq_len,
    }
    return total.figures() | {"bits_per_weight": bits_per_weight(quantized.manifest.layers.values())} | read


def _refuse_another_model(quantized: QuantizedModel, checkpoint: Checkpoint, blocks: int) -> None:
    """An output whose working area was removed says no more than its number of blocks."""
    area = RunArea(quantized.store, quantized.manifest.fingerprint)
    begun = area.store.exists(area.path("run.json"))
    made_from = area.run()["identity"]["source"] if begun else checkpoint.identity
    if (made_from, quantized.block_count) != (checkpoint.identity, blocks):
        raise OutputError(
            f"{area.store.url}: made from model {made_from[:8]} of {quantized.block_count} decoder blocks, but "
            f"{checkpoint.model} is {checkpoint.identity[:8]} of {blocks}; name the model it was made from"
        )


def _stream(
    stages: Sequence[Any],
    cluster: Cluster,
    blocks: int,
    per_stage: int,
    ids: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> Comparison:
    """Window by window; between windows the hidden states wait in Ray's object store, which spills to disk."""
    row_bytes = 2 * ids.shape[1] * hidden_size(checkpoint) * dtype.itemsize
    parts = [ids[list(batch)] for batch in batches(len(ids), len(stages), row_bytes)]
    messages: list[Any] = []
    windows = all_windows(blocks, len(stages), per_stage)
    with Progress("evaluate", blocks * len(ids), 0) as progress:
        for number, window in enumerate(windows):
            active = stages[: len(window.stages)]
            opening = [
                stage.open.remote(part, first=number == 0 and index == 0)
                for index, (stage, part) in enumerate(zip(active, window.stages, strict=True))
            ]
            ray.get(opening)
            progress.note = f"blocks {window.blocks[0]}–{window.blocks[-1]}"
            if number == 0:
                messages = [active[0].embed.remote(part) for part in parts]
            for position in range(len(parts)):
                for stage in active:
                    messages[position] = stage.forward.remote(messages[position])
            for message, part in zip(messages, parts, strict=True):
                ray.wait([message], fetch_local=False)
                progress.advance("passes", len(part) * len(window.blocks))
        ray.get(stages[0].open_head.remote())
        scores = [stages[0].score.remote(message, part) for message, part in zip(messages, parts, strict=True)]
        return sum(ray.get(scores), Comparison())
