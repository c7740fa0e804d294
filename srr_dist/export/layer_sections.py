"""The sections of the report that show the layers: error, split and spectrum over depth, types, worst layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from srr_dist.export.markup import Html, section, table, tag
from srr_dist.export.pictures import Line, bar, depth_axis, depth_map, legend, log_axis, panel, spectrum
from srr_dist.export.quantities import duration, finite, median, number, percent, plain, ratio
from srr_dist.solve import ONE_SIDED, TWO_SIDED

Record = dict[str, Any]
Measure = Callable[[Record], float | None]

CHOICES = {"k0": "k = 0", "criterion": "criterion's k", "chosen": "chosen k"}
STYLES = {"k0": "zero", "criterion": "criterion", "chosen": "chosen"}
WORST = 10


def layer_sections(layers: list[Record]) -> Iterator[Html]:
    """The sections, top to bottom; none where the run quantized no layer.

    Args:
        layers: the ``layers`` of a report.json.
    """
    if layers:
        yield _errors(layers)
        yield _splits(layers)
        yield _spectra(layers)
        if judged := gated(layers):
            yield _gates(judged)
        yield _types(layers)
        yield _worst(layers)


def relative_error(layer: Record, choice: str) -> float | None:
    """``tr(Δ H Δᵀ) / tr(W H Wᵀ)`` of a layer at one choice of k; None where a part was not measured."""
    return ratio(number(layer["objective"], choice), number(layer, "energy"))


def gated(layers: list[Record]) -> list[Record]:
    """The layers between whose two solutions gradients held out decided."""
    return [layer for layer in layers if "gate" in layer]


def two_sided(judged: list[Record]) -> int:
    """How many of these layers were solved for their error at the network's output, rather than at their own."""
    return sum(layer["gate"]["chosen"] == TWO_SIDED for layer in judged)


def by_type(layers: list[Record]) -> dict[str, list[Record]]:
    """The layers of every type, types in the order in which the model has them."""
    groups: dict[str, list[Record]] = {}
    for layer in layers:
        groups.setdefault(layer["type"], []).append(layer)
    return groups


def over_depth(layers: list[Record], measure: Measure) -> dict[int, float | None]:
    """The measure by block; of several layers in one block, such as experts, the median."""
    blocks: dict[int, list[Record]] = {}
    for layer in layers:
        blocks.setdefault(layer["block"], []).append(layer)
    return {block: median(map(measure, blocks[block])) for block in sorted(blocks)}


def _error(choice: str) -> Measure:
    return lambda layer: relative_error(layer, choice)


def _field(name: str) -> Measure:
    return lambda layer: number(layer, name)


def _errors(layers: list[Record]) -> Html:
    note = "tr(Δ H Δᵀ) / tr(W H Wᵀ), the share of a layer's output energy that is lost, by block; one scale for all."
    y = log_axis(relative_error(layer, choice) for layer in layers for choice in CHOICES)
    if y is None:
        return section("Relative error over depth", "No error was measured.")
    x = depth_axis(layer["block"] for layer in layers)
    panels = []
    for name, group in by_type(layers).items():
        curves = {choice: over_depth(group, _error(choice)) for choice in CHOICES}
        notes = {
            block: "\n".join((f"block {block}", *(f"{CHOICES[c]}: {percent(curves[c][block])}" for c in CHOICES)))
            for block in curves["k0"]
        }
        lines = [Line(STYLES[choice], list(curve.items())) for choice, curve in curves.items()]
        middle = ", ".join(f"{CHOICES[c]} {percent(median(curve.values()))}" for c, curve in curves.items())
        label = f"{name}: median relative error {middle}"
        panels.append(panel(name, lines, x, y, label=label, tick=lambda v: percent(v, 1), notes=notes))
    key = legend((text, STYLES[choice]) for choice, text in CHOICES.items())
    return section("Relative error over depth", note, key, tag("div", *panels, class_="panels"))


def _splits(layers: list[Record]) -> Html:
    ranks = [rank for layer in layers if (rank := number(layer, "rank"))]
    blocks = sorted({layer["block"] for layer in layers})
    maps = []
    for field, title in (("k", "Chosen k"), ("k_criterion", "The criterion's k")):
        if ranks and any(number(layer, field) is not None for layer in layers):
            rows = {name: over_depth(group, _field(field)) for name, group in by_type(layers).items()}
            drawing = depth_map(rows, blocks, max(ranks), label=f"{title} by layer type and block")
            maps.append(tag("figure", tag("figcaption", title), tag("div", drawing, class_="wide")))
    if not maps:
        return section("Split of the rank budget", "No layer has a split: the run made no adapter or chose no k.")
    note = (
        f"k of r directions of W are kept out of the quantizer; full colour is k = {plain(max(ranks))}, the largest r."
    )
    return section("Split of the rank budget", note, *maps)


def _spectra(layers: list[Record]) -> Html:
    curves = {layer["name"]: _shares(layer) for layer in layers}
    y = log_axis(value for curve in curves.values() for _, value in curve)
    if y is None:
        return section("Singular values of the adapter", "No singular values were recorded.")
    x = depth_axis([1, max(len(layer["singular_values"]) for layer in layers)])
    first, last = min(layer["block"] for layer in layers), max(layer["block"] for layer in layers)
    panels = []
    for name, group in by_type(layers).items():
        fades = [(layer["block"] - first) / (last - first) if last > first else 1.0 for layer in group]
        lines = [Line("spectrum", curves[layer["name"]], fade) for layer, fade in zip(group, fades, strict=True)]
        label = f"{name}: singular values of {len(group)} layers, first to last"
        panels.append(panel(name, lines, x, y, label=label, tick=lambda v: plain(v, 1)))
    note = "σᵢ of L R in the metric of H over √tr(W H Wᵀ), a line per layer, i to the right."
    key = legend({f"block {first}": "early", f"block {last}": "late"}.items())
    return section("Singular values of the adapter", note, key, tag("div", *panels, class_="panels"))


def _shares(layer: Record) -> list[tuple[float, float | None]]:
    energy = number(layer, "energy")
    if not energy or energy < 0:
        return []
    values = layer["singular_values"]
    return [(at, ratio(finite(value), math.sqrt(energy))) for at, value in spectrum(values)]


def _gates(layers: list[Record]) -> Html:
    """What sequences held out say of the two solutions of each layer."""
    groups, rows = by_type(layers), []
    for name, group in groups.items():
        gates = [layer["gate"] for layer in group]
        estimates = [gate["second_order"] for gate in gates]
        beside = median(ratio(number(each, TWO_SIDED), number(each, ONE_SIDED)) for each in estimates)
        cosine = median(number(gate, "cosine") for gate in gates)
        taken = f"{two_sided(group)} of {len(group)}"
        rows.append((tag("code", name), taken, f"{plain(beside, 2)} ×", plain(cosine, 2)))
    kept = {name: over_depth(group, lambda layer: float(two_sided([layer]))) for name, group in groups.items()}
    blocks = sorted({layer["block"] for layer in layers})
    drawing = depth_map(kept, blocks, 1.0, label="Layers solved for the network's output, by type and block")
    note = (
        "Each layer was solved for its own output, and for the network's by what its gradients left. The latter is "
        "kept (coloured) unless it changes the loss more, to second order and beyond doubt, on gradients held out. "
        "The cosine, of H_O ⊗ H_I with what it stands for, is near 1 where that fits."
    )
    headings = ("type", "for the network's output", "its change of the loss beside the other's", "cosine")
    return section(
        "Rounding against the network's output",
        note,
        tag("figure", tag("figcaption", "Which solution was kept"), tag("div", drawing, class_="wide")),
        table(headings, rows, label="Gates by layer type, medians", numeric=(1, 2, 3)),
    )


def _types(layers: list[Record]) -> Html:
    headings = ("type", "layers", "shape", "rank", "k", "criterion's k")
    errors = ("error at k = 0", "at criterion's k", "at chosen k", "as stored", "bits", "solve", "search of k")
    rows = []
    for name, group in by_type(layers).items():
        shapes = sorted({"×".join(map(str, layer["shape"])) for layer in group})
        lost = (percent(median(map(_error(choice), group))) for choice in (*CHOICES, "stored"))
        counts = (plain(median(map(_field(field), group))) for field in ("rank", "k", "k_criterion"))
        bits = plain(median(map(_field("bits_per_weight"), group)))
        solve, search = (sum(number(layer["seconds"], of) or 0.0 for layer in group) for of in ("solve", "search"))
        times = (duration(solve), percent(ratio(search, solve)))
        rows.append((tag("code", name), str(len(group)), ", ".join(shapes), *counts, *lost, bits, *times))
    note = (
        "Medians over the layers of a type; as stored is the chosen k with the factors rounded to bfloat16. The "
        "search of k is a share of the time to solve."
    )
    return section(
        "By layer type", note, table(headings + errors, rows, label="Layer types", numeric=(1, *range(3, 13)))
    )


def _worst(layers: list[Record]) -> Html:
    measured = [(error, layer) for layer in layers if (error := relative_error(layer, "stored")) is not None]
    worst = sorted(measured, key=lambda pair: -pair[0])[:WORST]
    headings = ("layer", "shape", "rank", "k", "relative error", "", "beside k = 0", "bits", "damping")
    rows = [
        (
            tag("code", layer["name"]),
            "×".join(map(str, layer["shape"])),
            plain(number(layer, "rank")),
            plain(number(layer, "k")),
            percent(error),
            bar([("chosen", error)], worst[0][0], label=percent(error)),
            f"{plain(ratio(error, relative_error(layer, 'k0')), 2)} ×",
            plain(number(layer, "bits_per_weight")),
            plain(number(layer, "damping")),
        )
        for error, layer in worst
    ]
    if not rows:
        return section("Largest errors", "No stored error was measured.")
    return section(
        "Largest errors",
        "By stored relative error.",
        table(headings, rows, label="Worst layers", numeric=(2, 3, 4, 6, 7, 8)),
    )
