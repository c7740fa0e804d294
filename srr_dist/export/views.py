"""What people look at: report.json, report.html and README.md of an output, made anew from records and evaluations."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from srr_dist.export.base import bits_per_weight
from srr_dist.export.card import CardFacts, model_card
from srr_dist.export.report import render_report
from srr_dist.store import BlockRecord, Manifest, ObjectStore, RunArea, read_complete
from srr_dist.store.documents import encode

REPORT_FORMAT = 1
FIGURES = ("perplexity_original", "perplexity", "kl", "top1_agreement", "expected_acceptance")


def write_views(area: RunArea) -> dict[str, Any]:
    """Write the three views of a finished output; returns the content of report.json.

    They hold times and so differ from run to run: the manifest names none of them.
    """
    manifest = read_complete(area.store)
    report = build_report(area.run(), area.records(check_sizes=False), manifest, _evaluations(area))
    area.store.put("report.json", (json.dumps(report, indent=1) + "\n").encode())
    area.store.put("report.html", render_report(report).encode())
    area.store.put("README.md", model_card(_facts(report, manifest)).encode())
    return report


def add_evaluation(store: ObjectStore, figures: Mapping[str, Any]) -> None:
    """Keep the figures of an evaluation with the output they belong to, and show them in its views."""
    area = RunArea(store, read_complete(store).fingerprint)
    measured = {key: figures[key] for key in ("text_sha256", "num_samples", "seq_len")}
    name = hashlib.sha256(encode(measured, "evaluation")).hexdigest()[:16]
    store.put(area.path(f"evaluations/{name}.json"), encode(dict(figures), "evaluation"))
    write_views(area)


def build_report(
    run: Mapping[str, Any],
    records: Mapping[str, BlockRecord],
    manifest: Manifest,
    evaluations: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of report.json: configuration, totals, every layer, every stage, calibration, evaluations."""
    ordered = [records[unit] for unit in run["units"]]
    layers = [layer for record in ordered for layer in record.layers]
    return {
        "format_version": REPORT_FORMAT,
        "model": run["model"],
        "fingerprint": manifest.fingerprint,
        "created_by": run["created_by"],
        "config": run["identity"],
        "totals": _totals(run, ordered, layers, manifest),
        "layers": layers,
        "stages": _stages(ordered),
        "calibration": run["calibration"]
        | {
            "tokens": run["calibration"]["num_samples"] * run["calibration"]["seq_len"],
            "excluded_rows": sum(layer["excluded_rows"] for layer in layers),
        },
        "unquantized": run["unquantized"],
        "evaluations": evaluations,
    }


def _totals(
    run: Mapping[str, Any], records: list[BlockRecord], layers: list[dict[str, Any]], manifest: Manifest
) -> dict[str, Any]:
    chosen = list(manifest.layers.values())
    codes_only = [layer | {"rank": 0} for layer in chosen]
    bits = _mean_bits(manifest)
    return {
        "blocks": len(records) - 1,
        "layers": len(layers),
        "quantized_parameters": sum(m * n for m, n in (layer["shape"] for layer in layers)),
        "bits_per_weight": bits_per_weight(chosen),
        "bits_codes": bits,
        "bits_scales": bits_per_weight(codes_only) - bits,
        "bits_adapter": bits_per_weight(chosen) - bits_per_weight(codes_only),
        "seconds": sum(sum(record.seconds.values()) for record in records),
        "base_bytes": _folder_bytes(manifest, "base/"),
        "adapter_bytes": _folder_bytes(manifest, "adapter/"),
        "source_bytes": run["source_bytes"],
        "dense_bytes": run["dense_bytes"],
    }


def _stages(records: list[BlockRecord]) -> list[dict[str, Any]]:
    """One entry per stage and window: its blocks, the seconds they took by phase, memory planned and measured."""
    groups: dict[tuple[int, int], list[BlockRecord]] = defaultdict(list)
    for record in records:
        if record.stage:
            groups[record.stage["window"], record.stage["stage"]].append(record)
    return [
        {
            "stage": stage,
            "window": window,
            "blocks": [int(record.unit) for record in group],
            "device": group[0].stage["device"],
            "seconds": {
                phase: sum(record.seconds.get(phase, 0.0) for record in group)
                for phase in ("read", "calibrate", "solve", "tune", "write")
                if phase != "tune" or any(phase in record.seconds for record in group)
            },
            "peak_memory": max(_memory(record.stage["peak_memory"]) for record in group),
            "planned_memory": _memory(group[0].stage["planned_memory"]),
        }
        for (window, stage), group in sorted(groups.items())
    ]


def _memory(places: Mapping[str, int]) -> int:
    """The scarcer place's bytes: a GPU's where there is one."""
    return places.get("gpu", places["host"])


def _facts(report: Mapping[str, Any], manifest: Manifest) -> CardFacts:
    config, totals = report["config"], report["totals"]
    return CardFacts(
        model=report["model"],
        method=config["method"],
        widths=tuple(sorted({layer["bits"] for layer in manifest.layers.values()})),
        group_size=config["group_size"],
        symmetric=all(layer.get("symmetric", True) for layer in manifest.layers.values()),
        codebook=next((layer["codebook"] for layer in manifest.layers.values() if "codebook" in layer), None),
        rank=max((layer["rank"] for layer in manifest.layers.values()), default=0),
        bits_per_weight=totals["bits_per_weight"],
        base_bytes=totals["base_bytes"],
        adapter_bytes=totals["adapter_bytes"],
        dense_bytes=totals["dense_bytes"],
        exports=tuple(manifest.exports),
        evaluation={
            f"{figure}, {each['text']} ({each['tokens']:,} tokens)": each[figure]
            for each in report["evaluations"]
            for figure in FIGURES
        },
    )


def _mean_bits(manifest: Manifest) -> float:
    """Bits of a code, over the quantized weights."""
    weights = {name: math.prod(layer["shape"]) for name, layer in manifest.layers.items()}
    stored = sum(layer["bits"] * weights[name] for name, layer in manifest.layers.items())
    return stored / total if (total := sum(weights.values())) else math.nan


def _folder_bytes(manifest: Manifest, folder: str) -> int:
    return sum(entry.size for path, entry in manifest.files.items() if path.startswith(folder))


def _evaluations(area: RunArea) -> list[dict[str, Any]]:
    return [area.store.get_json(path) for path in area.store.list(area.path("evaluations"))]
