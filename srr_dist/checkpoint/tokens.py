"""Calibration and evaluation windows: which tokens the model sees, decided by the data, the tokenizer and a seed.

Documents are tokenized one by one without special tokens and joined without separators; a long plain text is
tokenized in pieces (``documents.PIECE_BYTES``). The stream is cut into windows of ``seq_len``. Where the tokenizer
itself puts BOS before a text, every window starts with BOS, which ``seq_len`` counts.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from srr_dist.checkpoint.documents import Document, read_documents
from srr_dist.errors import CalibrationError

_POOL = 4
"""Calibration windows are drawn from this many times as many."""


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids."""

    ids: torch.Tensor
    """int64 [N, T]."""
    sha256: str
    """Of the shape and the ids, hex: the same windows have the same digest wherever they came from."""


def calibration_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int, seed: int, vocab_size: int
) -> Tokens:
    """``num_samples`` windows drawn without replacement, by ``seed``, from the first ``4 * num_samples``.

    Args:
        source: see ``documents.read_documents``; no more of it is read than the windows need.
        tokenizer: the checkpoint's own.
        num_samples: N.
        seq_len: T in tokens.
        seed: of the draw; another seed gives other windows or another order.
        vocab_size: rows of the embedding; ids must lie below.

    Raises:
        CalibrationError: the source cannot be read, is too short, or holds an id outside the vocabulary.
    """
    windows = _windows(
        source,
        tokenizer,
        at_least=num_samples,
        at_most=_POOL * num_samples,
        seq_len=seq_len,
        vocab_size=vocab_size,
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return _tokens(windows[order[:num_samples]])


def evaluation_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int, vocab_size: int
) -> Tokens:
    """The first ``num_samples`` consecutive windows that do not overlap; otherwise as ``calibration_tokens``."""
    windows = _windows(
        source, tokenizer, at_least=num_samples, at_most=num_samples, seq_len=seq_len, vocab_size=vocab_size
    )
    return _tokens(windows)


def _tokens(ids: torch.Tensor) -> Tokens:
    digest = hashlib.sha256(f"int64 {list(ids.shape)}\0".encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return Tokens(ids, digest.hexdigest())


def _windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, at_least: int, at_most: int, seq_len: int, vocab_size: int
) -> torch.Tensor:
    """``at_least`` to ``at_most`` consecutive windows [N, seq_len] from the start of ``source``."""
    bos = _leading_bos(tokenizer)
    body = seq_len - len(bos)
    if body < 1 or at_least < 1:
        raise CalibrationError(
            f"{at_least} windows of {seq_len} tokens ({len(bos)} of them BOS) hold no text; ask more"
        )
    stream = array("q")
    for document in read_documents(source):
        stream.extend(_token_ids(document, tokenizer, bos, vocab_size))
        if len(stream) >= at_most * body:
            break
    count = min(len(stream) // body, at_most)
    if count < at_least:
        raise CalibrationError(
            f"{source}: {len(stream)} tokens found, {at_least * body} needed for {at_least} windows of {seq_len}; "
            "give more text, fewer samples or shorter windows"
        )
    windows = torch.frombuffer(stream, dtype=torch.int64, count=count * body).reshape(count, body)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, len(bos)), windows], dim=1)


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[bos]`` where the tokenizer prepends it to a text, else ``[]``."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def _token_ids(document: Document, tokenizer: PreTrainedTokenizerBase, bos: list[int], vocab_size: int) -> list[int]:
    if isinstance(document.content, str):
        ids = tokenizer(document.content, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = document.content[len(bos) :] if document.content[: len(bos)] == bos else document.content
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise CalibrationError(
            f"{document.origin}: token id {bad} is outside 0..{vocab_size - 1}; "
            "the tokens or the tokenizer belong to another model"
        )
    return list(ids)
