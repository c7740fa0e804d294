"""What is finished in a zoo's output, from storage alone.

<output>/<name>/                 the output of one run
<output>/results/<name>.json     written once it is quantized, evaluated and verified: settings and manifest
<output>/logs/<name>.log         what its commands printed
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from srr_dist.catalog.entries import Entry, Evaluation
from srr_dist.errors import StoreError
from srr_dist.export import is_complete
from srr_dist.store import ObjectStore
from srr_dist.store.documents import encode, parse
from srr_dist.store.manifest import MANIFEST

log = logging.getLogger(__name__)

MEASURED = ("kl", "perplexity_original", "perplexity")
REPORT = "report.json"


@dataclass(frozen=True)
class Result:
    """Which output was finished under which settings."""

    settings: str
    manifest_sha256: str


def record(store: ObjectStore, entry: Entry) -> None:
    """Note that the entry is quantized, evaluated and verified."""
    store.put(_path(entry), encode(_now(_output(entry), entry), _path(entry)))


def figures(store: ObjectStore, entry: Entry) -> dict[str, Any] | None:
    """What an entry came to, from its report: numbers by name, None where not measured.

    None if it was not finished as it stands in the zoo file, or its output is not complete or not the one any more.
    """
    path, output = _path(entry), _output(entry)
    if not (store.exists(path) and is_complete(output, entry.config.job.export) and output.exists(REPORT)):
        return None
    try:
        if parse(Result, store.get(path), store.location(path)) != _now(output, entry):
            return None
        return _figures(output.get_json(REPORT), entry.evaluation)
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


def _now(output: ObjectStore, entry: Entry) -> Result:
    return Result(entry.settings, hashlib.sha256(output.get(MANIFEST)).hexdigest())


def _output(entry: Entry) -> ObjectStore:
    return ObjectStore(entry.config.job.output, entry.config.job.single_driver)


def _path(entry: Entry) -> str:
    return f"results/{entry.name}.json"
