"""What is measured on sequences held out: whether errors and moments fit the curvature of the network's own loss.

To second order, an error Δ of a layer changes the loss by ``½ E_s ⟨Δ, G_s⟩²``, with ``G_s: [m, n]`` the gradient of a
sequence's loss at labels drawn from the network's own predictions (then the expected outer product of gradients is the
curvature). A layer's gradient is ``G_s = Σ_t g_t x_tᵀ`` over the tokens, from its inputs ``X: [T, n]`` and the
gradients of its outputs ``g: [T, m]``; it is not formed here. ``H_O ⊗ H_I`` stands for ``E_s vec(G_s) vec(G_s)ᵀ`` in
rounding and in adapters (YAQA, arXiv 2505.22988). Where it was found from too few sequences, a solution for inputs
alone may be the better one: the smaller second-order estimate on other sequences decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from srr_dist.solve.metric import Metric, inner
from srr_dist.threads import one_thread


@dataclass(frozen=True)
class Trace:
    """A layer's part in one sequence.

    Attributes:
        X: float32 ``[T, n]``, its inputs.
        g: float32 ``[T, m]``, the gradients of the sequence's loss by its outputs.
    """

    X: Tensor
    g: Tensor

    def along(self, delta: Tensor) -> float:
        """``⟨Δ, G⟩ = Σ_t g_tᵀ Δ x_t`` of ``Δ: [m, n]``."""
        with one_thread():
            return inner(self.X @ delta.mT, self.g)

    def with_other(self, other: Trace) -> float:
        """``⟨G, G'⟩ = Σ_tt' (x_tᵀ x'_t') (g_tᵀ g'_t')``."""
        with one_thread():
            return inner(self.X @ other.X.mT, self.g @ other.g.mT)

    def energy(self, metric: Metric) -> float:
        """``tr(H_O G H_I Gᵀ)`` in the scaled metric, ``H_O`` as it is without damping."""
        with one_thread():
            by_input = metric.right(self.X) @ self.X.mT
            by_output = (self.g if metric.outputs is None else metric.outputs.right(self.g)) @ self.g.mT
        return inner(by_input, by_output)


def second_order(delta: Tensor, traces: Iterable[Trace]) -> float:
    """``mean_s ⟨Δ, G_s⟩²``: twice what the loss grows by, to second order.

    Args:
        delta: float32 ``[m, n]``, ``W − Ŵ``.
        traces: of sequences that neither the moments nor the solution have seen, one at least.
    """
    squares = [trace.along(delta) ** 2 for trace in traces]
    return sum(squares) / len(squares)


def kronecker_cosine(metric: Metric, traces: Sequence[Trace]) -> float:
    """The cosine between ``H_O ⊗ H_I`` and ``F = E vec(G) vec(G)ᵀ``, estimated on sequences held out, two at least.

    ``⟨H_O ⊗ H_I, F⟩ = E tr(H_O G H_I Gᵀ)`` and ``‖F‖² = E ⟨G, G'⟩²`` over pairs of different sequences, which has no
    bias; so the estimate may exceed 1 where there are few. Takes ``S² T² (m + n) / 2`` multiplications.
    """
    count = len(traces)
    projection = sum(trace.energy(metric) for trace in traces) / count
    pairs = [traces[a].with_other(traces[b]) ** 2 for a in range(count) for b in range(a)]
    H_I = inner(metric.H, metric.H)
    H_O = (
        traces[0].g.shape[1] if metric.outputs is None else inner(metric.outputs.H, metric.outputs.H)
    )  # the identity's
    return projection / sqrt(H_I * H_O * sum(pairs) / len(pairs))
