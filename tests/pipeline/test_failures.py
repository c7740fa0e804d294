"""Signals on real processes of a real cluster, at instants that the storage server decides; the bytes stay the same.

Four Ray nodes, the driver's without CPUs, share nothing but an S3 server. Since it sees every object before it is
written, it can kill the worker that writes, at that very moment.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from srr_dist import quantize as verb
from srr_dist import status
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.pipeline import cluster as cluster_module
from srr_dist.store import ObjectStore, RunArea
from srr_dist.store.events import read_events
from srr_dist.store.failures import read_failures
from tests.commands import TIMEOUT, end, flags, start, wait_until
from tests.s3 import Answer, MotoServer, environment, set_variables

pytestmark = pytest.mark.slow

UNITS = [f"{block:05d}" for block in range(6)] + ["rest"]
RECORD = re.compile(r"/blocks/(?P<unit>[0-9]{5}|rest)\.json$")
UPLOAD = re.compile(r"/blocks/(?P<unit>[0-9]{5}|rest)/[0-9a-f]{32}/base\.safetensors$")
STORE_BYTES = 100 * 10**6
QUICK_DEATH = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


@dataclass
class Site:
    """A cluster and the server beside it."""

    cluster: Any
    server: MotoServer
    model: Path
    text: Path
    redone: list[str] = field(default_factory=list)
    """Units that were uploaded again after they had a record."""

    def flags(self, output: str, **changes: Any) -> list[str]:
        options = {
            "model": self.model,
            "calibration": self.text,
            "output": f"s3://bucket/{output}",
            "num_samples": 8,
            "seq_len": 32,
            "rank": 4,
            "host_memory": "4GiB",
            "workers": 2,
            "blocks_per_stage": 1,
            "patience": 1,
            "watchdog": 15,
            "ray_address": self.cluster.address,
        }
        return flags(**(options | changes))

    def area(self, output: str) -> RunArea:
        store = ObjectStore(f"s3://bucket/{output}")
        (fingerprint,) = RunArea.find(store)
        return RunArea(store, fingerprint)

    def manifest(self, output: str) -> bytes:
        return ObjectStore(f"s3://bucket/{output}").get("manifest.json")

    def events(self, output: str, *kinds: str) -> list[dict[str, Any]]:
        if not RunArea.find(ObjectStore(f"s3://bucket/{output}")):
            return []
        return [event for event in read_events(self.area(output), parts=10**6) if event["event"] in kinds]

    def stages(self) -> list[psutil.Process]:
        """Worker processes of this cluster that hold a stage."""
        return [process for node in self.cluster.worker_nodes for process in stages_of(raylet(node))]

    def watch(
        self,
        before: Callable[[str, dict[str, Any]], bool] = lambda path, environ: False,
        refusal: tuple[str, str] = ("400 Bad Request", "Late"),
    ) -> None:
        """Call ``before`` with each object that is about to be written; where it answers True, it is refused."""
        committed: set[str] = set()
        self.redone.clear()

        def handle(environ: dict[str, Any], begin: Any) -> Answer:
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] in ("PUT", "POST"):
                if before(path, environ):
                    return self.server.refuse(*refusal, environ, begin)
                if (match := UPLOAD.search(path)) and match["unit"] in committed:
                    self.redone.append(match["unit"])
                if match := RECORD.search(path):
                    committed.add(match["unit"])
            return self.server.serve(environ, begin)

        self.server.handler = handle

    def kill_writer(self, environ: dict[str, Any]) -> bool:
        """SIGKILL the worker that sends a request; returns whether it was one of ours."""
        for process in self.stages():
            try:
                ports = {connection.laddr.port for connection in process.net_connections()}
            except psutil.Error:
                continue
            if int(environ["REMOTE_PORT"]) in ports:
                process.kill()
                return True
        return False


def complaint(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is no log."""
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("srr-dist: ")]
    return line


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def stages_of(node: int) -> list[psutil.Process]:
    """Worker processes of the node with this raylet that hold a stage."""
    return [child for child in children(node) if command(child).startswith("ray::Stage")]


def command(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


def start_cluster(workers: int) -> Any:
    """A head without CPUs and this many nodes of one."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(workers):
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    return cluster


@pytest.fixture(scope="module")
def site(six_blocks: Path, text: Path) -> Iterator[Site]:
    server = MotoServer()
    with pytest.MonkeyPatch.context() as patch:
        set_variables(patch, QUICK_DEATH | environment(server.url))
        server.make_bucket()
        site = Site(start_cluster(3), server, six_blocks, text)
        yield site
        site.cluster.shutdown()
    server.stop()


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> bytes:
    """The manifest that every run must end with."""
    assert verb.main(site.flags("undisturbed", workers=3, blocks_per_stage=2)) == 0
    return site.manifest("undisturbed")


def test_worker_killed_while_calibrating_solving_uploading_and_before_its_record(site, undisturbed):
    """While a block is uploaded, its worker solves the next one."""
    pending = {
        "calibrating": "/boundaries/00004/00003",
        "uploading": "/blocks/00000/",
        "recording": "/blocks/00002.json",
    }

    def strike(path: str, environ: dict[str, Any]) -> bool:
        for instant, part in list(pending.items()):
            if part in path and site.kill_writer(environ):
                del pending[instant]
                return True
        return False

    site.watch(strike)
    assert verb.main(site.flags("instants", blocks_per_stage=2)) == 0
    assert pending == {}
    failures = site.events("instants", "failure")
    assert {failure["kind"] for failure in failures} == {"lost"}
    assert {"calibrating", "solving", "committing"} == {failure["doing"] for failure in failures}
    assert site.redone == []
    assert site.manifest("instants") == undisturbed


def test_worker_killed_on_the_way_back_costs_its_window_alone(site):
    """Once while it stores the gradients that leave its window, once while it keeps sketches."""
    options = {"rounding": "yaqa", "sketch": "B", "split": "criterion", "iterations": 0, "descent": 0}
    site.watch()
    assert verb.main(site.flags("calm", statistics="s3://bucket/calm-kept", **options)) == 0
    pending = ["/gradients/00004/00003", "/model.layers.1.mlp.up_proj.output/"]

    def strike(path: str, environ: dict[str, Any]) -> bool:
        if pending and pending[0] in path and site.kill_writer(environ):
            del pending[0]
            return True
        return False

    site.watch(strike)
    assert verb.main(site.flags("struck", statistics="s3://bucket/struck-kept", **options)) == 0
    assert pending == []
    assert {failure["kind"] for failure in site.events("struck", "failure")} == {"lost"}
    calm, struck = ([event["work"] for event in site.events(output, "window")] for output in ("calm", "struck"))
    assert calm == [f"blocks {name}" for name in ("0–1", "2–3", "4–5", "2–3", "0–1", "0–1", "2–3", "4–5")]
    assert struck == [*calm[:3], calm[2], *calm[3:5], calm[4], *calm[5:]]  # 4–5 and 0–1 twice
    assert site.manifest("struck") == site.manifest("calm")
    kept, again = (ObjectStore(f"s3://bucket/{name}-kept").list("") for name in ("calm", "struck"))
    assert set(again) == set(kept)  # names hold the sha256 of what they name


def test_block_whose_worker_always_dies_is_set_aside_and_done_by_a_later_run(site, undisturbed, capfd):
    site.watch(lambda path, environ: "/blocks/00003/" in path and site.kill_writer(environ))
    assert verb.main(site.flags("poison", blocks_per_stage=2)) == 3
    assert "unit 00003" in complaint(capfd)
    area = site.area("poison")
    assert sorted(area.records()) == [unit for unit in UNITS if unit != "00003"]
    assert not area.store.exists("COMMIT")
    attempts = [failure for failure in read_failures(area) if failure.unit == "00003"]
    assert [failure.attempt for failure in attempts] == [1, 2, 3, 4]
    assert [failure.quarantined for failure in attempts] == [False, False, False, True]
    assert status.main([area.store.url]) == 0
    assert "set aside    unit 00003, attempt 4, committing" in capfd.readouterr().out
    site.watch()
    assert verb.main(site.flags("poison")) == 0
    assert site.redone == []
    assert site.manifest("poison") == undisturbed


def test_stop_lets_the_block_that_is_being_solved_be_committed(site, undisturbed):
    process: list[subprocess.Popen[str]] = []

    def stop(path: str, environ: dict[str, Any]) -> bool:
        if "/blocks/00001/" in path and process:
            process.pop().send_signal(signal.SIGTERM)
        return False

    site.watch(stop)
    running = start("quantize", *site.flags("stopped", workers=1, blocks_per_stage=6))
    process.append(running)
    ended = end(running)
    assert ended.code == 75, ended.err
    assert {"00000", "00001"} <= site.area("stopped").records().keys() < set(UNITS)
    assert site.events("stopped", "ended")[-1]["code"] == 75


def test_driver_killed_at_random_instants_in_a_row(site, undisturbed):
    chance = random.Random(3)
    site.watch()
    for _ in range(10):
        process = start("quantize", *site.flags("driver", workers=chance.choice([1, 2, 3])))
        moment = time.monotonic() + chance.uniform(3, 10)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.05)
        process.kill()
        end(process)
    assert verb.main(site.flags("driver")) == 0
    assert site.redone == []
    assert site.manifest("driver") == undisturbed


def test_second_driver_on_one_output_is_refused_while_the_first_works(site, undisturbed, capfd):
    ended_second = threading.Event()

    def hold(path: str, environ: dict[str, Any]) -> bool:
        if "/blocks/00000/" in path:
            ended_second.wait(TIMEOUT)
        return False

    site.watch(hold)
    first = start("quantize", *site.flags("shared", workers=1))
    wait_until(lambda: site.events("shared", "solving"), first)
    try:
        assert verb.main(site.flags("shared", workers=1)) == 75
    finally:
        ended_second.set()
    assert "is being worked on by" in complaint(capfd)
    ended = end(first)
    assert ended.code == 0, ended.err
    assert site.redone == []
    assert site.manifest("shared") == undisturbed


def test_finished_run_resumes_without_ray_and_without_reading_weights(site, undisturbed, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="srr_dist")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run needs neither")

    monkeypatch.setattr(cluster_module.ray, "init", refuse)
    monkeypatch.setattr(Checkpoint, "read", refuse)
    site.watch()
    begun = time.monotonic()
    assert verb.main(site.flags("undisturbed")) == 0
    assert time.monotonic() - begun < 5
    assert "is finished already" in caplog.text


def test_run_goes_on_with_fewer_workers_when_a_node_dies(site, undisturbed):
    lost = next(iter(site.cluster.worker_nodes))
    alive = [lost]

    def strike(path: str, environ: dict[str, Any]) -> bool:
        if "/blocks/00000.json" in path and alive:
            node = raylet(alive.pop())
            stages = stages_of(node)
            os.kill(node, signal.SIGKILL)
            psutil.wait_procs(stages, timeout=TIMEOUT)
        return False

    site.watch(strike)
    assert verb.main(site.flags("node", workers=3)) == 0
    assert [event["workers"] for event in site.events("node", "window")][-1] == 2
    assert site.redone == []
    assert site.manifest("node") == undisturbed
    site.cluster.remove_node(lost, allow_graceful=False)
    site.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def test_worker_that_comes_back_after_it_was_replaced_changes_nothing(site, undisturbed):
    """Its node stops with it, so that nobody can end it; it goes on when another has done its block."""
    stopped: list[psutil.Process] = []

    def freeze(path: str, environ: dict[str, Any]) -> bool:
        if "/blocks/00000/" in path and not stopped:
            port = int(environ["REMOTE_PORT"])
            for node in site.cluster.worker_nodes:
                for child in children(raylet(node)):
                    if any(connection.laddr.port == port for connection in child.net_connections()):
                        stopped.extend([child, psutil.Process(raylet(node))])
                        for process in reversed(stopped):
                            process.suspend()
        return False

    site.watch(freeze)
    process = start("quantize", *site.flags("zombie", watchdog=5))
    wait_until(lambda: site.events("zombie", "failure"), process)
    assert site.events("zombie", "failure")[0]["kind"] == "silent"
    wait_until(lambda: any(event["unit"] == "00000" for event in site.events("zombie", "committed")), process)
    first = site.area("zombie").records()["00000"]
    for each in stopped:
        each.resume()
    ended = end(process)
    assert ended.code == 0, ended.err
    assert site.area("zombie").records()["00000"] == first
    assert site.manifest("zombie") == undisturbed


def test_storage_without_room_ends_the_run_and_the_same_command_goes_on_when_there_is_some(site, undisturbed, capfd):
    full = threading.Event()

    def fill(path: str, environ: dict[str, Any]) -> bool:
        if "/blocks/00002/" in path:
            full.set()
        return full.is_set()

    site.watch(fill, refusal=("403 Forbidden", "QuotaExceeded"))
    assert verb.main(site.flags("full", workers=1, blocks_per_stage=6)) == 1
    assert "refused by the test" in complaint(capfd)
    site.watch()
    assert verb.main(site.flags("full", workers=1, blocks_per_stage=6)) == 0
    assert site.redone == []
    assert site.manifest("full") == undisturbed


def test_run_whose_whole_cluster_is_gone_goes_on_on_another(site, undisturbed):
    """Everything is killed, as ``ray stop --force`` does on every node. Comes last, for that reason."""
    site.watch()
    process = start("quantize", *site.flags("moved"))
    wait_until(lambda: site.events("moved", "committed"), process)
    nodes = [*site.cluster.worker_nodes, site.cluster.head_node]
    services = [each.process for node in nodes for kind in node.all_processes.values() for each in kind]
    for each in [child for node in nodes for child in children(raylet(node))] + services:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    assert end(process).code not in (0, None)
    assert not ObjectStore("s3://bucket/moved").exists("COMMIT")
    site.cluster.shutdown()
    site.cluster = start_cluster(1)
    assert verb.main(site.flags("moved", workers=1, blocks_per_stage=3)) == 0
    assert site.redone == []
    assert site.manifest("moved") == undisturbed
