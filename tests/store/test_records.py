import json
import logging

import pytest
from examples import FINGERPRINT, SHA256, block_record, finished_record, manifest

from srr_dist.errors import OutputError, StoreError
from srr_dist.store import BlockRecord, FileEntry, ObjectStore, RunArea, write_commit

OTHER = "fedcba9876543210" * 4
AREA = f".srr/{FINGERPRINT}"
GOLDEN = (
    '{"attempt":"1-aaaa",'
    f'"files":{{"base":{{"path":"{AREA}/blocks/00017/1-aaaa/base.safetensors","sha256":"{SHA256}","size":4}}}},'
    f'"fingerprint":"{FINGERPRINT}","finished":1700000000.25,"generation":1,"hardware":"cpu",'
    '"layers":[{"k":12,"name":"model.layers.17.mlp.down_proj","objective":{"chosen":0.5,"k0":1.5}}],'
    f'"seconds":{{"solve":2.5}},"source_sha256":"{SHA256}","stage":{{"rank":0}},"unit":"00017","versions":{{"torch":"2.13.0"}}}}'
).encode()


@pytest.fixture
def area(memory_store):
    return RunArea(memory_store, FINGERPRINT)


def test_record_bytes_are_the_format():
    assert block_record().to_json() == GOLDEN
    assert BlockRecord.from_json(GOLDEN, "x") == block_record()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unit", "17", "unit '17'"),
        ("unit", "../00017", "unit"),
        ("generation", 0, "generation 0"),
        ("generation", True, "generation: expected int, found bool True"),
        ("fingerprint", "X" * 64, "fingerprint"),
        ("attempt", "a/b", "segment 'a/b'"),
        ("attempt", "..", "'..'"),
        ("files", {"base": 3}, r"files\.base: expected dict, found int 3"),
        ("files", {"base": {"path": "a", "size": 1}}, r"files\.base: field sha256 is missing"),
        ("files", {"base": {"path": "../a", "size": 1, "sha256": SHA256}}, r"files\.base: path '\.\./a'"),
        ("files", {"base": {"path": "base/config.json", "size": 1, "sha256": SHA256}}, "expected a path below"),
        ("layers", [{}, []], r"layers\.1: expected dict, found list"),
        ("seconds", {"solve": "2"}, r"seconds\.solve: expected float, found str"),
        ("finished", 10**400, "finished: the number is beyond float64"),
        ("extra", 1, "unknown field 'extra'"),
    ],
)
def test_record_with_wrong_field_names_record_and_field(field, value, message):
    document = json.loads(GOLDEN) | {field: value}
    with pytest.raises(StoreError, match=rf"^blocks/00017\.json: .*{message}"):
        BlockRecord.from_json(json.dumps(document).encode(), "blocks/00017.json")


def test_attempt_path_lies_below_the_area(area):
    assert area.attempt_path("00017", "1-aaaa", "base.safetensors") == f"{AREA}/blocks/00017/1-aaaa/base.safetensors"
    assert area.attempt_path("rest", "1-aaaa", "x") == f"{AREA}/blocks/rest/1-aaaa/x"
    for unit, attempt, name in [("17", "a", "x"), ("00017", "a/b", "x"), ("00017", "a", "../x"), ("..", "a", "x")]:
        with pytest.raises(StoreError):
            area.attempt_path(unit, attempt, name)


def test_begin_writes_the_run_once(area):
    area.begin({"rank": 32, "targets": ("q", "k")})
    area.begin({"rank": 32, "targets": ["q", "k"]})
    assert area.run() == {"rank": 32, "targets": ["q", "k"]}
    assert area.store.list() == {f"{AREA}/run.json": 31}
    assert RunArea.find(area.store) == [FINGERPRINT]


def test_begin_on_output_of_another_run_lists_the_differences(area):
    area.begin({"rank": 32, "method": {"name": "srr", "bits": 3}, "seed": 0})
    with pytest.raises(OutputError, match=r"method\.bits: 3 -> 4; rank: 32 -> 64; scale: None -> 1\. Use another"):
        RunArea(area.store, OTHER).begin({"rank": 64, "method": {"name": "srr", "bits": 4}, "seed": 0, "scale": 1})
    assert RunArea.find(area.store) == [FINGERPRINT]


def test_begin_that_met_another_run_halfway_is_refused(area):
    other = RunArea(area.store, OTHER)
    area.begin({"rank": 32})
    other.store.create(other.path("run.json"), b'{"rank":64}')
    with pytest.raises(OutputError, match="rank: 64 -> 32"):
        area.begin({"rank": 32})


def test_begin_on_finished_output_of_another_run_is_refused(area):
    write_commit(area.store, manifest(fingerprint=OTHER))
    with pytest.raises(OutputError, match="finished output of run fedcba98, expected 01234567"):
        area.begin({})


def test_begin_again_while_commit_was_being_replaced_resumes(area):
    area.begin({})
    write_commit(area.store, manifest())
    area.store.put("manifest.json", manifest(exports=["base"]).to_json())
    area.begin({})
    assert RunArea.find(area.store) == [FINGERPRINT]


def test_run_that_is_no_object_names_it(area):
    area.store.put(f"{AREA}/run.json", b"[]")
    with pytest.raises(StoreError, match=r"run\.json: expected a JSON object, found list"):
        area.run()


def test_commit_first_record_wins_and_later_ones_learn_of_it(store):
    area = RunArea(store, FINGERPRINT)
    first, late = finished_record(area), finished_record(area, attempt="2-bbbb")
    assert area.commit(first) == first
    assert area.commit(late) == first
    assert area.commit(first) == first
    assert area.records() == {"00017": first}
    assert store.get(f"{AREA}/blocks/00017.json") == first.to_json()


def test_commit_of_another_run_is_refused(area):
    with pytest.raises(StoreError, match=f"record of run {OTHER}"):
        area.commit(block_record(fingerprint=OTHER))


def test_commit_onto_damaged_record_names_it(area):
    area.store.put(f"{AREA}/blocks/00017.json", b"{}")
    with pytest.raises(StoreError, match=r"blocks/00017\.json: field .* is missing"):
        area.commit(finished_record(area))


def test_records_come_sorted_and_include_the_rest(area):
    expected = [area.commit(finished_record(area, unit=unit)) for unit in ["rest", "00002", "00010"]]
    assert list(area.records().items()) == [("00002", expected[1]), ("00010", expected[2]), ("rest", expected[0])]


def test_records_highest_generation_counts(area):
    area.commit(finished_record(area))
    for generation in (2, 10):
        last = area.commit(finished_record(area, generation=generation, attempt=f"{generation}-x"))
    assert area.records() == {"00017": last}
    assert area.store.exists(f"{AREA}/blocks/00017.g10.json")


def test_records_whose_file_is_missing_or_of_another_size_do_not_count(area, caplog):
    first = area.commit(finished_record(area))
    second = area.commit(finished_record(area, generation=2, attempt="2-bbbb"))
    area.store.put(second.files["base"].path, b"too long")
    with caplog.at_level(logging.WARNING):
        assert area.records() == {"00017": first}
    assert "has 8 bytes, expected 4 bytes" in caplog.text
    area.store.delete(first.files["base"].path)
    assert area.records() == {}
    assert area.records(check_sizes=False) == {"00017": second}


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", GOLDEN[:-1]])
def test_records_damaged_one_does_not_count_and_is_logged(area, caplog, damage):
    good = area.commit(finished_record(area, unit="00003"))
    area.store.put(f"{AREA}/blocks/00017.json", damage)
    with caplog.at_level(logging.WARNING):
        assert area.records() == {"00003": good}
    assert "blocks/00017.json" in caplog.text


def test_records_copied_to_another_name_do_not_count(area):
    good = area.commit(finished_record(area))
    for name in ["00018.json", "00017.g2.json"]:
        area.store.copy(f"{AREA}/blocks/00017.json", f"{AREA}/blocks/{name}")
    assert area.records() == {"00017": good}


def test_records_other_objects_are_no_records(area):
    for name in ["00017.g0.json", "00017.json.bak", "017.json", "00017/1-a/00017.json", "x/00017.json"]:
        area.store.put(f"{AREA}/blocks/{name}", GOLDEN)
    assert area.records(check_sizes=False) == {}
    assert area.next_generations() == {}


def test_next_generations_follow_the_last_record_valid_or_not(area):
    assert area.next_generations() == {}
    area.commit(finished_record(area))
    area.commit(finished_record(area, unit="rest"))
    area.store.put(f"{AREA}/blocks/00017.g2.json", b"damaged")
    assert area.next_generations() == {"00017": 3, "rest": 2}


def test_record_entry_of_another_attempt_is_refused():
    foreign = FileEntry(f"{AREA}/blocks/00017/2-bbbb/base.safetensors", 4, SHA256)
    with pytest.raises(StoreError, match=r"files\.base: expected a path below .*1-aaaa"):
        block_record(files={"base": foreign})


def test_condemned_record_does_not_count_and_its_bytes_stay(area, caplog):
    first = area.commit(finished_record(area))
    other = area.commit(finished_record(area, unit="rest"))
    before = area.store.get(f"{AREA}/blocks/00017.json")
    area.condemn(first, ["a byte differs"])
    area.condemn(first, ["found again"])
    with caplog.at_level(logging.WARNING):
        assert area.records() == {"rest": other}
    assert "unit 00017, generation 1 does not count: it is marked as damaged" in caplog.text
    assert area.store.get(f"{AREA}/blocks/00017.json") == before
    assert area.store.get_json(f"{AREA}/blocks/00017.g1.damaged.json") == {"problems": ["a byte differs"]}
    assert area.next_generations() == {"00017": 2, "rest": 2}
    second = area.commit(finished_record(area, generation=2, attempt="2-bbbb"))
    assert area.records() == {"00017": second, "rest": other}
    area.condemn(second, [])
    assert area.records() == {"rest": other}


def test_condemned_output_stays_so_until_it_is_acquitted(area):
    assert not area.is_condemned()
    area.condemn_output(["base/x is damaged"])
    area.condemn_output(["base/y is damaged"])
    assert area.is_condemned()
    area.acquit_output()
    area.acquit_output()
    assert not area.is_condemned()


def test_garbage_is_what_no_record_names(store):
    area = RunArea(store, FINGERPRINT)
    area.begin({"units": ["00017"]})
    first = area.commit(finished_record(area))
    second = area.commit(finished_record(area, generation=2, attempt="2-bbbb"))
    area.condemn(first, [])
    kept = set(store.list())
    for waste in ("blocks/00017/3-cccc/base.safetensors", "blocks/rest/1/base.safetensors", f"probe-{'0' * 32}"):
        store.put(f"{AREA}/{waste}", b"waste")
    for other in (f"{AREA}/boundaries/00004/00000.safetensors", f"{AREA}/evaluations/a.json", "base/config.json"):
        store.put(other, b"kept")
        kept.add(other)
    area.collect_garbage()
    assert set(store.list()) == kept
    assert area.records() == {"00017": second}


def test_garbage_is_also_what_a_killed_writer_left_in_the_output(tmp_path):
    area = RunArea(ObjectStore(str(tmp_path)), FINGERPRINT)
    area.store.put("base/config.json", b"kept")
    left = tmp_path / "base" / ".tmp-of-a-killed-writer"
    left.write_bytes(b"half")
    area.collect_garbage()
    assert not left.exists()
    assert area.store.get("base/config.json") == b"kept"


@pytest.mark.parametrize("units", [None, "00017", [3], ["../x"]])
def test_run_that_does_not_say_its_units_is_refused(area, units):
    area.begin({"units": units} if units else {})
    with pytest.raises(StoreError, match="unit"):
        area.units()


def test_units_are_those_of_the_run(area):
    area.begin({"units": ["00000", "rest"]})
    assert area.units() == {"00000", "rest"}


def test_single_driver_of_a_store_without_conditions_can_begin_and_commit(s3, s3_store):
    s3.handler = s3.refuse_conditions
    with pytest.raises(StoreError, match="--single-driver"):
        RunArea(s3_store, FINGERPRINT).begin({"rank": 32})
    area = RunArea(ObjectStore(s3_store.url, single_driver=True), FINGERPRINT)
    area.begin({"rank": 32})
    first = area.commit(finished_record(area))
    assert area.commit(finished_record(area, attempt="2-bbbb")) == first
    with pytest.raises(OutputError, match="rank: 32 -> 64"):
        RunArea(area.store, OTHER).begin({"rank": 64})
