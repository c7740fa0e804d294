"""Statistics of a block's inputs and gradients, in pure torch."""

from srr_dist.calibration.moments import InputMoment, accumulator_shape, moment_bytes

__all__ = ["InputMoment", "accumulator_shape", "moment_bytes"]
