"""The kinds of store that every contract is tested on, and an S3 server that can be made to fail."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from srr_dist.store import ObjectStore
from tests.gcs import GcsServer
from tests.gcs import environment as gcs_environment
from tests.s3 import MotoServer, SeaweedServer, environment, set_variables


@pytest.fixture(scope="package")
def _moto() -> Iterator[MotoServer]:
    server = MotoServer()
    with pytest.MonkeyPatch.context() as patch:
        set_variables(patch, environment(server.url))
        server.make_bucket()
    yield server
    server.stop()


@pytest.fixture
def s3(_moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    set_variables(monkeypatch, environment(_moto.url))
    yield _moto
    _moto.handler = _moto.serve


@pytest.fixture
def s3_store(s3: MotoServer) -> ObjectStore:
    return ObjectStore(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def seaweed_store(seaweed: SeaweedServer) -> ObjectStore:
    return ObjectStore(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(scope="package")
def _gcs() -> Iterator[GcsServer]:
    server = GcsServer()
    yield server
    server.stop()


@pytest.fixture
def gcs_store(_gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    set_variables(monkeypatch, gcs_environment(_gcs.url))
    return ObjectStore(f"gs://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def local_store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


@pytest.fixture
def memory_store() -> ObjectStore:
    return ObjectStore(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "memory", "s3", "seaweed", "gcs"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store."""
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture(params=["local", "s3", "seaweed", "gcs"])
def shared_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store that several processes can use."""
    return request.getfixturevalue(f"{request.param}_store")
