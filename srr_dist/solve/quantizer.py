"""From a matrix to codes and scales: how scales are chosen, and which points of the grid are taken.

A grid says which values exist; two choices are left, and both may look at the metric.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from srr_dist.solve.descent import descend_across, descend_codes, pulls
from srr_dist.solve.grids import Grid
from srr_dist.solve.metric import Metric
from srr_dist.solve.rounding import gptq
from srr_dist.solve.scales import descend_scales, fit_scales, search_scales
from srr_dist.solve.wavefront import yaqa


@dataclass(frozen=True)
class Quantizer:
    """What turns ``W: [m, n]`` (float32) into a point of a grid.

    Attributes:
        grid: the values there are.
        scales: ``absmax`` (the grid's own) or ``search`` (least error, each input weighted by its moment).
        rounding: ``nearest``, ``gptq`` (each input's error is made up for by the inputs after it) or ``yaqa`` (and each
            output's by the outputs after it, where the metric has an output side). Under a diagonal moment errors of
            different inputs cannot make up for each other, nor those of different outputs without a full output side:
            the roundings are then the same.
    """

    grid: Grid
    scales: str = "absmax"
    rounding: str = "nearest"

    def damping(self, metric: Metric) -> float:
        """What was added to the moment's diagonal to factor it, in shares of its mean; 0 where nothing is factored."""
        return metric.feedback.damping if self._feeds_back(metric) else 0.0

    def quantize(self, W: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        """Codes, of the grid's type ``[m, n]``, and scales, bfloat16 ``[m, groups]``."""
        scale, zero = self._scales(W, metric)
        if self._crosses(metric):
            return self._crossed(W, metric, scale, zero), scale
        if self._feeds_back(metric):
            return gptq(W, scale, self.grid, metric.feedback, zero), scale
        return self.grid.encode(W, scale, zero), scale

    def _scales(self, W: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
        if self.scales == "absmax":
            return next(self.grid.candidates(W))
        return search_scales(W, self.grid, metric.weights)

    def descend(self, W: Tensor, metric: Metric, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Better codes, and scales if they may be chosen, from given ones, in a metric whose input side is full."""
        if self._crosses(metric):
            codes = self._descended(W, metric, codes, scale)
            return codes, fit_scales(W, codes, scale, self.grid, metric) if self.fits else scale
        codes = descend_codes(W, codes, scale, self.grid, pulls(metric.H))
        if self.fits:
            scale = descend_scales(W, codes, scale, self.grid, metric)
        return codes, scale

    def _crossed(self, W: Tensor, metric: Metric, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes with feedback both ways; outputs of different bands have nothing to do with each other."""
        outputs, inputs = metric.outputs, metric.feedback
        assert outputs is not None

        def codes(band: Metric, W: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
            return yaqa(W, scale, self.grid, inputs, band.feedback, zero)

        return outputs.by_band(codes, W, scale, *(() if zero is None else (zero,)))

    def _descended(self, W: Tensor, metric: Metric, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes that descend both ways, band by band."""
        assert metric.outputs is not None

        def better(band: Metric, W: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return descend_across(W, codes, scale, self.grid, metric.inputs.beside(band))

        return metric.outputs.by_band(better, W, codes, scale)

    @property
    def fits(self) -> bool:
        """Whether scales may follow codes."""
        return self.scales == "search" and self.grid.continuous

    def _crosses(self, metric: Metric) -> bool:
        return self.rounding == "yaqa" and not metric.separate

    def _feeds_back(self, metric: Metric) -> bool:
        return self.rounding != "nearest" and not metric.diagonal
