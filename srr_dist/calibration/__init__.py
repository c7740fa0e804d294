"""Statistics of a block's inputs and gradients, in pure torch."""

from srr_dist.calibration.moments import (
    InputMoment,
    accumulator_shape,
    first_token_weight,
    moment_bytes,
    waiting_bytes,
)

__all__ = ["InputMoment", "accumulator_shape", "first_token_weight", "moment_bytes", "waiting_bytes"]
