"""``srr-dist VERB …`` and ``python -m srr_dist VERB …``: the same verbs as ``python -m srr_dist.VERB``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "quantize": "quantize a checkpoint into W ≈ Q + L·R",
    "plan": "print what quantize would do: windows, memory, bytes",
    "status": "how far a run is, from storage alone",
    "verify": "check every file of a finished output",
    "evaluate": "perplexity and KL of an output against its original",
    "zoo": "many models under many recipes: quantize, evaluate, verify, and one page of results",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in VERBS:
        wants_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print("usage: srr-dist VERB …\n", file=sys.stdout if wants_help else sys.stderr)
        for verb, meaning in VERBS.items():
            print(f"  {verb:<9} {meaning}", file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    module = import_module(f"srr_dist.{arguments[0]}")
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
