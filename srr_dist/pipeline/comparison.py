"""How close a quantized model's predictions are to the original's: sums over tokens, added up across sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 256  # tokens whose two distributions over the vocabulary are in memory at once


@dataclass(frozen=True)
class Comparison:
    """Sums over predicted tokens, float64; ``a + b`` joins two parts of a text.

    Attributes:
        tokens: predictions counted, T − 1 per sequence.
        nll_original, nll: negative log likelihood of the next token, nats.
        kl: KL(original ‖ quantized), nats.
        agreement: predictions whose most likely token is the same.
        overlap: ``Σ min(p, q)``, the chance that speculative decoding accepts a token of the quantized model.
    """

    tokens: int = 0
    nll_original: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    agreement: int = 0
    overlap: float = 0.0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.nll_original + other.nll_original,
            self.nll + other.nll,
            self.kl + other.kl,
            self.agreement + other.agreement,
            self.overlap + other.overlap,
        )

    def figures(self) -> dict[str, float]:
        """What is reported: perplexities, and means over tokens."""
        return {
            "perplexity_original": math.exp(self.nll_original / self.tokens),
            "perplexity": math.exp(self.nll / self.tokens),
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreement / self.tokens,
            "expected_acceptance": self.overlap / self.tokens,
            "tokens": self.tokens,
        }


def compare(original: Tensor, quantized: Tensor, ids: Tensor) -> Comparison:
    """Compare two models' logits ``[T, V]`` on one sequence of token ids ``[T]``."""
    total = Comparison()
    for start in range(0, ids.shape[0] - 1, _CHUNK):
        stop = min(start + _CHUNK, ids.shape[0] - 1)
        total += _compare_chunk(original[start:stop], quantized[start:stop], ids[start + 1 : stop + 1])
    return total


def _compare_chunk(original: Tensor, quantized: Tensor, labels: Tensor) -> Comparison:
    log_p, log_q = original.float().log_softmax(-1), quantized.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    rows = labels.unsqueeze(-1)
    # A probability of zero takes no part, whatever the other model says of it.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return Comparison(
        tokens=labels.shape[0],
        nll_original=-_total(log_p.gather(-1, rows)),
        nll=-_total(log_q.gather(-1, rows)),
        kl=_total(divergence),
        agreement=int((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
        overlap=_total(torch.minimum(p, q).sum(-1)),
    )


def _total(values: Tensor) -> float:
    return float(values.double().sum())
