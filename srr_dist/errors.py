"""Everything that srr_dist raises on purpose.

SrrError
├── ConfigError        a flag, recipe field or preset is wrong            (exit code 2)
├── CheckpointError    the source model cannot be read or is unsupported  (exit code 2)
├── CalibrationError   the calibration data is wrong or too little        (exit code 2)
├── OutputError        the output location holds something else           (exit code 2)
├── StoreError         storage answered in a way that cannot be worked with (exit code 1)
├── PipelineError      a worker or a unit of work failed for good         (exit code 1)
├── QuarantineError    some units were set aside, all others are done     (exit code 3)
└── StoppedError       the run was asked to stop and can be resumed       (exit code 75, EX_TEMPFAIL)
    └── LeaseError     another driver works on the same output            (exit code 75)

Every message says what is wrong, which object it is about, what was expected and found, and what to do.
"""

from __future__ import annotations


class SrrError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class ConfigError(SrrError):
    """A flag, a recipe field or a preset has a wrong value; the message names the field."""

    exit_code = 2


class CheckpointError(SrrError):
    """The source checkpoint is missing, damaged or of an unsupported kind; the message names file and tensor."""

    exit_code = 2


class CalibrationError(SrrError):
    """Calibration or evaluation text cannot be used; the message names file and position."""

    exit_code = 2


class OutputError(SrrError):
    """The output location holds another run's data or is not a finished output."""

    exit_code = 2


class StoreError(SrrError):
    """An object is missing, damaged or could not be written; the message names its path."""


class PipelineError(SrrError):
    """A worker or a unit of work failed for good; the message names the unit."""


class QuarantineError(SrrError):
    """Units that keep failing were set aside and all others are committed; the same command tries them again."""

    exit_code = 3


class StoppedError(SrrError):
    """The run was asked to stop; everything committed is kept, the same command goes on from there."""

    exit_code = 75


class LeaseError(StoppedError):
    """Another driver works on the same output; the message names it."""
