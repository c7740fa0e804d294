"""Kronecker factors of a linear layer's Fisher information, summed over the gradients of sequences.

``KL(original ‖ quantized) ≈ ½ vec(Δ)ᵀ F vec(Δ)`` with ``F = E[vec(G_s) vec(G_s)ᵀ]``, where ``G_s = Σ_t g_t x_tᵀ``, of
shape ``[m, n]``, is a sequence's gradient of the weight. A sketch stands for F as ``H_O ⊗ H_I``, up to a factor of the
layer, so that the error of its weight is ``tr(H_O Δ H_I Δᵀ)`` (YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from srr_dist.calibration.moments import InputMoment, gram, moment_bytes, waiting_bytes

_TRIANGLE = 5 / 8
"""Share of a symmetric product that a moment computes."""


class Side(NamedTuple):
    """What one side of a sketch is as a moment."""

    features: int
    scaling: str
    bands: int = 1


def output_bands(m: int, most: int) -> int:
    """The least number of equal bands of at most so many outputs; one if ``most`` is 0."""
    return next(bands for bands in range(-(-m // (most or m)), m + 1) if m % bands == 0)


def sketch_sides(kind: str, m: int, n: int, band: int = 0) -> dict[str, Side]:
    """The sides that a sketch sums; arguments as of ``Sketch``."""
    outputs = Side(m, "exact", output_bands(m, band))
    match kind:
        case "full":
            return {"output": outputs}
        case "diag":
            return {"output": Side(m, "diag")}
        case "scalar":
            return {"output": Side(1, "diag")}
    sides = {"output": outputs, "input": Side(n, "exact")}
    return sides | {"tokens": outputs} if kind == "B" else sides


def sketch_bytes(kind: str, m: int, n: int, band: int = 0) -> int:
    """Memory of one sketch, in bytes: its sums, and in float32 the side that rounds of A weight the other by."""
    sums = [moment_bytes(*side) for side in sketch_sides(kind, m, n, band).values()]
    return sum(sums) + (max(sums) // 2 if kind.startswith("A:") else 0)


def sketch_waiting_bytes(kind: str, tokens: int, m: int, n: int, band: int = 0) -> int:
    """Memory of what waits at most in one sketch to be summed, in bytes: rows of tokens or of their gradient."""
    formed = kind == "B" and gradient_is_cheaper(tokens, m, n, band)
    rows = {"input": m, "output": n} if formed else {}
    sides = sketch_sides(kind, m, n, band).items()
    return sum(waiting_bytes(rows.get(name, tokens), side.features, side.scaling) for name, side in sides)


def sketch_passes(kind: str) -> int:
    """How often a sketch has to see all sequences."""
    return 1 + 2 * int(kind.removeprefix("A:")) if kind.startswith("A:") else 1


class Sketch:
    """Accumulates one layer's factors.

    ========== =============================================== =========================================== ===========
    kind       H_O                                             H_I                                         source
    ========== =============================================== =========================================== ===========
    B          ``E_s[G_s G_sᵀ] / n``, and as the side          ``E_s[G_sᵀ G_s] / m``                       YAQA
               ``tokens`` that of ``full``
    A:R        ``E_t[(xᵀ H_I x) g gᵀ] / ‖H_I‖²``, R times,     ``E_t[x xᵀ]`` at first, then                YAQA
               after each H_I but the last                     ``E_t[(gᵀ H_O g) x xᵀ] / ‖H_O‖²``
    full       ``E_t[g gᵀ]``                                   not summed: the moment ``E_t[x xᵀ]``        K-FAC
    diag       its diagonal                                    the same
    scalar     the mean of that                                the same
    ========== =============================================== =========================================== ===========

    B has no bias, and takes its variance from sequences; A and K-FAC take tokens for independent of each other, which
    they are not, and have a small variance. What lies between is better than either, so that B has its part of K-FAC.

    H_O of a layer with more outputs than ``band`` has blocks along its diagonal alone: m² numbers of a feed-forward
    layer of 53,248 outputs are 23 GB, and errors in different bands then have nothing to do with each other.

    Args:
        kind: one of the names above, R a number of rounds.
        m: outputs of the layer.
        n: its inputs.
        device: where gradients are; products are computed there.
        totals: side -> float64 zeros to add into, as ``InputMoment`` takes them; allocated on ``device`` by default.
        band: outputs of a block of H_O, at most (``output_bands``); 0 for all of them.
    """

    def __init__(
        self,
        kind: str,
        m: int,
        n: int,
        device: torch.device | str = "cpu",
        totals: Mapping[str, Tensor | None] | None = None,
        band: int = 0,
    ) -> None:
        self.kind, self._band = kind, band
        self.sides = {
            name: InputMoment(side.features, side.scaling, device, (totals or {}).get(name), side.bands)
            for name, side in sketch_sides(kind, m, n, band).items()
        }
        self._passed = 0
        self._weight: Tensor | None = None

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add one sequence: inputs ``x: [T, n]`` and gradients ``g: [T, m]`` at the outputs.

        Since any token reaches all others, one with NaN or Inf leaves its whole sequence out, which is counted.
        """
        if not _finite(x, g):
            for side in self._summed():
                self.sides[side].excluded += len(x)
        elif self.kind == "B":
            self._add_gradient(x, g)
            self.sides["tokens"].update(g)
        elif self.kind.startswith("A:"):
            self._add_weighted(x, g)
        else:
            output = self.sides["output"]
            output.update(g.reshape(-1, output.features))

    def turn(self) -> None:
        """All sequences were added: go on with the other side, where there are passes left."""
        if self._passed + 1 < sketch_passes(self.kind):
            (side,) = self._summed()
            H = self.sides[side].value().float()
            self._weight = H / H.square().sum(-1).sum()  # in two steps, whose bits do not depend on threads
            self._passed += 1
            (side,) = self._summed()
            self.sides[side].clear()

    def merge(self, other: Sketch) -> None:
        """Add what another sketch of this kind was fed in the same pass."""
        for side, moment in self.sides.items():
            moment.merge(other.sides[side])

    def value(self) -> dict[str, Tensor]:
        """Side -> factor, float64, as moments have them: ``output``, and ``input`` and ``tokens`` if summed."""
        return {side: moment.value() for side, moment in self.sides.items()}

    def take(self) -> dict[str, Tensor]:
        """``value()`` in the memory of the sums, which are gone with it."""
        return {side: moment.take() for side, moment in self.sides.items()}

    def _add_gradient(self, x: Tensor, g: Tensor) -> None:
        (tokens, n), m = x.shape, g.shape[1]
        if gradient_is_cheaper(tokens, m, n, self._band):
            G = gram(g, x)
            self.sides["input"].update(G)
            self.sides["output"].update(G.mT)
        else:
            self._add_through_tokens("input", x, g)
            self._add_through_tokens("output", g, x)

    def _add_through_tokens(self, side: str, own: Tensor, other: Tensor) -> None:
        """``GᵀG = Xᵀ (g gᵀ) X`` and ``G Gᵀ = gᵀ (X Xᵀ) g``, without G."""
        own, tokens = own.float(), gram(other.mT, other.mT)
        self.sides[side].add(own, tokens @ own, rows=other.shape[1])

    def _summed(self) -> list[str]:
        """The sides that this pass adds to: A begins with the input, and takes turns."""
        if not self.kind.startswith("A:"):
            return list(self.sides)
        return ["output" if self._passed % 2 else "input"]

    def _add_weighted(self, x: Tensor, g: Tensor) -> None:
        (side,) = self._summed()
        rows, fixed = (x, g) if side == "input" else (g, x)
        if self._weight is not None:
            fixed = fixed.float()
            rows = rows * _energies(fixed, self._weight).clamp_min(0.0).sqrt()
        self.sides[side].update(rows)


class HeldOut(Sequence[Tensor]):
    """Gradients ``G_s``, float32 ``[m, n]``, of a few sequences that no sketch has seen, formed as they are asked for.

    Of each sequence is kept what is smaller, in bfloat16: its gradient ``G_s: [m, n]``, or the inputs and gradients of
    its tokens, ``X: [T, n]`` and ``g: [T, m]``.

    Args:
        kept: per sequence ``(G_s,)`` or ``(X, g)``.
        device: where gradients are formed.
    """

    def __init__(self, kept: Iterable[tuple[Tensor, ...]] = (), device: torch.device | str = "cpu") -> None:
        self.kept, self._device = list(kept), device

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> HeldOut:
        """What ``tensors`` once gave."""
        return cls(zip(*tensors.values(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept of S sequences: ``G: [S, m, n]``, or ``X: [S, T, n]`` and ``g: [S, T, m]``."""
        parts = [torch.stack(part) for part in zip(*self.kept, strict=True)]
        return dict(zip(("G",) if len(parts) == 1 else ("X", "g"), parts, strict=True))

    def keep(self, x: Tensor, g: Tensor) -> None:
        """Keep one sequence, ``x: [T, n]`` and ``g: [T, m]``."""
        parts = (gram(g, x),) if _gradient_is_smaller(len(x), g.shape[1], x.shape[1]) else (x, g)
        self.kept.append(tuple(part.to("cpu", torch.bfloat16, copy=True) for part in parts))

    def on(self, device: torch.device | str) -> HeldOut:
        """The same, whose gradients are formed on another device, one at a time."""
        return HeldOut(self.kept, device)

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, sequence: int) -> Tensor: ...
    @overload
    def __getitem__(self, sequence: slice) -> HeldOut: ...
    def __getitem__(self, sequence: int | slice) -> Tensor | HeldOut:
        if isinstance(sequence, slice):
            return HeldOut(self.kept[sequence], self._device)
        first, *gradients = (part.to(self._device) for part in self.kept[sequence])
        return gram(gradients[0], first) if gradients else first.float()


def held_out_bytes(tokens: int, m: int, n: int) -> int:
    """Memory of one sequence that is held out, in bytes."""
    return 2 * (m * n if _gradient_is_smaller(tokens, m, n) else tokens * (m + n))


def gradient_is_cheaper(tokens: int, m: int, n: int, band: int = 0) -> bool:
    """Whether both products of G take fewer operations from G itself than through the products of tokens."""
    outputs = m * m // output_bands(m, band)
    return _through_gradient(tokens, m, n, outputs) <= _through_tokens(tokens, m, n, outputs)


def sketch_operations(kind: str, tokens: int, m: int, n: int, band: int = 0) -> float:
    """Floating point operations that a sequence takes in products, over all passes."""
    outputs = m * m // output_bands(m, band)
    if kind == "B":
        sides = min(_through_gradient(tokens, m, n, outputs), _through_tokens(tokens, m, n, outputs))
        return 2 * (sides + _TRIANGLE * tokens * outputs)
    if kind.startswith("A:"):
        rounds, summed = int(kind.removeprefix("A:")), _TRIANGLE * tokens * (outputs + n**2)
        return 2 * (rounds * (summed + tokens * (outputs + n**2)) + _TRIANGLE * tokens * n**2)
    return 2 * _TRIANGLE * tokens * outputs if kind == "full" else 2 * tokens * m


def _through_gradient(tokens: int, m: int, n: int, outputs: int) -> float:
    """With so many pairs of outputs that share a band; as below."""
    return tokens * m * n + _TRIANGLE * n * (outputs + m * n)


def _through_tokens(tokens: int, m: int, n: int, outputs: int) -> float:
    return 2 * tokens**2 * (m + n) + _TRIANGLE * tokens * (outputs + n**2)


def _gradient_is_smaller(tokens: int, m: int, n: int) -> bool:
    return m * n <= tokens * (m + n)


def _energies(rows: Tensor, H: Tensor) -> Tensor:
    """``rᵀ H r`` of each row ``[T, m]``, for H in one block or in several along its diagonal: ``[T, 1]``."""
    blocks = H.view(-1, *H.shape[-2:])
    parts = zip(rows.chunk(len(blocks), dim=1), blocks, strict=True)
    return torch.stack([((part @ block) * part).sum(-1, keepdim=True) for part, block in parts]).sum(0)


def _finite(x: Tensor, g: Tensor) -> bool:
    return bool(torch.isfinite(x.sum(dtype=torch.float32) + g.sum(dtype=torch.float32)))
