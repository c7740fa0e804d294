"""Strict JSON, and that no input whatever gets past the parsers of records and manifests."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from examples import FINGERPRINT, block_record, manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srr_dist.errors import StoreError
from srr_dist.store import BlockRecord, Manifest, RunArea
from srr_dist.store.documents import decode, encode, parse
from srr_dist.store.lease import LeaseDocument
from srr_dist.store.overview import overview

LEASE = LeaseDocument(3, "node7:1234", "nonce", "boot pid:[1] 1234", 1_700_000_000.0, 60.0)
PARSERS: list[Callable[[bytes, str], Any]] = [BlockRecord.from_json, Manifest.from_json, partial(parse, LeaseDocument)]
EXAMPLES = [json.loads(document.to_json()) for document in (block_record(), manifest(), LEASE)]

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


def test_encode_does_not_depend_on_the_order_of_keys():
    assert encode({"b": [1, 2.5], "a": "é"}, "x") == encode({"a": "é", "b": [1, 2.5]}, "x")
    assert encode({"b": [1, 2.5], "a": "é"}, "x") == b'{"a":"\\u00e9","b":[1,2.5]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1, 2}, {("a", "b"): 1}])
def test_encode_value_that_json_lacks_is_refused(value):
    with pytest.raises(StoreError, match=r"a\.json: cannot be written as JSON"):
        encode({"x": value}, "a.json")


@given(values)
def test_encode_then_decode_gives_the_value_back(value):
    assert decode(encode(value, "x"), "x") == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b'{"a":1,"a":2}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"1" * 5_000,
    ],
    ids=lambda data: data[:12].decode("latin-1"),
)
def test_decode_of_anything_but_strict_json_names_the_source(data):
    with pytest.raises(StoreError, match=r"a\.json: not valid JSON"):
        decode(data, "a.json")


@pytest.mark.parametrize("parse", PARSERS, ids=["record", "manifest", "lease"])
@given(data=st.binary() | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_document_or_a_store_error(parse, data):
    with pytest.raises(StoreError, match=r"^some/object\.json: "):
        parse(data, "some/object.json")


@given(st.data())
def test_any_change_to_a_document_leaves_it_valid_or_is_a_store_error(data):
    number = data.draw(st.integers(0, len(EXAMPLES) - 1))
    document = json.loads(json.dumps(EXAMPLES[number]))
    for _ in range(data.draw(st.integers(1, 3))):
        _change(document, data)
    try:
        parsed = PARSERS[number](json.dumps(document).encode(), "some/object.json")
    except StoreError as error:
        assert str(error).startswith("some/object.json: ")
    else:
        assert PARSERS[number](parsed.to_json(), "x") == parsed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary() | st.fixed_dictionaries({"units": values, "model": values}).map(lambda v: json.dumps(v).encode())
)
def test_any_run_json_is_read_or_is_a_store_error(memory_store, data):
    area = RunArea(memory_store, FINGERPRINT)
    memory_store.put(area.path("run.json"), data)
    for read in (area.run, area.units, lambda: overview(memory_store)):
        try:
            read()
        except StoreError as error:
            assert "run.json" in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary() | values.map(lambda value: json.dumps(value).encode()))
def test_any_record_or_mark_in_the_working_area_is_counted_or_skipped(memory_store, data):
    area = RunArea(memory_store, FINGERPRINT)
    memory_store.put(area.path("blocks/00017.json"), data)
    memory_store.put(area.path("blocks/00018.g1.damaged.json"), data)
    assert area.records() == {}
    assert area.next_generations() == {"00017": 2}


def _change(document: dict[str, Any], data: st.DataObject) -> None:
    """Replace, remove or add one value anywhere in the document."""
    container, key = data.draw(st.sampled_from(list(_places(document))))
    if isinstance(container, dict) and data.draw(st.booleans()):
        container.pop(key)
        container[data.draw(st.text() | st.just(key + "x"))] = data.draw(values)
    else:
        kinds = [values, st.sampled_from(["../x", "0" * 64, -1, 10**400, 1e300, True, "00018", "\ud800"])]
        container[key] = data.draw(st.one_of(kinds))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)
