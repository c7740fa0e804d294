"""The index page: a row per result, escaped, self-contained, with links that lead somewhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from srr_dist.catalog.index import Row, render_index, write_index
from srr_dist.store import ObjectStore

FIGURES = {
    "bits_per_weight": 3.97,
    "bytes": 3 * 2**30,
    "seconds": 3700.0,
    "kl": 0.1234,
    "perplexity_original": 18.06,
    "perplexity": 20.5,
}
ROWS = [
    Row("qwen-int4", "Qwen/Qwen3-0.6B", "int4", "done", figures=FIGURES, log=True),
    Row("bad", "<no>/such", "", "failed", "quantize: <no>/such: no such file", log=True),
    Row("later", "m", "int4"),
]


def test_page_shows_figures_and_status_of_every_row():
    page = render_index(ROWS)
    shown = re.sub(r"<[^>]+>", " ", page.replace("\u00a0", " "))
    for part in ("3.97", "0.123", "18.06 → 20.5", "3 GiB", "1 h 1 min", "3 results: 1 done, 1 failed, 1 queued"):
        assert part in shown
    assert "&lt;no&gt;/such: no such file" in page
    assert page.count("<tr>") == 4


def test_page_is_self_contained_and_links_only_to_what_is_there():
    page = render_index(ROWS)
    assert re.findall(r'href="([^"]+)"', page) == ["qwen-int4/report.html", "logs/qwen-int4.log", "logs/bad.log"]
    assert not re.search(r"<script|src=|url\(|@import", page)


def test_equal_rows_give_equal_bytes_and_missing_figures_are_shown_as_missing():
    assert render_index(ROWS) == render_index([replace(row) for row in ROWS])
    unmeasured = replace(ROWS[0], figures=FIGURES | {"kl": None, "perplexity": None, "perplexity_original": None})
    assert "– → –" in render_index([unmeasured])


def test_json_holds_what_the_page_shows():
    store = ObjectStore("memory://index")
    write_index(store, ROWS)
    results = store.get_json("index.json")["results"]
    assert [result["name"] for result in results] == ["qwen-int4", "bad", "later"]
    assert results[0]["figures"] == FIGURES
    assert [result["report"] for result in results] == ["qwen-int4/report.html", None, None]
    assert json.dumps(results[1]["note"]) in store.get("index.json").decode()
    assert store.get("index.html").decode() == render_index(ROWS)
