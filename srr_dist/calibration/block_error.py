"""How far a block's output is from the original's under other weights, and which way each weight should move.

Sequences are taken side by side, each on one CPU thread, and added up in their order: the bits of a sum do not depend
on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from srr_dist.threads import side_by_side


class OutputError:
    """The mean squared error of a block's output, each token's in units of its own mean square.

    Norms divide hidden states by their length wherever the network reads them, so that what counts of an error is its
    share of the token it sits in; a few tokens are thousands of times as long as the others.

    Args:
        run: the block with the weights that ``linears`` hold: ``[1, T, d]`` to ``[1, T, d]``.
        linears: full name -> module of the layers whose weights are given.
        inputs: of a sequence, ``[1, T, d]``.
        targets: the original block's output for it, ``[1, T, d]``.
        at_once: sequences side by side.
        first: how many tokens the first one of a sequence counts for, as in moments.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        linears: Mapping[str, nn.Linear],
        inputs: Callable[[int], Tensor],
        targets: Callable[[int], Tensor],
        at_once: int = 1,
        first: int = 1,
    ) -> None:
        self._run, self._linears, self._inputs, self._targets = run, linears, inputs, targets
        self._at_once, self._first = at_once, first

    def value(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> float:
        """The mean over the sequences."""
        self._put(weights)
        losses = side_by_side(self._loss, sequences, self._at_once)
        return sum(float(loss) for loss in losses) / len(sequences)

    def gradients(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> Mapping[str, Tensor]:
        """The gradient of that mean by each weight, float32 ``[m, n]``."""
        leaves = self._put(weights)
        total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

        def slopes(sequence: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self._loss(sequence), leaves)

        for found in side_by_side(slopes, sequences, self._at_once):
            for name, slope in zip(weights, found, strict=True):
                total[name].add_(slope, alpha=1.0 / len(sequences))
        return total

    def _put(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        leaves: list[Tensor] = [self._linears[name].weight for name in weights]
        for leaf, weight in zip(leaves, weights.values(), strict=True):
            leaf.data.copy_(weight)
            leaf.requires_grad_(True)
        return leaves

    def _loss(self, sequence: int) -> Tensor:
        inputs, target = self._inputs(sequence), self._targets(sequence).float()
        error = self._run(inputs).float() - target
        shares = error.square().mean(-1) / target.square().mean(-1).clamp_min(1e-12)
        return (shares.sum() + (self._first - 1) * shares[:, 0].sum()) / (shares.numel() + self._first - 1)
