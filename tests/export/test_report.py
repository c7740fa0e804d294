"""The report page: well formed, complete, without requests, and writable whatever a run left unmeasured."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from srr_dist.export.pictures import Axis, Line, bar, depth_map, log_axis, panel, spectrum
from srr_dist.export.quantities import count, duration, percent, plain, size
from srr_dist.export.report import render_report

TYPES = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NAN = float("nan")


def layer(block: int, kind: str, place: int, rank: int) -> dict[str, Any]:
    error = 0.01 * (1 + place) * (1 + block / 10)
    return {
        "name": f"model.layers.{block}.{kind}",
        "type": kind,
        "block": block,
        "shape": [64, 96],
        "rank": rank,
        "k": (block + place) % 5 if rank else None,
        "k_criterion": 4 if rank else None,
        "objective": {
            "k0": 50 * error,
            "criterion": 40 * error if rank else None,
            "chosen": 30 * error,
            "stored": 31 * error,
        },
        "energy": 50.0,
        "singular_values": [3.0 / (i + 1) for i in range(rank)],
        "seed": 7,
        "damping": 0.0,
        "bits_per_weight": 4.9,
        "seconds": {"solve": 1.5},
    }


def make_report(blocks: int = 3, types: tuple[str, ...] = TYPES, rank: int = 8) -> dict[str, Any]:
    layers = [layer(block, kind, place, rank) for block in range(blocks) for place, kind in enumerate(types)]
    seconds = {"read": 2.0, "calibrate": 40.0, "solve": 30.0, "write": 1.0}
    return {
        "format_version": 1,
        "model": "org/model",
        "fingerprint": "9c1f" * 16,
        "created_by": {"srr_dist": "0.1.0", "torch": "2.13.0"},
        "config": {"method": "srr" if rank else "none", "bits": 3, "rank": rank, "exclude": ["lm_head"]},
        "totals": {
            "blocks": blocks,
            "layers": len(layers),
            "quantized_parameters": 106e6,
            "bits_per_weight": 4.9,
            "bits_codes": 3.0,
            "bits_scales": 0.5,
            "bits_adapter": 1.4,
            "seconds": 301.2,
            "base_bytes": 90 * 2**20,
            "adapter_bytes": 10 * 2**20,
            "source_bytes": 250 * 2**20,
        },
        "layers": layers,
        "stages": [
            {
                "stage": stage,
                "window": 0,
                "blocks": [stage],
                "device": "cpu",
                "seconds": seconds,
                "peak_memory": 2**30,
                "planned_memory": 2**31,
            }
            for stage in range(2)
        ],
        "calibration": {"source": "wiki", "num_samples": 64, "tokens": 65536, "sha256": "ab" * 32, "excluded_rows": 0},
        "unquantized": [{"name": "lm_head", "reason": "outside the blocks"}],
        "evaluations": [
            {
                "text": "wikitext2/test",
                "tokens": 8192,
                "perplexity_original": 29.19,
                "perplexity": 53.9,
                "kl": 0.496,
                "top1_agreement": 0.723,
                "expected_acceptance": 0.741,
                "bits_per_weight": 4.9,
            }
        ],
    }


class Page(HTMLParser):
    """Parses strictly: every element closed in order. Collects elements by class, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.classes.update(f"{tag}.{name}" for name in (dict(attrs).get("class") or "").split())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


def read(report: dict[str, Any]) -> Page:
    """The parsed page, its text with plain spaces."""
    page = Page(render_report(report))
    page.text = page.text.replace("\u00a0", " ")
    return page


def test_page_of_a_run_shows_the_headline_numbers() -> None:
    text = read(make_report()).text
    for shown in ("org/model", "9c1f" * 16, "106 M", "21 layers in 3 blocks", "100 MiB", "5 min 1 s", "53.9", "0.496"):
        assert shown in text
    assert "29.19" in text
    assert "72.3 %" in text
    assert "outside the blocks" in text
    assert '["lm_head"]' in text
    assert "ab" * 32 in text


def test_page_has_one_panel_per_type_and_the_marks_of_every_line() -> None:
    page = read(make_report(blocks=3))
    assert page.classes["figure.panel"] == 2 * 7  # errors and spectra
    assert page.classes["path.zero"] == page.classes["path.criterion"] == page.classes["path.chosen"] == 7
    assert page.classes["path.spectrum"] == 21
    assert page.classes["rect.hit"] == 21
    assert page.classes["rect.cell"] == 2 * 21
    assert page.classes["svg.map"] == 2


def test_page_ranks_the_ten_largest_stored_errors() -> None:
    page = render_report(make_report(blocks=3))
    worst = re.findall(r"<code>(model\.[\w.]+)</code>", page[page.index("Largest errors") :])
    assert len(worst) == 10
    assert worst[:4] == [f"model.layers.{name}_proj" for name in ("2.mlp.down", "1.mlp.down", "2.mlp.up", "0.mlp.down")]


def test_page_of_stages_stacks_a_bar_of_phases_and_marks_the_plan() -> None:
    page = read(make_report())
    assert page.classes["rect.d"] == 2  # the fourth phase, one part per stage
    assert page.classes["rect.target"] == 2
    assert page.text.count("1 min 13 s") == 2
    assert "Worth a look" not in page.text


def test_page_with_more_phases_than_colours_gives_the_rest_the_last_colour() -> None:
    report = make_report()
    report["stages"] = report["stages"][:1]
    report["stages"][0]["seconds"] = {f"phase {i}": 1.0 for i in range(9)}
    assert read(report).classes["rect.f"] == 4 + 1  # phases 6 to 9, and the memory


def test_page_warns_of_what_went_wrong() -> None:
    report = make_report()
    report["layers"][0]["objective"]["stored"] = NAN
    report["layers"][1]["objective"]["stored"] = 2 * report["layers"][1]["objective"]["k0"]
    report["calibration"]["excluded_rows"] = 12
    report["stages"][1]["peak_memory"] = 3 * 2**30
    text = read(report).text
    assert "objective not finite in 1 layer: model.layers.0.self_attn.q_proj" in text
    assert "error above that of k = 0 in 1 layer: model.layers.0.self_attn.k_proj" in text
    assert "NaN or Inf in 12 calibration rows" in text
    assert "more memory than planned in 1 stage: 3 GiB instead of 2 GiB in stage 1 of window 0" in text


def test_page_makes_no_request_and_runs_no_script() -> None:
    report = make_report()
    report["model"] = "https://example.org/model"
    text = render_report(report)
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "a"}.isdisjoint(page.tags)
    assert not any(name in {"src", "href", "xmlns", "data"} or name.startswith("on") for _, name, _ in page.attributes)
    assert not any("http" in (value or "") for _, _, value in page.attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("https://example.org/model") == 2  # the title and the heading


def test_page_escapes_names_wherever_they_are_shown() -> None:
    evil = "\"><script>alert('1')</script>&amp;"
    report = make_report(blocks=2, types=(evil, "b"))
    report.update(model=evil, config={evil: evil}, unquantized=[{"name": evil, "reason": evil}])
    report["stages"][0]["device"] = evil
    report["stages"][0]["seconds"] = {evil: 1.0}
    report["evaluations"][0]["text"] = evil
    report["calibration"]["source"] = evil
    report["created_by"] = {evil: evil}
    report["fingerprint"] = evil
    page = Page(render_report(report))
    assert page.tags["script"] == 0
    assert page.text.count(evil) > 10
    assert any(value == evil for _, name, value in page.attributes if name == "title")


def test_page_is_the_same_bytes_for_the_same_report() -> None:
    report = make_report()
    before = copy.deepcopy(report)
    first = render_report(report)
    assert first == render_report(json.loads(json.dumps(report)))
    assert report == before


def test_page_of_tuned_blocks_says_what_is_left_of_their_error() -> None:
    report = make_report()
    assert "tuning" not in read(report).text
    for entry in report["layers"]:
        entry["tuning"] = {"step": 20, "before": 0.04, "after": 0.03}
    assert "0.75 ×" in read(report).text


def gate(chosen: str) -> dict[str, Any]:
    return {"chosen": chosen, "second_order": {"one-sided": 4.0, "two-sided": 3.0}, "cosine": 0.25}


def test_shows_which_solution_gradients_preferred_only_where_they_judged() -> None:
    report = make_report(blocks=2)
    assert "network's output" not in read(report).text
    for entry in report["layers"]:
        entry["gate"] = gate("two-sided" if entry["type"].startswith("mlp") else "one-sided")
    text = read(report).text
    assert "2 of 2" in text and "0 of 2" in text  # by type
    assert "0.75 ×" in text and "0.25" in text  # medians of estimates and cosine
    assert "43 %" in text  # 6 of 14 layers
    assert "seem too few" in text


def test_trusts_gradients_that_decided_for_most_layers() -> None:
    report = make_report(blocks=2)
    for entry in report["layers"]:
        entry["gate"] = gate("two-sided")
    assert "seem too few" not in read(report).text


def test_gates_without_numbers_are_shown_as_missing() -> None:
    report = make_report(blocks=1)
    for entry in report["layers"]:
        entry["gate"] = {"chosen": "one-sided", "second_order": {"one-sided": None, "two-sided": NAN}, "cosine": None}
    assert "0 of 1" in read(report).text


def test_page_of_method_none_has_no_split_and_no_spectra() -> None:
    page = read(make_report(rank=0))
    assert page.classes["rect.cell"] == page.classes["path.spectrum"] == page.classes["path.criterion"] == 0
    assert page.classes["path.zero"] == 7
    assert "No layer has a split" in page.text
    assert "No singular values were recorded" in page.text


def test_page_of_one_layer_draws_dots() -> None:
    page = read(make_report(blocks=1, types=("self_attn.q_proj",)))
    assert page.classes["circle.chosen"] == page.classes["circle.zero"] == page.classes["circle.criterion"] == 1
    assert page.classes["path.chosen"] == 0
    assert page.classes["path.spectrum"] == 1
    assert "1 layer in 1 block" in page.text


def test_page_without_layers_stages_and_evaluations_still_shows_the_configuration() -> None:
    report = make_report(blocks=0)
    report.update(stages=[], evaluations=[], unquantized=[])
    page = read(report)
    assert page.classes["figure.panel"] == 0
    assert "Configuration" in page.text
    assert "Evaluation" not in page.text
    assert "perplexity" not in page.text


@pytest.mark.parametrize(
    ("blocks", "types"),
    [(126, TYPES), (4, tuple(f"mlp.experts.{i}.{name}_proj" for i in range(20) for name in ("gate", "up", "down")))],
)
def test_page_of_a_large_model_has_a_cell_per_layer_and_stays_small(blocks: int, types: tuple[str, ...]) -> None:
    text = render_report(make_report(blocks, types, rank=64))
    page = Page(text)
    assert page.classes["rect.cell"] == 2 * blocks * len(types)
    assert page.classes["figure.panel"] == 2 * len(types)
    assert len(text) < 1_500_000


@pytest.mark.parametrize("missing", [None, NAN, math.inf])
def test_page_with_every_number_missing_is_still_written(missing: float | None) -> None:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            kept = ("block", "blocks", "layers", "stage", "window", "shape", "format_version")
            return {k: v if k in kept and not isinstance(v, list) else strip(v) for k, v in value.items()}
        if isinstance(value, list):
            return [strip(item) for item in value] if any(isinstance(item, dict | float) for item in value) else value
        return missing if isinstance(value, int | float) else value

    page = read(strip(make_report()))
    assert page.classes["path.chosen"] == page.classes["rect.cell"] == 0
    assert "No error was measured" in page.text
    assert "No stored error was measured" in page.text


def test_page_with_a_missing_objective_interrupts_the_line_and_keeps_its_neighbours() -> None:
    report = make_report(blocks=5, types=("q",))
    report["layers"][2]["objective"]["chosen"] = NAN
    text = render_report(report)
    (path,) = re.findall(r'<path d="([^"]+)" class="chosen"/>', text)
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_page_with_several_layers_of_a_type_in_a_block_shows_their_median() -> None:
    report = make_report(blocks=2, types=("experts",) * 3)
    for k, each in zip((1, 7, 2, 5, 5, 8), report["layers"], strict=True):
        each["k"] = k
    text = render_report(report)
    assert "<title>experts, block 0: 2</title>" in text
    assert "<title>experts, block 1: 5</title>" in text


# The pictures by themselves


def test_axis_maps_its_ends_and_a_single_value_to_the_middle() -> None:
    axis = Axis(1, 100, 0, 10, log=True)
    assert [axis(1), axis(10), axis(100)] == pytest.approx([0, 5, 10])
    assert Axis(3, 3, 0, 10)(3) == 5


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 29, 0, 1), [0, 10, 20]),
        (Axis(0, 125, 0, 1), [0, 50, 100]),
        (Axis(4, 4, 0, 1), [4]),
        (Axis(0.001, 10, 0, 1, log=True), [0.001, 0.01, 0.1, 1, 10]),
        (Axis(0.02, 0.4, 0, 1, log=True), [0.03, 0.1, 0.3]),
    ],
)
def test_axis_ticks_are_round_and_inside(axis: Axis, expected: list[float]) -> None:
    assert axis.ticks() == pytest.approx(expected)


def test_log_axis_without_a_positive_value_is_none() -> None:
    assert log_axis([None, 0.0, -1.0]) is None
    axis = log_axis([None, 0.5, 2.0])
    assert axis is not None
    assert axis.low < 0.5 < 2.0 < axis.high


def test_spectrum_longer_than_a_panel_keeps_both_ends() -> None:
    points = spectrum([1.0 / (i + 1) for i in range(500)])
    assert len(points) <= 33
    assert points[0] == (1.0, 1.0)
    assert points[-1] == (500.0, 1 / 500)
    assert spectrum([]) == []


def test_panel_places_points_by_value() -> None:
    drawn = panel(
        "c",
        [Line("l", [(0, 1.0), (10, 100.0)])],
        Axis(0, 10, 0, 100),
        Axis(1, 100, 80, 0, log=True),
        label="l",
        tick=str,
    )
    assert '<path d="M0.0 80.0L100.0 0.0" class="l"/>' in drawn


def test_depth_map_shades_by_value_and_frames_what_is_missing() -> None:
    drawn = depth_map({"q": {0: 0.0, 1: 8.0, 2: None}}, [0, 1, 2], 8.0, label="k")
    assert re.findall(r'class="(\w+)" fill-opacity="([\d.]+)"', drawn) == [
        ("cell", "0.05"),
        ("cell", "0.62"),
        ("none", "0.05"),
    ]
    assert "<title>q, block 2: –</title>" in drawn


def test_bar_parts_follow_each_other_on_the_scale() -> None:
    drawn = bar([("a", 1.0), ("b", 2.0)], 4.0, label="x", target=3.0)
    assert re.findall(r'<rect x="([\d.]+)" y="\d" width="([\d.]+)"', drawn) == [("0", "25"), ("25", "50"), ("75", "1")]
    assert "rect" not in bar([], 0.0, label="x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (plain(0.0), "0"),
        (plain(4.9), "4.9"),
        (plain(1234.5), "1,234"),
        (plain(0.000012), "1.20e-05"),
        (plain(None), "–"),
        (percent(0.012), "1.20 %"),
        (count(106168320.0), "106 M"),
        (count(210), "210"),
        (size(1.5 * 2**30), "1.5 GiB"),
        (duration(0.4213), "0.421 s"),
        (duration(301.2), "5 min 1 s"),
        (duration(11220), "3 h 7 min"),
    ],
)
def test_quantity_reads_as_people_write_it(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected
