"""Statistics of a block's inputs, in pure torch."""

from srr_dist.calibration.moments import InputMoment, moment_bytes

__all__ = ["InputMoment", "moment_bytes"]
