"""The queue with real processes and signals; short scripts stand where the verbs would take minutes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from srr_dist.catalog import queue, results
from srr_dist.catalog.entries import Entry, Evaluation
from srr_dist.catalog.queue import Queue
from srr_dist.config import RunConfig
from srr_dist.errors import PipelineError, StoppedError
from srr_dist.store import Manifest, ObjectStore, RunArea, write_commit

PRELUDE = """
import os, pathlib, signal, sys, time
output = pathlib.Path(sys.argv[1])
events = output.parent / "events"
def note(what):
    with events.open("a") as stream:
        stream.write(f"{what} {output.name}\\n")
def wait_for(line):
    while line not in events.read_text().splitlines():
        time.sleep(0.005)
note("begin")
"""
FINISH = """
from srr_dist.store import FileEntry, Manifest, ObjectStore, write_commit
store = ObjectStore(str(output))
store.put("base/weights", b"")
store.put("report.json", REPORT.encode())
files = {"base/weights": FileEntry("base/weights", 0, "0" * 64)}
write_commit(store, Manifest("ab" * 32, {}, ["base"], files, [], {}))
note("end")
"""
EVALUATION = Evaluation("text")
REPORT = {
    "totals": {"bits_per_weight": 3.5, "base_bytes": 10, "adapter_bytes": 5, "seconds": 2.0},
    "evaluations": [
        {"text": "other", "num_samples": 8, "seq_len": 1024, "kl": 9.0},
        {"text": "text", "num_samples": 8, "seq_len": 1024, "kl": 0.5, "perplexity_original": 18.0, "perplexity": 20.0},
    ],
}


class Zoo:
    """Entries whose single step is a script."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = ObjectStore(str(folder))
        self.folder = folder
        self.scripts: dict[str, str] = {}
        self.entries: list[Entry] = []
        monkeypatch.setattr(queue, "steps", self._steps)

    def add(self, name: str, script: str = FINISH, *, model: str | None = None, **options: Any) -> Entry:
        output = str(self.folder / name)
        given = {"model": model or name, "calibration": "c", "output": output} | options
        entry = Entry(name, "", RunConfig.from_options(given), EVALUATION, 0)
        self.scripts[name] = PRELUDE + script.replace("REPORT", repr(json.dumps(REPORT)))
        self.entries = [each for each in self.entries if each.name != name] + [entry]
        return entry

    def _steps(self, entry: Entry) -> list[tuple[str, list[str]]]:
        return [("quantize", [sys.executable, "-c", self.scripts[entry.name], entry.config.job.output])]

    def queue(self, concurrency: int = 1) -> Queue:
        return Queue(self.entries, self.store, concurrency, pause=0.0)

    def events(self) -> list[str]:
        return (self.folder / "events").read_text().splitlines()

    def index(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.store.get_json("index.json")["results"]}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return Zoo(tmp_path, monkeypatch)


def test_entries_run_one_after_the_other_in_their_order(zoo):
    for name in "abc":
        zoo.add(name)
    zoo.queue().run()
    assert zoo.events() == ["begin a", "end a", "begin b", "end b", "begin c", "end c"]


def test_entries_run_at_the_same_time_within_the_limit(zoo):
    zoo.add("a", 'wait_for("begin b")\n' + FINISH)
    zoo.add("b", 'wait_for("end a")\n' + FINISH)
    zoo.add("c")
    zoo.queue(concurrency=2).run()
    events = zoo.events()
    assert events.index("begin b") < events.index("end a") < events.index("begin c")


def test_entries_that_share_moments_wait_until_the_first_is_quantized_and_others_pass_them(zoo):
    zoo.add("leader", 'wait_for("end other")\n' + FINISH, model="m")
    zoo.add("second", 'wait_for("begin third")\n' + FINISH, model="m", bits=4)
    zoo.add("third", 'wait_for("begin second")\n' + FINISH, model="m", bits=8)
    zoo.add("other")
    zoo.queue(concurrency=3).run()
    events = zoo.events()
    assert events.index("end other") < events.index("end leader")
    assert events.index("end leader") < min(events.index("begin second"), events.index("begin third"))


def test_entry_after_a_failed_one_that_shares_its_moments_takes_its_place(zoo):
    zoo.add("leader", "sys.exit(1)", model="m")
    zoo.add("second", model="m", bits=4)
    with pytest.raises(PipelineError, match="1 of 2 results are done, 1 failed"):
        zoo.queue(concurrency=2).run()
    assert zoo.index()["second"]["status"] == "done"


def test_entry_that_fails_is_shown_with_its_reason_and_harms_no_other(zoo):
    zoo.add("bad", 'print("some log"); print("srr-dist: no such file"); print("and more"); sys.exit(2)')
    zoo.add("worse", 'print("Traceback"); print("KeyError: x"); sys.exit(1)')
    zoo.add("poor", 'print("srr-dist: block 3 set aside"); sys.exit(3)')
    zoo.add("good")
    with pytest.raises(PipelineError) as caught:
        zoo.queue().run()
    assert caught.value.exit_code == 1
    assert "1 of 4 results are done, 3 failed" in str(caught.value)
    index = zoo.index()
    assert {name: (row["status"], row["note"]) for name, row in index.items()} == {
        "bad": ("failed", "quantize: no such file"),
        "worse": ("failed", "quantize: KeyError: x"),
        "poor": ("quarantined", "quantize: block 3 set aside"),
        "good": ("done", ""),
    }
    assert b"some log" in zoo.store.get(index["bad"]["log"])
    assert index["good"]["report"] == "good/report.html"


def test_index_has_the_figures_of_the_evaluation_that_was_asked_for(zoo):
    zoo.add("a")
    zoo.queue().run()
    assert zoo.index()["a"]["figures"] == {
        "bits_per_weight": 3.5, "bytes": 15, "seconds": 2.0, "kl": 0.5, "perplexity_original": 18.0, "perplexity": 20.0,
    }  # fmt: skip
    assert zoo.store.exists("index.html")


@pytest.mark.parametrize("end", ["sys.exit(75)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_entry_that_is_stopped_is_tried_again_after_the_others(zoo, end):
    zoo.add("a", f'if events.read_text().count("begin a") < 2: {end}\n' + FINISH)
    zoo.add("b")
    zoo.queue().run()
    assert zoo.events() == ["begin a", "begin b", "end b", "begin a", "end a"]


def test_entry_that_is_stopped_every_time_is_left_for_another_day(zoo):
    zoo.add("a", "sys.exit(75)")
    zoo.add("b")
    with pytest.raises(StoppedError, match="1 of 2 results are done, 1 were stopped"):
        zoo.queue().run()
    assert zoo.events().count("begin a") == queue.ATTEMPTS
    assert zoo.index()["a"]["status"] == "stopped"


def test_stop_is_handed_on_waited_for_and_starts_nothing_new(zoo):
    stop = """
signal.signal(signal.SIGTERM, lambda *_: (note("asked"), sys.exit(75)))
os.kill(os.getppid(), signal.SIGTERM)
while True: signal.pause()
"""
    zoo.add("a", stop)
    zoo.add("b")
    with pytest.raises(StoppedError, match="stopped on request, 0 of 2 results are done"):
        zoo.queue().run()
    assert zoo.events() == ["begin a", "asked a"]
    assert {name: row["status"] for name, row in zoo.index().items()} == {"a": "stopped", "b": "queued"}


def test_same_queue_again_makes_only_what_is_not_finished(zoo):
    zoo.add("a")
    zoo.add("b", "sys.exit(1)")
    with pytest.raises(PipelineError):
        zoo.queue().run()
    zoo.add("b")
    zoo.queue().run()
    zoo.queue().run()
    assert zoo.events() == ["begin a", "end a", "begin b", "begin b", "end b"]


CHANGES = {
    "COMMIT is gone": lambda folder: (folder / "a" / "COMMIT").unlink(),
    "a file is gone": lambda folder: (folder / "a" / "base" / "weights").unlink(),
    "marked as damaged": lambda folder: RunArea(ObjectStore(str(folder / "a")), "ab" * 32).condemn_output(["why"]),
    "another output": lambda folder: write_commit(
        ObjectStore(str(folder / "a")), Manifest("cd" * 32, {}, ["base"], {}, [], {})
    ),
    "no report": lambda folder: (folder / "a" / "report.json").unlink(),
    "damaged report": lambda folder: (folder / "a" / "report.json").write_text('{"totals": 3}'),
    "no result": lambda folder: (folder / "results" / "a.json").unlink(),
    "damaged result": lambda folder: (folder / "results" / "a.json").write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_result_that_is_not_whole_any_more_is_not_finished(zoo, change):
    entry = zoo.add("a")
    zoo.queue().run()
    assert results.figures(zoo.store, entry) is not None
    change(zoo.folder)
    assert results.figures(zoo.store, entry) is None
    assert zoo.queue().waiting == [entry]


def test_result_of_other_options_is_not_the_one_asked_for(zoo):
    zoo.add("a")
    zoo.queue().run()
    assert results.figures(zoo.store, zoo.add("a", bits=4)) is None


def test_steps_are_the_verbs_with_the_entrys_options(tmp_path):
    options = {"model": "m", "calibration": "c", "output": "o", "group_size": -1, "revision": "main", "workers": 2}
    entry = Entry("n", "", RunConfig.from_options(options), Evaluation("t", 3, 64), 0)
    steps = queue.steps(entry)
    assert [verb for verb, _ in steps] == ["quantize", "evaluate", "verify"]
    quantize, evaluate, verify = (set(command[3:]) for _, command in steps)
    assert quantize == {
        "--model=m", "--calibration=c", "--output=o", "--group-size=-1", "--revision=main", "--workers=2",
    }  # fmt: skip
    assert {"--model=m", "--quantized=o", "--text=t", "--num-samples=3", "--seq-len=64"} <= evaluate
    assert {"--revision=main", "--workers=2"} <= evaluate
    assert verify == {"o"}
