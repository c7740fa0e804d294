"""Where random numbers begin."""

from __future__ import annotations

import hashlib


def layer_seed(seed: int, layer: str) -> int:
    """The seed of a layer's random numbers: from the run's seed and the layer's name, never from the order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{layer}".encode()).digest()[:8], "big") >> 1
