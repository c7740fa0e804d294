"""index.json and index.html of a zoo: a row per result."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from srr_dist.catalog.entries import Entry
from srr_dist.export.markup import Html, join, page, section, table, tag
from srr_dist.export.quantities import duration, number, plain, size
from srr_dist.store import ObjectStore

INDEX_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One result as the index shows it."""

    name: str
    model: str
    recipe: str
    status: str = "queued"
    """queued, running, done, failed, quarantined or stopped."""
    note: str = ""
    """The step that runs, or why the last one did not succeed."""
    figures: dict[str, Any] = field(default_factory=dict)
    """As ``results.figures``, of what is done."""
    log: bool = False
    """Whether there is one."""

    @classmethod
    def of(cls, entry: Entry) -> Row:
        """An entry that nothing was done for yet."""
        return cls(entry.name, entry.config.quantize.model, entry.recipe)


def write_index(store: ObjectStore, rows: list[Row]) -> None:
    """Replace both views."""
    document = {"format_version": INDEX_FORMAT, "results": [_as_json(row) for row in rows]}
    store.put("index.json", (json.dumps(document, indent=1) + "\n").encode())
    store.put("index.html", render_index(rows).encode())


def render_index(rows: list[Row]) -> str:
    """The page; equal rows give equal bytes."""
    counts = Counter(row.status for row in rows)
    summary = f"{len(rows)} results: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    headings = ("result", "model", "recipe", "status", "bits", "KL, nats", "perplexity", "size", "worker time", "log")
    note = "Perplexity of the original, then of the quantized model; bits per quantized weight, adapters included."
    content = section("Results", note, table(headings, map(_cells, rows), label="Results", numeric=(4, 5, 6, 7, 8)))
    header = join([tag("h1", "Quantized models"), tag("p", summary, class_="note")])
    return page("Quantized models", header, [content], f"index format {INDEX_FORMAT}")


def _cells(row: Row) -> tuple[str, ...]:
    values = row.figures
    name = tag("a", row.name, href=_report(row)) if row.status == "done" else row.name
    original, quantized = (plain(number(values, key), 4) for key in ("perplexity_original", "perplexity"))
    note = [tag("div", row.note, class_="sub")] if row.note else []
    return (
        name,
        tag("code", row.model),
        row.recipe,
        tag("div", tag("b", row.status), *note),
        plain(number(values, "bits_per_weight")),
        plain(number(values, "kl")),
        f"{original} → {quantized}",
        size(number(values, "bytes")),
        duration(number(values, "seconds")),
        tag("a", "log", href=_log(row)) if row.log else Html(),
    )


def _as_json(row: Row) -> dict[str, Any]:
    report, log = _report(row) if row.status == "done" else None, _log(row) if row.log else None
    return asdict(row) | {"report": report, "log": log}


def _report(row: Row) -> str:
    return f"{row.name}/report.html"


def _log(row: Row) -> str:
    return f"logs/{row.name}.log"
