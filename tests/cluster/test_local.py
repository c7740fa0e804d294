"""``cluster/local.sh`` where it has no cluster to act on; tests/jobs works with one that is up."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.local import SCRIPT, environment, local


@pytest.fixture
def settings() -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="srr-", dir="/tmp"))
    yield environment(folder)
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["PORT", "DASHBOARD_PORT", "S3_PORT"])
def test_port_that_is_taken_is_named_before_anything_starts(settings, name):
    with socket.create_server(("127.0.0.1", int(settings[name]))):
        up = local(settings, "up")
    assert up.returncode == 1
    assert f"port {settings[name]} is taken; set PORT, DASHBOARD_PORT or S3_PORT" in up.stderr


def test_part_that_does_not_start_is_reported_with_its_log_and_nothing_is_left(settings, tmp_path):
    script = tmp_path / "tree" / "cluster" / SCRIPT.name  # in a tree without .venv, whose tools would be taken first
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    server = tmp_path / "weed"
    server.write_text("#!/bin/sh\necho no disk for today\nexit 3\n")
    server.chmod(0o755)
    path = f"{tmp_path}:{settings['PATH']}"
    up = subprocess.run([script, "up"], env=settings | {"PATH": path}, capture_output=True, text=True, check=False)
    assert up.returncode != 0
    assert "no disk for today" in up.stderr
    assert "s3 did not start; the last lines of its log are above" in up.stderr


def test_folder_too_deep_for_sockets_is_refused(settings, tmp_path):
    up = local(settings | {"TMPDIR": str(tmp_path / ("deep" * 10))}, "up")
    assert up.returncode == 1
    assert "too long a path" in up.stderr


@pytest.mark.parametrize("command", [["env"], ["kill", "worker-1"]])
def test_command_without_a_cluster_says_how_to_start_one(settings, command):
    done = local(settings, *command)
    assert done.returncode == 1
    assert "no cluster is up; first: " in done.stderr


def test_down_without_a_cluster_has_nothing_to_do(settings):
    assert local(settings, "down").returncode == 0


def test_unknown_command_gets_the_usage(settings):
    done = local(settings, "restart")
    assert done.returncode == 2
    assert "cluster/local.sh up [WORKERS]" in done.stderr
