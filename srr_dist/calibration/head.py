"""Where a backward pass begins: labels drawn from the model's own predictions, and the gradient of their loss.

With labels of the model itself, second moments of gradients are the true Fisher information, the curvature of
``KL(original ‖ quantized)``; those of the text would give the empirical one, which is something else where the model
is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**23
"""Logits alive at a time: tokens follow one another in pieces, each with its whole row of the vocabulary.

Rows are independent of each other, so that the head runs once forward and once back; pieces of the vocabulary would
take a second forward pass to find each row's normalisation.
"""


def head_gradient(logits: Callable[[Tensor], Tensor], hidden: Tensor, seed: int, vocabulary: int) -> Tensor:
    """The gradient of ``Σ_t −log p(label_t)`` by the hidden states behind the last block, one label drawn per token.

    Args:
        logits: final norm and head, ``[1, t, d]`` to ``[1, t, V]``, token by token.
        hidden: ``[1, T, d]`` of one sequence.
        seed: of the labels.
        vocabulary: V.

    Returns:
        ``[1, T, d]`` in the type of ``hidden``.
    """
    draws = torch.rand(hidden.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = tokens_at_once(vocabulary)
    pieces = zip(hidden.split(rows, dim=1), draws.split(rows), strict=True)
    return torch.cat([_piece_gradient(logits, piece, numbers) for piece, numbers in pieces], dim=1)


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens of a sequence have their logits in memory, one at least."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The labels at which each row's cumulated probability passes its draw.

    Args:
        probabilities: ``[t, V]``, rows that sum to about 1.
        draws: ``[t]`` float64, from 0 to below 1.

    Returns:
        ``[t]`` int64; none has the probability 0.
    """
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    reached = draws.to(cumulated.device) * cumulated[:, -1]
    return torch.searchsorted(cumulated, reached.unsqueeze(-1), right=True).squeeze(-1)


def _piece_gradient(logits: Callable[[Tensor], Tensor], hidden: Tensor, draws: Tensor) -> Tensor:
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = logits(leaf)
    slope = torch.softmax(scores.detach()[0], dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    labels = sample(slope, draws)
    slope[torch.arange(len(labels), device=slope.device), labels] -= 1.0
    (found,) = torch.autograd.grad(scores, leaf, slope.unsqueeze(0).to(scores.dtype))
    return found
