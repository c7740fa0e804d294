"""srr_dist: W ≈ Q + L·R for very large models, on a Ray cluster."""

import os
from pathlib import Path

__version__ = "0.1.0"


def _steady_products() -> None:
    """Let matrix products on Intel's processors have the same bits for any number of threads.

    There MKL cuts long sums among its threads unless it is told not to before its first product; thin products take a
    third longer for it, all others no longer. On AMD's processors it does not, and the setting has no strict form.
    """
    processors = Path("/proc/cpuinfo")
    if not processors.exists():
        return
    with processors.open() as file:
        if "GenuineIntel" in file.read(256):  # of what may be hundreds of processors, the first
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


_steady_products()
