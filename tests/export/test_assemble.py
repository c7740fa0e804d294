"""Assembly: what lies where, the same bytes each time, interruption at any write, exports added later."""

import dataclasses
import hashlib
import json
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
from random_runs import FINGERPRINT, Recipe, commit_run, llama_config

from srr_dist.errors import OutputError, StoreError
from srr_dist.export.assemble import assemble
from srr_dist.export.base import bits_per_weight
from srr_dist.store.manifest import COMMIT, MANIFEST, read_complete
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.records import RunArea

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
PREFIX = "base_model.model."


def contents(store):
    return {path: store.get(path) for path in store.list() if not path.startswith(".srr/")}


def test_compressed_export_consists_of_the_documented_files(committed):
    manifest = assemble(committed.store, committed.records, committed.output, ["compressed"])
    base = [*SHARDS, "config.json", "model.safetensors.index.json", "tokenizer_config.json"]
    expected = {f"base/{name}" for name in base} | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert contents(committed.store).keys() == expected | {MANIFEST, COMMIT}
    assert manifest.files.keys() == expected
    assert manifest.exports == ["adapter", "base"]
    assert read_complete(committed.store) == manifest


def test_manifest_states_size_and_sha256_of_every_file_and_no_time(committed):
    manifest = assemble(committed.store, committed.records, committed.output, ["compressed", "dense"])
    for path, entry in manifest.files.items():
        data = committed.store.get(path)
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    keys = {"created_by", "exports", "files", "fingerprint", "format_version", "layers", "unquantized"}
    assert json.loads(committed.store.get(MANIFEST)).keys() == keys


def test_manifest_states_the_choices_of_every_layer(tmp_path):
    recipe = Recipe(rank=lambda name: None if "k_proj" in name else 4)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), recipe)
    manifest = assemble(run.store, run.records, run.output, ["compressed"])
    assert manifest.unquantized == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert len(manifest.layers) == 12
    assert manifest.layers["model.layers.1.mlp.up_proj"] == {
        "k": 2,
        "rank": 4,
        "shape": [64, 64],
        "bits": 3,
        "group_size": 32,
    }


def test_manifest_and_configuration_state_that_codes_have_zero_points(tmp_path):
    run = commit_run(
        ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), Recipe(symmetric=False)
    )
    manifest = assemble(run.store, run.records, run.output, ["compressed"])
    assert all(layer["symmetric"] is False for layer in manifest.layers.values())
    groups = run.store.get_json("base/config.json")["quantization_config"]["config_groups"]
    assert groups["group_0"]["weights"]["symmetric"] is False


def test_manifest_and_configuration_state_the_bits_of_layers_that_differ(tmp_path):
    recipe = Recipe(rank=lambda name: None if name.endswith("k_proj") else 4, others=(("v_proj", 5),))
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), recipe)
    manifest = assemble(run.store, run.records, run.output, ["compressed"])
    values = {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert {name for name, layer in manifest.layers.items() if layer["bits"] == 5} == values
    groups = run.store.get_json("base/config.json")["quantization_config"]["config_groups"]
    stated = {group["weights"]["num_bits"]: set(group["targets"]) for group in groups.values()}
    assert stated == {3: manifest.layers.keys() - values, 5: values}
    codes = 3 * 5 * 64 * 64 + 5 * 32 * 64  # two heads of 16 values beside the inputs of five layers
    adapters = 16 * 4 * (5 * 128 + 96)
    weights = (5 * 64 + 32) * 64
    assert bits_per_weight(manifest.layers.values()) == pytest.approx((codes + adapters) / weights + 16 / 32)


def test_index_names_the_shard_of_every_tensor(committed):
    assemble(committed.store, committed.records, committed.output, ["compressed"])
    index = committed.store.get_json("base/model.safetensors.index.json")
    loaded = [(shard, safetensors.torch.load(committed.store.get(f"base/{shard}"))) for shard in SHARDS]
    assert index["weight_map"] == {name: shard for shard, tensors in loaded for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, tensors in loaded for t in tensors.values())


def test_config_ignores_every_dense_matrix_and_keeps_the_source_fields(tmp_path):
    recipe = Recipe(rank=lambda name: None if name == "model.layers.0.mlp.up_proj" else 4)
    config = llama_config(dtype="bfloat16", tie_word_embeddings=True)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, config, recipe)
    assemble(run.store, run.records, run.output, ["compressed"])
    written = run.store.get_json("base/config.json")
    ignored = written.pop("quantization_config")["ignore"]
    assert ignored == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"]
    assert written == json.loads(run.output.companions["config.json"])


def test_adapter_holds_the_committed_factors_and_what_finetuning_needs(committed, tmp_path):
    assemble(committed.store, committed.records, committed.output, ["compressed"])
    path = tmp_path / "out/adapter/adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert len(tensors) == 2 * len(committed.linears)
    for name, linear in committed.linears.items():
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"], linear.L)
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_A.weight"], linear.R)
    with safetensors.safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["srr"])
    assert layers.keys() == committed.linears.keys()
    expected = {"k": 2, "rank": 4, "singular_values": [1.0, 1 / 2, 1 / 3, 1 / 4]}
    assert layers["model.layers.0.mlp.up_proj"] == expected


def test_run_without_adapters_has_no_adapter_folder(tmp_path):
    run = commit_run(
        ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), Recipe(rank=lambda _: 0)
    )
    manifest = assemble(run.store, run.records, run.output, ["compressed", "dense"])
    assert manifest.exports == ["base", "dense"]
    assert run.store.list("adapter") == {}


def test_assembly_repeated_in_another_place_gives_the_same_bytes(committed, tmp_path):
    assemble(committed.store, committed.records, committed.output, ["compressed", "dense"])
    again = commit_run(ObjectStore("memory://assemble-repeated"), tmp_path, committed.model.config)
    assemble(again.store, again.records, again.output, ["dense", "compressed"])
    assert contents(again.store) == contents(committed.store)
    assemble(again.store, again.records, again.output, ["compressed"])
    assert contents(again.store) == contents(committed.store)


def test_export_added_to_a_finished_output_keeps_the_others(committed):
    first = assemble(committed.store, committed.records, committed.output, ["compressed"])
    before = contents(committed.store)
    second = assemble(committed.store, committed.records, committed.output, ["dense"])
    assert second.exports == ["adapter", "base", "dense"]
    assert first.files.items() < second.files.items()
    after = contents(committed.store)
    assert {path: after[path] for path in first.files} == {path: before[path] for path in first.files}


class InterruptedStore(ObjectStore):
    """A store that dies at the n-th thing written to it."""

    def __init__(self, url, writes):
        super().__init__(url)
        self.writes = writes

    def _count(self):
        self.writes -= 1
        if self.writes < 0:
            raise KeyboardInterrupt

    def put(self, path, data):
        self._count()
        super().put(path, data)

    def copy(self, source, target):
        self._count()
        super().copy(source, target)

    def upload(self, local, path):
        self._count()
        return super().upload(local, path)


def test_assembly_interrupted_at_any_write_is_unfinished_and_repeats_to_the_same_bytes(committed):
    store, arguments = committed.store, (committed.records, committed.output, ["compressed"])
    assemble(store, *arguments)
    finished = contents(store)
    for writes in range(len(finished)):
        with pytest.raises(KeyboardInterrupt):
            assemble(InterruptedStore(store.url, writes), *arguments)
        with pytest.raises(OutputError, match="no COMMIT"):
            read_complete(store)
        assemble(store, *arguments)
        assert contents(store) == finished


def test_export_interrupted_while_it_is_added_does_not_lose_the_others(committed):
    assemble(committed.store, committed.records, committed.output, ["compressed"])
    with pytest.raises(KeyboardInterrupt):
        assemble(InterruptedStore(committed.store.url, 9), committed.records, committed.output, ["dense"])
    manifest = assemble(committed.store, committed.records, committed.output, ["dense"])
    assert manifest.exports == ["adapter", "base", "dense"]


def test_assemble_missing_units_names_them_and_leaves_the_output_alone(committed):
    del committed.records["00001"], committed.records["rest"]
    before = contents(committed.store)
    with pytest.raises(OutputError, match="units 00001, rest have no valid record"):
        assemble(committed.store, committed.records, committed.output, ["compressed"])
    assert contents(committed.store) == before


def test_assemble_damaged_adapter_of_a_unit_is_refused(committed):
    path = committed.records["00001"].files["adapter"].path
    data = bytearray(committed.store.get(path))
    data[-1] ^= 1
    committed.store.put(path, bytes(data))
    with pytest.raises(StoreError, match=r"00001/a/adapter\.safetensors: sha256"):
        assemble(committed.store, committed.records, committed.output, ["compressed"])
    assert not committed.store.exists(COMMIT)


def test_assemble_tensor_in_two_units_is_refused(committed):
    area, first = RunArea(committed.store, FINGERPRINT), committed.records["00000"].files["base"]
    path = area.attempt_path("00001", "b", "base.safetensors")
    committed.store.copy(first.path, path)
    wrong = dataclasses.replace(
        committed.records["00001"], attempt="b", files={"base": FileEntry(path, first.size, first.sha256)}
    )
    with pytest.raises(StoreError, match=r"tensor model\.layers\.0\.\S+ is in units 00000 and 00001"):
        assemble(committed.store, committed.records | {"00001": wrong}, committed.output, ["compressed"])


def test_bits_per_weight_counts_codes_scales_and_adapter():
    layer = {"shape": [64, 128], "bits": 3, "group_size": 32, "rank": 4}
    assert bits_per_weight([layer]) == pytest.approx(3 + 16 / 32 + 16 * 4 * (64 + 128) / (64 * 128))
    per_channel = {"shape": [64, 128], "bits": 4, "group_size": -1, "rank": 0}
    assert bits_per_weight([per_channel]) == 4 + 16 / 128
    assert bits_per_weight([per_channel | {"symmetric": False}]) == 4 + (16 + 4) / 128


def test_output_description_can_be_sent_to_another_process(committed):
    assert pickle.loads(pickle.dumps(committed.output)) == committed.output
