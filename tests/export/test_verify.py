"""Every kind of damage to a finished output is found and named."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from random_runs import FINGERPRINT, Recipe, commit_run, llama_config

from srr_dist.errors import StoreError
from srr_dist.export.assemble import assemble, is_complete
from srr_dist.export.verify import verify_output
from srr_dist.store.manifest import COMMIT, MANIFEST, write_commit
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.records import RunArea

SHARD = "base/model-00002-of-00003.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
ZERO = "model.layers.1.mlp.up_proj.weight_zero_point"


@pytest.fixture
def finished(committed):
    """A sound output with every export, and its manifest."""
    manifest = assemble(committed.store, committed.records, committed.output, ["compressed", "dense"])
    return committed.store, manifest


def rewrite(store, path, change):
    """Replace a tensor file by one with changed tensors, of the same size."""
    tensors = safetensors.torch.load(store.get(path))
    change(tensors)
    store.put(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def recommit(store, manifest, *dropped, **changes):
    """Commit the output as it lies there, with files dropped and fields changed: as if it had been made so."""
    kept = {path: entry for path, entry in manifest.files.items() if path not in dropped}
    files = {path: FileEntry(path, store.size(path), store.sha256(path)) for path in kept}
    write_commit(store, dataclasses.replace(manifest, files=files, **changes))


@pytest.fixture
def with_zero_points(tmp_path):
    """A sound output whose codes have zero points, and its manifest."""
    store = ObjectStore(str(tmp_path / "out"))
    run = commit_run(store, tmp_path, llama_config(dtype="bfloat16"), Recipe(symmetric=False))
    return store, assemble(store, run.records, run.output, ["compressed"])


def test_verify_finds_a_layer_to_which_the_configuration_gives_other_bits(tmp_path):
    store, name = ObjectStore(str(tmp_path / "out")), "model.layers.1.self_attn.v_proj"
    run = commit_run(store, tmp_path, llama_config(dtype="bfloat16"), Recipe(others=(("v_proj", 5), ("o_proj", 4))))
    manifest = assemble(store, run.records, run.output, ["compressed"])
    assert verify_output(store.url) == []
    config = store.get_json("base/config.json")
    groups = {each["weights"]["num_bits"]: each for each in config["quantization_config"]["config_groups"].values()}
    groups[5]["targets"].remove(name)
    for targets, found in ((groups[4]["targets"], (4, 32, True)), ([], None)):
        targets.append(name)
        store.put("base/config.json", json.dumps(config).encode())
        recommit(store, manifest)
        expected = f"{found}, by the manifest layer {name} has (5, 32, True)"
        assert verify_output(store.url) == [f"base/config.json: (bits, group size, symmetric) {expected}"]
        targets.remove(name)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method_rank", [4, 0])
def test_verify_sound_output_finds_nothing(tmp_path, method_rank, symmetric):
    recipe = Recipe(group_size=-1, rank=lambda name: None if "k_proj" in name else method_rank, symmetric=symmetric)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), recipe)
    assemble(run.store, run.records, run.output, ["compressed", "dense"])
    for view in ("README.md", "report.html", "report.json"):
        run.store.put(view, b"regenerated at any time")
    assert verify_output(run.store.url) == []


def test_verify_missing_commit_is_one_problem(finished):
    store, _ = finished
    store.delete(COMMIT)
    assert [problem for problem in verify_output(store.url) if "no COMMIT" not in problem] == []
    assert len(verify_output(store.url)) == 1


def test_verify_nothing_there_is_one_problem(tmp_path):
    (problem,) = verify_output(str(tmp_path / "nothing"))
    assert "no COMMIT" in problem


def test_verify_edited_manifest_is_found(finished):
    store, _ = finished
    store.put(MANIFEST, store.get(MANIFEST).replace(b'"rank":4', b'"rank":8'))
    (problem,) = verify_output(store.url)
    assert "manifest.json: COMMIT expects sha256" in problem


@pytest.mark.parametrize("path", [SHARD, ADAPTER, SHARD.replace("base", "dense"), "base/tokenizer_config.json"])
@pytest.mark.parametrize("position", [0, -1])
def test_verify_flipped_bit_is_found_in_every_kind_of_file(finished, path, position):
    store, _ = finished
    data = bytearray(store.get(path))
    data[position] ^= 1
    store.put(path, bytes(data))
    problems = verify_output(store.url)
    assert problems
    assert all(path in problem for problem in problems)


@pytest.mark.parametrize("path", [SHARD, ADAPTER, "base/config.json"])
def test_verify_deleted_file_is_found(finished, path):
    store, _ = finished
    store.delete(path)
    (problem,) = verify_output(store.url)
    assert path in problem
    assert "no such object" in problem


def test_verify_truncated_adapter_is_found(finished):
    store, manifest = finished
    store.put(ADAPTER, store.get(ADAPTER)[:-2])
    size = manifest.files[ADAPTER].size
    assert verify_output(store.url) == [f"{ADAPTER}: {size - 2} bytes, the manifest says {size}"]


@pytest.mark.parametrize("folder", ["base", "adapter", "dense"])
def test_verify_extra_file_is_found(finished, folder):
    store, _ = finished
    store.put(f"{folder}/model.safetensors", b"")
    (problem,) = verify_output(store.url)
    assert problem.startswith(f"{folder}/model.safetensors: not in the manifest")


def spoil(name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


SPOILED = {
    "NaN scale": (SHARD, spoil(SCALE, torch.nan), "1 of 128 values are NaN or infinite"),
    "zero scale": (SHARD, spoil(SCALE, 0), "1 of 128 scales are zero"),
    "infinite norm": (SHARD, spoil("model.layers.1.input_layernorm.weight", torch.inf), "1 of 64 values are NaN"),
    "NaN factor": (ADAPTER, spoil("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", torch.nan), "1 of 256"),
    "NaN embedding": (
        "base/model-00003-of-00003.safetensors",
        spoil("model.embed_tokens.weight", torch.nan),
        "1 of 8192",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_verify_value_that_was_committed_spoiled_is_found(finished, case):
    store, manifest = finished
    path, change, message = SPOILED[case]
    rewrite(store, path, change)
    recommit(store, manifest)
    (problem,) = verify_output(store.url)
    assert problem.startswith(f"{path}: tensor ")
    assert message in problem


def test_verify_hole_in_the_blocks_is_found(finished):
    store, manifest = finished
    store.delete(SHARD)
    recommit(store, manifest, SHARD)
    problems = verify_output(store.url)
    assert f"{SHARD}: missing, though its neighbours are there" in problems
    assert any(f"tensor {SCALE}" in problem for problem in problems)


def test_verify_tensor_in_two_shards_is_found(finished):
    store, manifest = finished
    rewrite(
        store,
        "base/model-00003-of-00003.safetensors",
        lambda tensors: tensors.update({SCALE: torch.ones(64, 2).bfloat16()}),
    )
    recommit(store, manifest)
    problems = verify_output(store.url)
    assert any(f"{SCALE} is in model-00002-of-00003" in problem for problem in problems)


def test_verify_layer_that_the_manifest_describes_otherwise_is_found(finished):
    store, manifest = finished
    layers = {name: {**layer, "rank": 3, "bits": 4} for name, layer in manifest.layers.items()}
    recommit(store, manifest, layers=layers)
    problems = verify_output(store.url)
    assert any("up_proj.lora_A.weight: shape (4, 64), by the manifest (3, 64)" in problem for problem in problems)
    assert any("up_proj.weight_packed: shape (64, 6), by the manifest (64, 8)" in problem for problem in problems)
    assert any(
        problem.startswith("base/config.json: (bits, group size, symmetric) (3, 32, True)") for problem in problems
    )


def test_verify_changed_zero_point_is_found(with_zero_points):
    store, _ = with_zero_points

    def change(tensors):
        tensors[ZERO][0, 0] ^= 1

    rewrite(store, SHARD, change)
    (problem,) = verify_output(store.url)
    assert problem.startswith(f"{SHARD}: its sha256 is not the manifest's")


def without(tensors):
    del tensors[ZERO]


def cut(tensors):
    tensors[ZERO] = tensors[ZERO][1:].contiguous()


@pytest.mark.parametrize(("change", "found"), [(without, "None"), (cut, "(5, 2)")])
def test_verify_missing_or_short_zero_points_are_found(with_zero_points, change, found):
    store, manifest = with_zero_points
    rewrite(store, SHARD, change)
    recommit(store, manifest)
    problems = verify_output(store.url)
    assert f"base/: tensor {ZERO}: shape {found}, by the manifest (6, 2)" in problems


def test_verify_zero_points_that_the_configuration_or_the_manifest_does_not_know_are_found(with_zero_points):
    store, manifest = with_zero_points
    layers = {name: {k: v for k, v in layer.items() if k != "symmetric"} for name, layer in manifest.layers.items()}
    recommit(store, manifest, layers=layers)
    problems = verify_output(store.url)
    assert f"base/: tensor {ZERO}: shape (6, 2), by the manifest None" in problems
    assert any("(bits, group size, symmetric) (3, 32, False), by the manifest" in problem for problem in problems)


def test_verify_adapter_configuration_with_another_scale_is_found(finished):
    store, manifest = finished
    config = store.get_json("adapter/adapter_config.json") | {"lora_alpha": 8}
    store.put("adapter/adapter_config.json", json.dumps(config).encode())
    recommit(store, manifest)
    assert verify_output(store.url) == ["adapter/adapter_config.json: its ranks or modules are not the manifest's"]


@pytest.fixture
def begun(finished, committed):
    """The same with its run.json, as a run leaves it."""
    area = RunArea(committed.store, FINGERPRINT)
    area.begin({"units": sorted(committed.records)})
    return area


def detach(store, path, change):
    """Change the bytes of an object, and not of those that a folder keeps in the same file."""
    data = bytearray(store.get(path))
    change(data)
    store.put(path, bytes(data))


def flip(data):
    data[-1] ^= 1


def test_verify_sound_output_with_its_blocks_is_not_marked(begun, caplog):
    before = begun.store.list()
    assert verify_output(begun.store.url) == []
    assert begun.store.list() == before


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_verify_flipped_bit_in_a_block_is_named_and_condemns_its_record(begun, kind):
    path = begun.records()["00001"].files[kind].path
    detach(begun.store, path, flip)
    (problem,) = verify_output(begun.store.url)
    assert problem.startswith(f"{path}: its sha256 is not its record's")
    assert "redoes unit 00001" in problem
    assert begun.records().keys() == {"00000", "rest"}
    assert begun.store.get_json(f"{begun.folder}/damaged.json") == {"problems": [problem]}
    assert not is_complete(begun.store, "compressed")
    (again,) = verify_output(begun.store.url)
    assert again == "unit 00001: no valid record; repeat the run, which redoes it"


def test_verify_missing_block_is_named_and_condemned(begun):
    path = begun.records()["rest"].files["base"].path
    begun.store.delete(path)
    (problem,) = verify_output(begun.store.url)
    assert path in problem
    assert "redoes unit rest" in problem
    assert begun.store.exists(f"{begun.folder}/blocks/rest.g1.damaged.json")


def test_verify_damaged_assembled_file_condemns_the_output_until_it_is_assembled_anew(begun, committed):
    detach(begun.store, SHARD, flip)
    (problem,) = verify_output(begun.store.url)
    assert problem.startswith(f"{SHARD}: its sha256 is not the manifest's")
    assert begun.records() == committed.records
    assert not is_complete(begun.store, "compressed")
    assemble(begun.store, begun.records(), committed.output, ["compressed"])
    assert is_complete(begun.store, "compressed")
    assert verify_output(begun.store.url) == []


def test_verify_where_nothing_may_be_written_still_names_the_damage(begun, caplog, monkeypatch):
    def refuse(*_):
        raise StoreError("damaged.json cannot be written: PermissionError")

    detach(begun.store, SHARD, flip)
    monkeypatch.setattr(ObjectStore, "put", refuse)
    (problem,) = verify_output(begun.store.url)
    assert problem.startswith(f"{SHARD}: ")
    assert "cannot be marked" in caplog.text


def test_verify_output_whose_working_area_was_removed_writes_nothing(finished):
    store, _ = finished
    store.delete_tree(".srr")
    detach(store, SHARD, flip)
    assert len(verify_output(store.url)) == 1
    assert store.list(".srr") == {}


def test_assembly_that_meets_a_damaged_adapter_condemns_its_record(begun, committed):
    path = begun.records()["00001"].files["adapter"].path
    detach(begun.store, path, flip)
    with pytest.raises(StoreError, match=f"{path}: sha256 .* the same command again redoes its block"):
        assemble(begun.store, begun.records(), committed.output, ["compressed"])
    assert begun.records().keys() == {"00000", "rest"}
