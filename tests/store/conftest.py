"""The three kinds of store that every contract is tested on, and an S3 server that can be made to fail."""

import logging
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer
from werkzeug.wrappers import Response
from werkzeug.wsgi import get_input_stream

from srr_dist.store import ObjectStore

Answer = Iterable[bytes]
Application = Callable[[dict[str, Any], Any], Answer]


class S3Server:
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

    def stop(self) -> None:
        self._moto.stop()


@pytest.fixture(scope="package")
def _s3_process() -> Iterator[S3Server]:
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # moto keeps one world a process: another test may have made the bucket.
        s3fs.S3FileSystem(skip_instance_cache=True).makedirs("bucket", exist_ok=True)
        yield server
    server.stop()


@pytest.fixture
def s3(_s3_process: S3Server) -> Iterator[S3Server]:
    yield _s3_process
    _s3_process.handler = _s3_process.serve


@pytest.fixture
def s3_store(s3: S3Server) -> ObjectStore:
    return ObjectStore(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def local_store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


@pytest.fixture
def memory_store() -> ObjectStore:
    return ObjectStore(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store."""
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture(params=["local", "s3"])
def shared_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store that several processes can use."""
    return request.getfixturevalue(f"{request.param}_store")
