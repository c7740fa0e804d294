"""``python -m srr_dist.plan``: what ``quantize`` with the same options would do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from srr_dist import quantize


def main(arguments: Sequence[str] | None = None) -> int:
    """``quantize --dry-run``; the output is not touched and need not be named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.startswith("--output") for argument in given):
        given += ["--output", "memory://plan"]
    return quantize.main([*given, "--dry-run"])


if __name__ == "__main__":
    sys.exit(main())
