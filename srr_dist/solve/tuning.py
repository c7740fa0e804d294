"""Tuning the codes, scales and adapters of a block together, by the gradient of the block's own error.

A layer's closed-form solution is the start. Behind its codes stand ``latent`` real values that round to them; gradients
pass through the rounding as if it were not there. Latent values, logarithms of group scales (where the grid has any
value for them), L and R move by Adam, at rates that fall linearly to zero. What is kept is the iterate with the least
error on sequences held out from the steps, measured as it would be stored; the start is one of them.

Codes chosen with error feedback lie up to several steps from their weights, so that latent values which begin as close
to the weights as their codes allow lie at the very edge: the first steps would turn a large part of them over at once,
and blocks do not recover. They begin ``LEANING`` of the way there instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from srr_dist.solve.grids import Grid
from srr_dist.solve.layer import Stored
from srr_dist.threads import one_thread

_CHECKS = 5
"""How often in a run the held-out error is taken."""

BETAS = (0.9, 0.95)
"""Adam's memories: a run is short."""

_NO_GRADIENT = 1e-18
"""Below every gradient that is not zero: a weight of a large block moves its error little."""

LEANING = 0.5
"""Share of the way from a code to its weight, or half a step if that is nearer, at which a latent value begins."""


@dataclass(frozen=True)
class TuneOptions:
    """How a block is tuned.

    Attributes:
        steps: gradient steps.
        batch: sequences of a step.
        code_travel: about how far a latent value moves if all steps agree, in codes.
        scale_travel: the same for scales, as a share of them.
        adapter_rate: the first rate for L and R, as a share of their root mean square.
        seed: of the order of the sequences.
    """

    steps: int
    batch: int = 4
    code_travel: float = 0.3
    scale_travel: float = 0.02
    adapter_rate: float = 0.01
    seed: int = 0


class BlockError(Protocol):
    """The error of a block's output under given weights, over calibration sequences given by their numbers."""

    def value(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> float:
        """The mean over the sequences."""

    def gradients(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> Mapping[str, Tensor]:
        """Its gradient by each weight, float32 ``[m, n]``."""


@dataclass(frozen=True)
class Tuned:
    """The best iterate, its step (0: the start), and the held-out errors of the start and of it."""

    layers: dict[str, Stored]
    step: int
    error_before: float
    error: float


class TunedLayer:
    """A layer on its way: latent values behind its codes, logarithms of what scales are multiplied by, L and R."""

    def __init__(self, W: Tensor, start: Stored, grid: Grid, options: TuneOptions) -> None:
        self._grid, self._start = grid, start.scale.float()
        self._L, self._R = start.L.float(), start.R.float()
        self._growth, self._zero = torch.zeros_like(self._start), grid.zero(start.codes)
        codes = grid.grouped(start.codes.float())
        wanted = grid.position(grid.grouped(W.float() - self._L @ self._R) / self._start.unsqueeze(-1))
        self._latent = codes + LEANING * (wanted - codes).clamp_(-0.5, 0.5)
        # A mean rate of half the first, over all steps.
        rates = [(self._latent, 2.0 * options.code_travel / options.steps)]
        if grid.continuous:
            rates.append((self._growth, 2.0 * options.scale_travel / options.steps))
        with one_thread():
            factors = [(factor, float(factor.norm()) / factor.numel() ** 0.5) for factor in self._factors()]
        rates += [(factor, options.adapter_rate * size) for factor, size in factors]
        groups = [{"params": [tensor], "lr": 0.0, "first": rate} for tensor, rate in rates]
        self._adam = torch.optim.Adam(groups, betas=BETAS, eps=_NO_GRADIENT)

    def stored(self) -> Stored:
        """The layer as it would be stored now."""
        codes = self._codes().to(self._grid.dtype).reshape(len(self._L), -1)
        return Stored(codes, self._scale().bfloat16(), self._L.bfloat16(), self._R.bfloat16())

    def weight(self) -> Tensor:
        """``Q + L R`` with scales and factors as they are: where gradients are taken."""
        Q = self._points().mul_(self._scale().unsqueeze(-1)).reshape(len(self._L), -1)
        return Q.addmm_(self._L, self._R)

    def step(self, gradient: Tensor, share: float) -> None:
        """Move against the gradient by the weight, ``[m, n]``, at this share of the first step's rates."""
        by_value, scale = self._grid.grouped(gradient), self._scale()
        if self._grid.continuous:
            self._growth.grad = (by_value * self._points()).sum(-1).mul_(scale)
        # How far apart points are is left out where they differ: Adam divides by it again.
        self._latent.grad = by_value * scale.unsqueeze(-1)
        with one_thread():
            self._L.grad, self._R.grad = gradient @ self._R.mT, self._L.mT @ gradient
        for group in self._adam.param_groups:
            group["lr"] = group["first"] * share
        self._adam.step()
        self._grid.clamp_(self._latent, self._zero, margin=0.5)

    def _factors(self) -> list[Tensor]:
        return [factor for factor in (self._L, self._R) if factor.numel()]

    def _codes(self) -> Tensor:
        return self._grid.clamp_(self._latent.round(), self._zero)

    def _points(self) -> Tensor:
        return self._grid.points(self._codes())

    def _scale(self) -> Tensor:
        return self._start * self._growth.exp()


def tune(
    weights: Mapping[str, Tensor],
    starts: Mapping[str, Stored],
    grids: Mapping[str, Grid],
    error: BlockError,
    sequences: int,
    options: TuneOptions,
) -> Tuned:
    """Tune the layers of one block.

    Args:
        weights: name -> W ``[m, n]`` of the layers that were solved.
        starts: name -> their solutions.
        grids: name -> that of the layer's codes.
        error: of the block.
        sequences: how many calibration sequences there are, two at least; every eighth, at least one, is held out.
        options: steps and rates.
    """
    held = range(sequences - max(1, sequences // 8), sequences)

    def measured(layers: Mapping[str, Stored]) -> float:
        return error.value({name: layer.weight(grids[name]) for name, layer in layers.items()}, held)

    first = measured(starts)
    best = Tuned(dict(starts), 0, first, first)
    layers = {name: TunedLayer(weights[name], start, grids[name], options) for name, start in starts.items()}
    checks = {round(options.steps * check / _CHECKS) for check in range(1, _CHECKS + 1)}
    for step, batch in enumerate(_batches(held.start, options), 1):
        gradients = error.gradients({name: layer.weight() for name, layer in layers.items()}, batch)
        for name, layer in layers.items():
            layer.step(gradients[name], 1.0 - (step - 1) / options.steps)
        if step in checks:
            stored = {name: layer.stored() for name, layer in layers.items()}
            if (found := measured(stored)) < best.error:
                best = Tuned(stored, step, first, found)
    return best


def _batches(count: int, options: TuneOptions) -> Iterator[list[int]]:
    """The sequences of each step: all of them in a random order, then again in another."""
    generator, queue = torch.Generator().manual_seed(options.seed), list[int]()
    for _ in range(options.steps):
        while len(queue) < options.batch:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[: options.batch]
        del queue[: options.batch]
