"""The lease: one driver at a time, taken over from the dead and not from the living."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from examples import FINGERPRINT

from srr_dist.errors import LeaseError, StoppedError
from srr_dist.store import ObjectStore, RunArea, held_lease
from srr_dist.store.documents import parse
from srr_dist.store.lease import LeaseDocument
from tests.commands import wait_until

LEASE = f".srr/{FINGERPRINT}/lease.json"
SHORT, LONG = 0.5, 600.0
DEADLINE_SECONDS = 60
ELSEWHERE = LeaseDocument(3, "node7:1234", "nonce", "another-boot pid:[1] 1234", 1_700_000_000.0, SHORT)


@pytest.fixture
def area(memory_store):
    return RunArea(memory_store, FINGERPRINT)


def stored(area: RunArea) -> LeaseDocument:
    return parse(LeaseDocument, area.store.get(LEASE), LEASE)


def test_lease_bytes_are_the_format():
    assert ELSEWHERE.to_json() == (
        b'{"epoch":3,"holder":"node7:1234","nonce":"nonce","place":"another-boot pid:[1] 1234",'
        b'"since":1700000000.0,"ttl":0.5}'
    )


def test_lease_is_taken_renewed_given_back_and_taken_again_at_once(store):
    area = RunArea(store, FINGERPRINT)
    with held_lease(area, "host:1", SHORT) as lease:
        first = stored(area)
        assert (first.epoch, first.holder, first.ttl) == (1, "host:1", SHORT)
        wait_until(lambda: stored(area).nonce != first.nonce)
        lease.check()
        assert replace(stored(area), nonce="") == replace(first, nonce="")
    assert stored(area).holder == ""
    with held_lease(area, "host:2", LONG) as lease:
        assert lease.epoch == 2
        assert stored(area).holder == "host:2"


def test_lease_that_is_renewed_refuses_another_driver_and_names_its_holder(area):
    with held_lease(area, "node1:77", SHORT) as lease:
        with pytest.raises(LeaseError, match=r"is being worked on by node1:77 since 20\d\d-.*run the same command"):  # noqa: SIM117
            with held_lease(area, "node2:88", SHORT):
                pytest.fail("two drivers hold one lease")
        lease.check()
    assert issubclass(LeaseError, StoppedError)
    assert LeaseError.exit_code == 75


def test_lease_of_a_vanished_driver_is_taken_over_after_its_time_to_live(area, caplog):
    area.store.put(LEASE, ELSEWHERE.to_json())
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), held_lease(area, "node2:88", LONG) as lease:
        assert time.monotonic() - started >= SHORT
        assert (lease.epoch, stored(area).holder) == (4, "node2:88")
    assert "held by node7:1234 since 2023-11-14T22:13:20+00:00; waiting up to 0.5 s" in caplog.text
    assert "taking over" in caplog.text


def test_lease_does_not_compare_clocks(area):
    area.store.put(LEASE, replace(ELSEWHERE, since=4_000_000_000.0).to_json())
    with held_lease(area, "host:1") as lease:
        assert lease.epoch == 4


def test_lease_given_back_while_another_waits_is_taken_without_waiting_on(area):
    area.store.put(LEASE, replace(ELSEWHERE, ttl=LONG).to_json())
    looked = threading.Event()
    get = area.store.get
    area.store.get = lambda path: (looked.set(), get(path))[1]
    waiting = held_lease(area, "host:2", LONG)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(waiting.__enter__)
        assert looked.wait(DEADLINE_SECONDS)
        area.store.put(LEASE, replace(ELSEWHERE, ttl=LONG, holder="").to_json())
        assert taken.result(DEADLINE_SECONDS).epoch == 4
    assert stored(area).holder == "host:2"
    waiting.__exit__(None, None, None)


def test_lease_of_two_who_wait_for_a_vanished_driver_goes_to_one(area):
    area.store.put(LEASE, ELSEWHERE.to_json())
    held, ended = threading.Event(), threading.Event()

    def drive(name: str) -> str:
        try:
            with held_lease(area, name, SHORT):
                held.set()
                assert ended.wait(DEADLINE_SECONDS)
                return "held"
        except LeaseError as error:
            ended.set()
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(drive, ["host:1", "host:2"]))
    assert held.is_set()
    assert outcomes[0] == "held"
    assert "is being worked on by host:" in outcomes[1]


def hold_forever(store: ObjectStore) -> None:
    with held_lease(RunArea(store, FINGERPRINT), f"here:{os.getpid()}", LONG):
        signal.pause()


def test_lease_of_a_process_killed_on_this_machine_is_taken_at_once(local_store):
    area = RunArea(local_store, FINGERPRINT)
    process = multiprocessing.get_context("spawn").Process(target=hold_forever, args=(local_store,), daemon=True)
    process.start()
    wait_until(lambda: local_store.exists(LEASE))
    assert stored(area).holder == f"here:{process.pid}"
    process.kill()
    process.join()
    with held_lease(area, "host:1", LONG) as lease:  # would otherwise wait for ten minutes
        assert lease.epoch == 2


def test_lease_that_was_taken_over_is_lost_and_not_given_back(area):
    with held_lease(area, "host:1", SHORT) as lease:
        theirs = replace(ELSEWHERE, epoch=2)
        area.store.put(LEASE, theirs.to_json())
        wait_until(lambda: lease.lost)
        with pytest.raises(LeaseError, match="another driver has taken over this output"):
            lease.check()
    assert stored(area) == theirs


def test_lease_that_an_operator_removes_is_free(area):
    area.store.put(LEASE, replace(ELSEWHERE, ttl=LONG).to_json())
    waiting = held_lease(area, "host:1", LONG)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(waiting.__enter__)
        area.store.delete(LEASE)
        assert taken.result(DEADLINE_SECONDS).epoch in (1, 4)  # 4 if it was seen before it was removed
    waiting.__exit__(None, None, None)


def test_lease_whose_renewal_was_written_though_it_seemed_to_fail_is_kept(s3, s3_store, monkeypatch, caplog):
    monkeypatch.setattr("srr_dist.store.patience.TOTAL_SECONDS", 0.0)
    area = RunArea(s3_store, FINGERPRINT)
    with held_lease(area, "host:1", SHORT) as lease:
        first = stored(area)

        def write_but_fail(environ, start):
            return s3.lose_answer(environ, start) if environ["REQUEST_METHOD"] == "PUT" else s3.serve(environ, start)

        s3.handler = write_but_fail
        wait_until(lambda: "the lease could not be renewed" in caplog.text)
        s3.handler = s3.serve
        written = stored(area)
        assert written.nonce != first.nonce
        wait_until(lambda: stored(area).nonce != written.nonce)
        lease.check()
    assert stored(area).holder == ""


def test_lease_that_cannot_be_renewed_for_a_while_is_kept(s3, s3_store, monkeypatch, caplog):
    monkeypatch.setattr("srr_dist.store.patience.TOTAL_SECONDS", 0.1)
    area = RunArea(s3_store, FINGERPRINT)
    with held_lease(area, "host:1", SHORT) as lease:
        s3.handler = lambda environ, start: s3.refuse("503 Slow Down", "SlowDown", environ, start)
        wait_until(lambda: "the lease could not be renewed" in caplog.text)
        s3.handler = s3.serve
        before = stored(area)
        wait_until(lambda: stored(area) != before)
        lease.check()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        ELSEWHERE.to_json().replace(b"0.5", b"1e300"),
        ELSEWHERE.to_json().replace(b"0.5", b"0"),
        ELSEWHERE.to_json().replace(b'"epoch":3', b'"epoch":0'),
        ELSEWHERE.to_json().replace(b"1700000000.0", b"1e30"),
        ELSEWHERE.to_json().replace(b"node7", b"a\\nb"),
        ELSEWHERE.to_json().replace(b"node7", b"n" * 300),
    ],
    ids=lambda document: document.decode()[:70],
)
def test_damaged_lease_holds_nobody_up(area, caplog, document):
    area.store.put(LEASE, document)
    with caplog.at_level(logging.WARNING), held_lease(area, "host:1", LONG):
        assert stored(area).holder == "host:1"
    assert "the lease does not count" in caplog.text
