"""Runs as jobs of a cluster of several nodes that share nothing but an object store: submitted, stopped, resumed."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from srr_dist.store import BlockRecord, ObjectStore, RunArea
from tests.cluster.local import ROOT, LocalCluster, exported, local, local_cluster
from tests.commands import Ended, flags, run

pytestmark = pytest.mark.slow

BUCKET = "s3://runs"
TIMEOUT = 300
UNITS = 7


@pytest.fixture(scope="module")
def cluster(six_blocks: Path, text: Path) -> Iterator[LocalCluster]:
    """Three nodes; model and text lie on the object store, which this process reaches as the nodes do."""
    with local_cluster(workers=2) as up, pytest.MonkeyPatch.context() as patch:
        for name, value in up.variables.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        inputs = ObjectStore(f"{BUCKET}/inputs")
        for file in [*six_blocks.iterdir(), text]:
            inputs.put(f"model/{file.name}" if file != text else file.name, file.read_bytes())
        yield up
        s3fs.S3FileSystem.clear_instance_cache()


def submit(cluster: LocalCluster, *ray_options: str, output: str, **changes: Any) -> Ended:
    """``jobs/submit.sh`` of the run that these tests have in common."""
    options = {
        "model": f"{BUCKET}/inputs/model",
        "calibration": f"{BUCKET}/inputs/words.txt",
        "output": output,
        "num_samples": 8,
        "seq_len": 32,
        "rank": 4,
        "workers": 2,
        "host_memory": "4GiB",
    }
    command = [str(ROOT / "jobs" / "submit.sh"), *ray_options, "quantize", *flags(**options | changes)]
    done = subprocess.run(command, env=cluster.client(), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def job_info(cluster: LocalCluster, submission: str, part: str = "", method: str = "GET") -> dict[str, Any]:
    """What the job API answers about a job, or a part of it such as ``/logs``."""
    token = Path(cluster.variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    url = f"{cluster.variables['RAY_API_SERVER_ADDRESS']}/api/jobs/{submission}{part}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.1)


def records(output: str) -> dict[str, bytes]:
    """Record's name -> its bytes."""
    store = ObjectStore(output)
    return {path: store.get(path) for path in store.list(".srr") if path.count("/") == 3 and "/blocks/" in path}


def hosts(output: str) -> set[str]:
    store = ObjectStore(output)
    (fingerprint,) = RunArea.find(store)
    found: list[BlockRecord] = list(RunArea(store, fingerprint).records().values())
    return {record.node for record in found}


@pytest.fixture(scope="module")
def finished(cluster: LocalCluster) -> str:
    """The output of the job, undisturbed."""
    output = f"{BUCKET}/undisturbed"
    ended = submit(cluster, "--submission-id", "undisturbed", output=output)
    assert ended.code == 0, ended.out + ended.err
    return output


def test_submitted_job_succeeds_and_its_output_verifies(cluster, finished):
    assert job_info(cluster, "undisturbed")["status"] == "SUCCEEDED"
    assert len(records(finished)) == UNITS
    assert run("verify", finished).code == 0


def test_job_shows_no_secret(cluster, finished):
    shown = json.dumps(job_info(cluster, "undisturbed"))
    assert "RAY_JOB_STOP_WAIT_TIME_S" in shown
    assert cluster.variables["AWS_SECRET_ACCESS_KEY"] not in shown
    assert cluster.variables["AWS_ACCESS_KEY_ID"] not in job_info(cluster, "undisturbed")["runtime_env"]["env_vars"]
    assert Path(cluster.variables["RAY_AUTH_TOKEN_PATH"]).read_text() not in shown


def test_stopped_job_goes_on_under_another_id_to_the_same_bytes(cluster, finished):
    output = f"{BUCKET}/stopped"
    started = submit(cluster, "--no-wait", "--submission-id", "stopped", output=output, blocks_per_stage=1)
    assert started.code == 0, started.err
    wait_for(lambda: records(output) or job_info(cluster, "stopped")["status"] == "FAILED", "a first record")
    assert job_info(cluster, "stopped", "/stop", "POST") == {"stopped": True}  # as `ray job stop` does
    wait_for(lambda: job_info(cluster, "stopped")["status"] != "RUNNING", "the end of the job")
    info = job_info(cluster, "stopped")
    assert info["status"] == "STOPPED", info
    assert "stopped on request; run the same command again" in job_info(cluster, "stopped", "/logs")["logs"]
    assert not ObjectStore(output).exists("COMMIT")
    before = records(output)
    assert 0 < len(before) < UNITS
    resumed = submit(cluster, "--submission-id", "resumed", output=output, workers=1)
    assert resumed.code == 0, resumed.out + resumed.err
    assert f"resuming: {len(before)} of {UNITS} units are committed" in resumed.out
    assert {name: records(output)[name] for name in before} == before
    assert ObjectStore(output).get("manifest.json") == ObjectStore(finished).get("manifest.json")


def test_cluster_that_is_up_says_so_and_how_to_reach_it(cluster):
    again = local(cluster.settings, "up")
    assert again.returncode == 1
    assert f"a cluster is up (its state is in {cluster.state})" in again.stderr
    assert exported(local(cluster.settings, "env").stdout) == cluster.variables
    assert (cluster.state / "token").stat().st_mode & 0o077 == 0
    assert {path.name for path in cluster.state.glob("*.pid")} == {"s3.pid", "head.pid", "worker-1.pid", "worker-2.pid"}
