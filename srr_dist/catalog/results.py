"""What is finished in a zoo's output, from storage alone.

<output>/<name>/                 the output of one run
<output>/results/<name>.json     written once it is quantized, evaluated and verified: settings and manifest
<output>/logs/<name>.log         what its commands printed
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from srr_dist.catalog.entries import Entry, Evaluation
from srr_dist.errors import StoreError
from srr_dist.store import ObjectStore
from srr_dist.store.documents import encode, parse
from srr_dist.store.manifest import COMMIT

log = logging.getLogger(__name__)

MEASURED = ("kl", "perplexity_original", "perplexity")
REPORT = "report.json"


@dataclass(frozen=True)
class Result:
    """Which output was finished under which settings."""

    settings: str
    commit: str


def record(store: ObjectStore, entry: Entry) -> None:
    """Note that the entry is quantized, evaluated and verified."""
    store.put(_path(entry), encode(_now(store, entry), _path(entry)))


def figures(store: ObjectStore, entry: Entry) -> dict[str, Any] | None:
    """What an entry came to, from its report: numbers by name, None where not measured.

    None if it was not finished as it stands in the zoo file, or its output is not the one any more.
    """
    needed = (_path(entry), _inside(entry, COMMIT), _inside(entry, REPORT))
    if not all(map(store.exists, needed)):
        return None
    try:
        if parse(Result, store.get(_path(entry)), store.location(_path(entry))) != _now(store, entry):
            return None
        return _figures(store.get_json(_inside(entry, REPORT)), entry.evaluation)
    except (StoreError, LookupError, TypeError) as error:
        log.warning("%s: its result does not count: %s", entry.name, error)
        return None


def _figures(report: dict[str, Any], evaluation: Evaluation | None) -> dict[str, Any]:
    totals, asked = report["totals"], vars(evaluation).items() if evaluation else None
    measured: dict[str, Any] = {}
    for each in report["evaluations"]:
        if asked is not None and asked <= each.items():
            measured = each
    return {
        "bits_per_weight": totals["bits_per_weight"],
        "bytes": totals["base_bytes"] + totals["adapter_bytes"],
        "seconds": totals["seconds"],
    } | {name: measured.get(name) for name in MEASURED}


def _now(store: ObjectStore, entry: Entry) -> Result:
    return Result(entry.settings, store.get(_inside(entry, COMMIT)).decode("ascii", "replace"))


def _inside(entry: Entry, name: str) -> str:
    return f"{entry.name}/{name}"


def _path(entry: Entry) -> str:
    return f"results/{entry.name}.json"
