"""srr_dist: W ≈ Q + L·R for very large models, on a Ray cluster."""

__version__ = "0.1.0"
