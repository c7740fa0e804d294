"""Check a finished output against itself: every byte, the sanity of every number, and that the parts fit together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from srr_dist.errors import SrrError, StoreError
from srr_dist.export.adapter import adapter_config, lora_names
from srr_dist.export.base import INDEX_NAME, PACKED, SCALE, SHAPE, ZERO, group_count, shard_name
from srr_dist.export.nf4 import ABSMAX, STATE, TABLE, nf4_shapes
from srr_dist.export.packing import packed_width
from srr_dist.export.tensorfile import TensorFile, decode_tensor
from srr_dist.store.manifest import Manifest, read_complete
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.records import BlockRecord, RunArea

READ_THREADS = 4
_REDO = "it was changed or damaged; repeat the run, which redoes"
FOLDERS = ("base", "adapter", "dense")
_PACKED_ONLY = (PACKED, SCALE, SHAPE, ZERO, ABSMAX, TABLE, STATE)
"""Endings of names that only packed linears have."""

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def verify_output(url: str) -> list[str]:
    """Everything that is wrong with the output at ``url``, a sentence each; [] if it is sound.

    Reads every byte of the output and of the committed blocks once, with one tensor per thread in memory. Whether the
    parts fit together is looked at when each of them is intact. What is damaged is marked in the working area, if there
    is one, so that the next run redoes the damaged blocks and assembles the output anew.
    """
    store = ObjectStore(url)
    try:
        manifest = read_complete(store)
    except SrrError as error:
        return [str(error)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        changed = [*chain(*pool.map(lambda entry: list(_file_problems(store, entry)), manifest.files.values()))]
    changed += _block_problems(RunArea(store, manifest.fingerprint), changed)
    found = [*_unlisted_files(store, manifest), *changed]
    return found or list(_fit_problems(store, manifest))


def _block_problems(area: RunArea, changed: Sequence[str]) -> list[str]:
    """What is wrong with the committed blocks; marks them, and the output if that or it itself is changed."""
    if not area.store.exists(area.path("run.json")):
        return []
    records = area.records(check_sizes=False)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = list(pool.map(lambda record: list(_record_problems(area, record)), records.values()))
    lost = [f"unit {unit}: no valid record; repeat the run, which redoes it" for unit in area.units() - records.keys()]
    problems = [*sorted(lost), *chain(*found)]
    try:
        if changed or problems:
            # The output's mark first: a run killed between redoing a block and assembling must not find it complete.
            area.condemn_output([*changed, *problems])
        for record, damage in zip(records.values(), found, strict=True):
            if damage:
                area.condemn(record, damage)
    except StoreError as error:
        logger.warning("what is damaged cannot be marked, so that the next run will not restore it: %s", error)
    return problems


def _record_problems(area: RunArea, record: BlockRecord) -> Iterator[str]:
    for entry in record.files.values():
        try:
            if area.store.sha256(entry.path) != entry.sha256:
                yield f"{entry.path}: its sha256 is not its record's; {_REDO} unit {record.unit}"
        except StoreError as error:
            yield f"{error}; {_REDO} unit {record.unit}"


def _unlisted_files(store: ObjectStore, manifest: Manifest) -> Iterator[str]:
    for folder in FOLDERS:
        for path in store.list(folder):
            if path not in manifest.files:
                yield f"{path}: not in the manifest; remove it, since readers of {folder}/ may take it for a part"


def _file_problems(store: ObjectStore, entry: FileEntry) -> Iterator[str]:
    try:
        if (size := store.size(entry.path)) != entry.size:
            yield f"{entry.path}: {size} bytes, the manifest says {entry.size}"
        elif entry.path.endswith(".safetensors"):
            yield from _tensor_problems(TensorFile.open(store, entry.path), entry.sha256)
        elif store.sha256(entry.path) != entry.sha256:
            yield _changed(entry.path)
    except StoreError as error:
        yield str(error)


def _tensor_problems(file: TensorFile, sha256: str) -> Iterator[str]:
    digest = hashlib.sha256(file.header)
    for name, entry in file.entries.items():
        data = file.raw(entry.start, entry.stop)
        digest.update(data)
        values = decode_tensor(entry, data)
        if values.is_floating_point() and (bad := int((~values.isfinite()).sum())):
            yield f"{file.path}: tensor {name}: {bad} of {values.numel()} values are NaN or infinite"
        if name.endswith((SCALE, ABSMAX)) and (bad := int((values == 0).sum())):
            yield f"{file.path}: tensor {name}: {bad} of {values.numel()} scales are zero"
    if digest.hexdigest() != sha256:
        yield _changed(file.path)


def _changed(path: str) -> str:
    return f"{path}: its sha256 is not the manifest's; it was changed or damaged. Repeat the run, which restores it"


def _fit_problems(store: ObjectStore, manifest: Manifest) -> Iterator[str]:
    """Problems between intact files: shards missing or overlapping, shapes and configurations that disagree."""
    for folder in manifest.exports:
        paths = [path for path in manifest.files if path.startswith(f"{folder}/") and path.endswith(".safetensors")]
        files = [TensorFile.open(store, path) for path in paths]
        shapes = {name: entry.shape for file in files for name, entry in file.entries.items()}
        if folder == "base":
            expected = _packed_shapes(manifest.layers)
            packed = {name: shape for name, shape in shapes.items() if name in expected or name.endswith(_PACKED_ONLY)}
            yield from _shape_problems(folder, expected, packed)
            yield from _bits_problems(store, manifest)
        elif folder == "adapter":
            yield from _shape_problems(folder, _factor_shapes(manifest.layers), shapes)
            ranks = {name: layer["rank"] for name, layer in manifest.layers.items() if layer["rank"]}
            if store.get_json("adapter/adapter_config.json") != adapter_config(ranks):
                yield "adapter/adapter_config.json: its ranks or modules are not the manifest's"
        else:
            dense = {f"{name}.weight": tuple(layer["shape"]) for name, layer in manifest.layers.items()}
            yield from _shape_problems(folder, dense, {name: shapes[name] for name in dense if name in shapes})
        if folder != "adapter":
            yield from _shard_problems(store, folder, files)


def _packed_shapes(layers: Mapping[str, Mapping[str, Any]]) -> Shapes:
    shapes: Shapes = {}
    for name, layer in layers.items():
        (m, n), groups = layer["shape"], group_count(layer["shape"][1], layer["group_size"])
        if layer.get("codebook"):
            shapes |= nf4_shapes(name, m, n, layer["group_size"])
            continue
        shapes[name + PACKED] = (m, packed_width(n, layer["bits"]))
        shapes[name + SCALE] = (m, groups)
        shapes[name + SHAPE] = (2,)
        if not layer.get("symmetric", True):
            shapes[name + ZERO] = (packed_width(m, layer["bits"]), groups)
    return shapes


def _factor_shapes(layers: Mapping[str, Mapping[str, Any]]) -> Shapes:
    shapes: Shapes = {}
    for name, layer in layers.items():
        (m, n), rank = layer["shape"], layer["rank"]
        if rank:
            shapes |= zip(lora_names(name), ((m, rank), (rank, n)), strict=True)
    return shapes


def _shape_problems(folder: str, expected: Shapes, found: Shapes) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{folder}/: tensor {name}: shape {found.get(name)}, by the manifest {expected.get(name)}"


def _bits_problems(store: ObjectStore, manifest: Manifest) -> Iterator[str]:
    settings = store.get_json("base/config.json")["quantization_config"]
    codebook = settings.get("bnb_4bit_quant_type")
    for name, layer in manifest.layers.items():
        if (expected := layer.get("codebook")) != codebook:
            yield f"base/config.json: codebook {codebook}, by the manifest layer {name} has {expected}"
            return
    if codebook:
        return
    schemes: dict[str, tuple[int, int, bool]] = {}
    for group in settings["config_groups"].values():
        weights = group["weights"]
        schemes |= dict.fromkeys(
            group["targets"], (weights["num_bits"], weights.get("group_size", -1), weights["symmetric"])
        )
    for name, layer in manifest.layers.items():
        found = schemes.get(name, schemes.get("Linear"))
        if (wanted := (layer["bits"], layer["group_size"], layer.get("symmetric", True))) != found:
            fields = "(bits, group size, symmetric)"
            yield f"base/config.json: {fields} {found}, by the manifest layer {name} has {wanted}"
            return


def _shard_problems(store: ObjectStore, folder: str, files: list[TensorFile]) -> Iterator[str]:
    """Holes in the numbering of a folder's shards, tensors in two of them, and an index that says otherwise."""
    names = {file.path.removeprefix(f"{folder}/"): file for file in files}
    count = max((int(name.rpartition("-of-")[2].removesuffix(".safetensors")) for name in names), default=0)
    for i in range(1, count + 1):
        if shard_name(i, count) not in names:
            yield f"{folder}/{shard_name(i, count)}: missing, though its neighbours are there"
    owners: dict[str, str] = {}
    for shard, file in names.items():
        for tensor in file.entries:
            if (owner := owners.setdefault(tensor, shard)) != shard:
                yield f"{folder}/: tensor {tensor} is in {owner} and in {shard}"
    index = store.get_json(f"{folder}/{INDEX_NAME}")["weight_map"]
    for tensor in sorted(index.keys() | owners.keys()):
        if index.get(tensor) != owners.get(tensor):
            place = f"in {owners[tensor]}" if tensor in owners else "in no shard"
            yield f"{folder}/{INDEX_NAME}: tensor {tensor} is {place}, by the index in {index.get(tensor)}"
