"""The cluster of ``cluster/local.sh`` on ports and in a folder of its own."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "cluster" / "local.sh"
SERVER_PORTS, HEAD_PORTS = 5, 3
"""Ports that the S3 server takes in a row, and again 10000 above; that the head takes in a row."""


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that is up.

    Attributes:
        settings: environment in which ``cluster/local.sh`` acts on this cluster.
        variables: what ``cluster/local.sh env`` prints.
    """

    settings: dict[str, str]
    variables: dict[str, str]

    @property
    def state(self) -> Path:
        """The folder that holds whatever the cluster writes."""
        return Path(self.variables["RAY_AUTH_TOKEN_PATH"]).parent

    def client(self) -> dict[str, str]:
        """Environment of a client of the cluster."""
        return self.settings | self.variables


@contextmanager
def local_cluster(workers: int) -> Iterator[LocalCluster]:
    """Bring a cluster up, and down again, after which nothing of it may be left."""
    folder = Path(tempfile.mkdtemp(prefix="srr-", dir="/tmp"))  # a socket's path must be short
    settings = environment(folder)
    try:
        up = local(settings, "up", str(workers))
        assert up.returncode == 0, up.stderr
        yield LocalCluster(settings, exported(up.stdout))
    finally:
        down = local(settings, "down")
        left, running = list(folder.iterdir()), processes(folder)
        shutil.rmtree(folder)
    assert (down.returncode, left, running) == (0, [], ""), down.stderr


def environment(folder: Path) -> dict[str, str]:
    """This process's environment without what leads to another cluster, with free ports and ``folder`` for files."""
    foreign = ("RAY_", "AWS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    server, head, dashboard = free_ports()
    tools = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    ports = {"PORT": str(head), "DASHBOARD_PORT": str(dashboard), "S3_PORT": str(server)}
    return (
        inherited | ports | {"TMPDIR": str(folder), "PATH": tools, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    )


def free_ports() -> tuple[int, int, int]:
    """Ports for the S3 server, the head and its dashboard, below those that the system hands out by itself."""
    while True:
        first = random.randrange(11_000, 22_000)
        wanted = range(first, first + SERVER_PORTS + HEAD_PORTS + 1)
        if all(is_free(port) for port in [*wanted, *(port + 10_000 for port in wanted[:SERVER_PORTS])]):
            return first, wanted[SERVER_PORTS], wanted[-1]


def is_free(port: int) -> bool:
    with socket.socket() as knock:
        try:
            knock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def local(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``cluster/local.sh ARGUMENTS``."""
    return subprocess.run(
        [str(SCRIPT), *arguments], env=settings, capture_output=True, text=True, timeout=300, check=False
    )


def exported(lines: str) -> dict[str, str]:
    """The variables of ``export NAME=VALUE`` lines."""
    pairs = (line.removeprefix("export ").split("=", 1) for line in lines.splitlines())
    return dict(pairs)


def processes(folder: Path) -> str:
    """Process ids whose command names ``folder``."""
    return subprocess.run(["pgrep", "--full", str(folder)], capture_output=True, text=True, check=False).stdout
