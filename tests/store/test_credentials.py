"""Where the keys of a storage server come from, and that they are never shown."""

import logging
import os
import pickle
import subprocess
import sys
import uuid

import pytest
from examples import FINGERPRINT, finished_record

from srr_dist.errors import StoreError
from srr_dist.store import ObjectStore, RunArea, held_lease
from tests.s3 import KEY, SECRET, environment

WRITE = "import sys; from srr_dist.store import ObjectStore; ObjectStore(sys.argv[1]).put('a', b'x')"
FSSPEC = {"FSSPEC_S3_KEY": KEY, "FSSPEC_S3_SECRET": SECRET}


@pytest.mark.parametrize("source", ["aws", "fsspec"])
def test_keys_and_endpoint_come_from_the_environment_of_aws_or_of_fsspec(seaweed, seaweed_store, source):
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    variables = environment(seaweed.url) if source == "aws" else FSSPEC | {"FSSPEC_S3_ENDPOINT_URL": seaweed.url}
    subprocess.run([sys.executable, "-c", WRITE, seaweed_store.url], env=bare | variables, check=True)
    assert seaweed_store.get("a") == b"x"


def test_wrong_secret_is_refused_at_once_and_shown_nowhere(seaweed, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := uuid.uuid4().hex)
    with (
        caplog.at_level(logging.DEBUG, logger="srr_dist"),
        pytest.raises(StoreError, match="PermissionError") as refused,
    ):
        ObjectStore("s3://bucket/x").put("a", b"x")
    for text in (str(refused.value), caplog.text):
        assert wrong not in text
        assert KEY not in text


def test_no_key_in_what_is_stored_logged_or_sent_to_workers(s3, s3_store, monkeypatch, caplog):
    monkeypatch.setattr("srr_dist.store.patience.TOTAL_SECONDS", 0.3)
    area = RunArea(s3_store, FINGERPRINT)
    with caplog.at_level(logging.DEBUG, logger="srr_dist"):
        area.begin({"units": ["00017"]})
        with held_lease(area, "host:1"):
            area.condemn(area.commit(finished_record(area)), ["damaged"])
            area.records()
            area.collect_garbage()
        s3.handler = lambda environ, start: s3.refuse("503 Slow Down", "SlowDown", environ, start)
        with pytest.raises(StoreError) as failed:
            s3_store.get("a")
        s3.handler = s3.serve
    shown = [str(failed.value).encode(), caplog.text.encode(), pickle.dumps(s3_store), repr(s3_store).encode()]
    shown += [s3_store.get(path) for path in s3_store.list()]
    assert "trying again" in caplog.text
    assert not any(secret.encode() in text for text in shown for secret in (KEY, SECRET))
