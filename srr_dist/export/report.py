"""report.html: what report.json holds, as one page that needs no network and no script.

The page is a pure function of the report: the same content gives the same bytes. Whatever a run left out, or could
not measure, is shown as missing; nothing that was measured stops the page from being written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from srr_dist.export.layer_sections import gated, layer_sections, relative_error, two_sided
from srr_dist.export.markup import Html, join, page, section, table, tag
from srr_dist.export.pictures import bar, legend
from srr_dist.export.quantities import (
    MISSING,
    NBSP,
    count,
    counted,
    duration,
    finite,
    median,
    number,
    percent,
    plain,
    ratio,
    size,
)

Record = dict[str, Any]

SHADES = "abcdef"
NOTABLE = 1.01  # times the error of k = 0; less than that is the rounding of the factors


def render_report(report: dict[str, Any]) -> str:
    """The page for the content of a report.json.

    Args:
        report: format version 1. Any number in it may be null or NaN, and any list may be empty.
    """
    model = str(report["model"])
    made_by = " · ".join(f"{name} {version}" for name, version in report["created_by"].items())
    return page(
        f"{model} · quantization report",
        join([tag("h1", model), tag("p", "Q + L·R · run ", tag("code", report["fingerprint"]), class_="note")]),
        _sections(report),
        f"{made_by} · report format {report['format_version']}",
    )


def _sections(report: Record) -> Iterator[Html]:
    yield _tiles(report)
    if found := _findings(report):
        items = tag("ul", *(tag("li", text) for text in found))
        yield tag("section", tag("h2", "Worth a look"), items, class_="warn")
    if report["evaluations"]:
        yield _evaluations(report["evaluations"])
    yield from layer_sections(report["layers"])
    if report["stages"]:
        yield _stages(report["stages"])
    if report["unquantized"]:
        rows = [(tag("code", layer["name"]), layer["reason"]) for layer in report["unquantized"]]
        yield section("Layers left as they were", "", table(("layer", "reason"), rows, label="Unquantized layers"))
    pair = (_settings("Calibration", report["calibration"]), _settings("Configuration", report["config"]))
    yield tag("div", *pair, class_="pair")


def _tiles(report: Record) -> Html:
    totals, layers = report["totals"], report["layers"]
    parts = {name: number(totals, f"bits_{name}") or 0.0 for name in ("codes", "scales", "adapter")}
    shares = [(shade, bits) for shade, bits in zip("cab", parts.values(), strict=True)]
    split = legend((f"{name} {plain(bits)}", shade) for shade, (name, bits) in zip("cab", parts.items(), strict=True))
    written = (number(totals, "base_bytes") or 0.0) + (number(totals, "adapter_bytes") or 0.0)
    shrink = ratio(number(totals, "source_bytes"), written)
    gain = median(map(_beside_k0, layers))
    tiles = [
        (
            "bits per weight",
            plain(number(totals, "bits_per_weight")),
            bar(shares, sum(parts.values()), label="Bits"),
            split,
        ),
        (
            "base + adapter",
            size(written or None),
            f"source {size(number(totals, 'source_bytes'))}, {plain(shrink)}{NBSP}× as large; "
            f"adapter {size(number(totals, 'adapter_bytes'))}",
        ),
        (
            "weights quantized",
            count(number(totals, "quantized_parameters")),
            f"{counted(totals['layers'], 'layer')} in {counted(totals['blocks'], 'block')}; "
            f"{len(report['unquantized'])} left as they were",
        ),
        (
            "median relative error",
            percent(median(relative_error(layer, "stored") for layer in layers)),
            f"{plain(gain, 2)}{NBSP}× the error of k{NBSP}={NBSP}0",
        ),
    ]
    if tuned := [layer["tuning"] for layer in layers if "tuning" in layer]:
        rest = median(ratio(number(tuning, "after"), number(tuning, "before")) for tuning in tuned)
        tiles.append(("tuning", f"{plain(rest, 2)}{NBSP}×", "median of the blocks' errors after by before"))
    if judged := gated(layers):
        taken = percent(ratio(two_sided(judged), len(judged)), 2)
        tiles.append(("for the network's output", taken, "of the layers, by gradients held out"))
    if report["evaluations"]:
        first = report["evaluations"][0]
        original = plain(number(first, "perplexity_original"), 4)
        tiles.append(("perplexity", plain(number(first, "perplexity"), 4), f"original {original} · {first['text']}"))
        agreement = percent(number(first, "top1_agreement"))
        tiles.append(("KL, nats per token", plain(number(first, "kl")), f"same top token {agreement}"))
    tiles.append(("wall time", duration(number(totals, "seconds")), f"{counted(len(report['stages']), 'stage')}"))
    return tag("div", *(_tile(*tile) for tile in tiles), class_="tiles")


def _tile(name: str, value: str, *below: str) -> Html:
    return tag("div", tag("span", name, class_="sub"), tag("b", value), tag("div", *below, class_="sub"), class_="tile")


def _findings(report: Record) -> list[str]:
    """What a reader should see before the good news."""
    layers = report["layers"]
    broken = [layer["name"] for layer in layers if _is_broken(layer)]
    worse = [layer["name"] for layer in layers if (_beside_k0(layer) or 0) > NOTABLE]
    found = []
    if broken:
        found.append(f"objective not finite in {counted(len(broken), 'layer')}: {_some(broken)}")
    if worse:
        found.append(f"error above that of k = 0 in {counted(len(worse), 'layer')}: {_some(worse)}")
    if excluded := number(report["calibration"], "excluded_rows"):
        found.append(f"NaN or Inf in {counted(round(excluded), 'calibration row')}, which the moments leave out")
    judged = gated(layers)
    if 2 * two_sided(judged) < len(judged):
        found.append(
            f"gradients of {counted(report['calibration']['num_samples'], 'sequence')} seem too few to round against "
            f"the network's output: those held out prefer the other solution in most of "
            f"{counted(len(judged), 'layer')}; more and shorter sequences of the same text would serve better"
        )
    over = [
        f"{size(peak)} instead of {size(planned)} in stage {stage['stage']} of window {stage['window']}"
        for stage in report["stages"]
        if (peak := number(stage, "peak_memory")) and (planned := number(stage, "planned_memory")) and peak > planned
    ]
    if over:
        found.append(f"more memory than planned in {counted(len(over), 'stage')}: {_some(over)}")
    return found


def _is_broken(layer: Record) -> bool:
    return any(value is not None and finite(value) is None for value in layer["objective"].values())


def _beside_k0(layer: Record) -> float | None:
    return ratio(relative_error(layer, "stored"), relative_error(layer, "k0"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _evaluations(evaluations: list[Record]) -> Html:
    headings = (
        "text",
        "tokens",
        "original perplexity",
        "perplexity",
        "KL, nats",
        "same top token",
        "acceptance",
        "bits",
    )
    rows = [
        (
            each["text"],
            count(number(each, "tokens")),
            plain(number(each, "perplexity_original"), 4),
            plain(number(each, "perplexity"), 4),
            plain(number(each, "kl")),
            percent(number(each, "top1_agreement")),
            percent(number(each, "expected_acceptance")),
            plain(number(each, "bits_per_weight")),
        )
        for each in evaluations
    ]
    note = "Per token, against the original model on the same tokens; acceptance as for speculative decoding."
    return section("Evaluation", note, table(headings, rows, label="Evaluations", numeric=range(1, 8)))


def _stages(stages: list[Record]) -> Html:
    phases = list(dict.fromkeys(phase for stage in stages for phase in stage["seconds"]))
    shade = {phase: SHADES[min(i, len(SHADES) - 1)] for i, phase in enumerate(phases)}
    spent = [{phase: number(stage["seconds"], phase) or 0.0 for phase in stage["seconds"]} for stage in stages]
    longest = max(sum(times.values()) for times in spent)
    peaks = [(number(stage, "peak_memory"), number(stage, "planned_memory")) for stage in stages]
    largest = max(value or 0.0 for pair in peaks for value in pair)
    rows = []
    for stage, times, (peak, planned) in zip(stages, spent, peaks, strict=True):
        words = ", ".join(f"{phase} {duration(value)}" for phase, value in times.items())
        time = bar(((shade[phase], value) for phase, value in times.items()), longest, label=words)
        memory = bar([("f", peak or 0.0)], largest, label=f"{size(peak)} of {size(planned)}", target=planned)
        blocks = _span(stage["blocks"])
        who = (str(stage["window"]), str(stage["stage"]), blocks, stage["device"])
        rows.append(
            (*who, tag("div", time, title=words), duration(sum(times.values())), memory, size(peak), size(planned))
        )
    headings = ("window", "stage", "blocks", "device", "time by phase", "", "memory", "peak", "planned")
    key = legend([*shade.items(), ("peak memory", "f"), ("planned memory", "target")])
    return section("Stages", "", key, table(headings, rows, label="Stages", numeric=(5, 7, 8)))


def _span(blocks: list[int]) -> str:
    if not blocks:
        return MISSING
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1]}"


def _settings(title: str, values: Record) -> Html:
    shown = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    entries = (part for key, text in shown for part in (tag("dt", key), tag("dd", tag("code", text))))
    return section(title, "", tag("dl", *entries))
