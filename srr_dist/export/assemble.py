"""From committed blocks to a finished output: ``base/``, ``adapter/``, ``dense/``, the manifest, and COMMIT last.

Nothing is computed that the records do not determine and every write replaces its object, so a killed assembly is
repeated as a whole and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from srr_dist.errors import OutputError, StoreError
from srr_dist.export.adapter import adapter_config, adapter_ranks, lora_names
from srr_dist.export.base import (
    INDEX_NAME,
    dense_tensors,
    quantization_config,
    quantized_linears,
    shard_index,
    shard_name,
)
from srr_dist.export.nf4 import nf4_config
from srr_dist.export.tensorfile import TensorFile, encode_header
from srr_dist.scratch import Scratch
from srr_dist.store.documents import encode
from srr_dist.store.manifest import COMMIT, MANIFEST, Manifest, read_complete, write_commit
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.records import REST, BlockRecord, RunArea

EXPORTS = {"compressed": ("base", "adapter"), "dense": ("dense",)}
"""Value of ``--export`` -> the folders it stands for."""

STORE_THREADS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What an output needs to know beyond its records.

    Attributes:
        block_count: decoder blocks of the model.
        group_size: inputs that share a scale; −1 for one scale per output channel.
        dtype: type of the source's linear weights, in which ``dense/`` stores their replacements.
        companions: file name -> content of what lies beside the weights, config.json among them.
        created_by: package -> version, for the manifest.
        symmetric: whether codes have no zero points.
        codebook: name of the table that codes are looked up in, ``nf4``; None for integers.
    """

    block_count: int
    group_size: int
    dtype: torch.dtype
    companions: Mapping[str, bytes]
    created_by: Mapping[str, str]
    symmetric: bool = True
    codebook: str | None = None

    def quantization_config(self, bits: Mapping[str, int], ignore: Iterable[str]) -> dict[str, Any]:
        """Of the base's config.json, with the bits of every linear and the modules whose matrices are stored dense."""
        if self.codebook:
            return nf4_config(ignore)
        return quantization_config(bits, self.group_size, ignore, symmetric=self.symmetric)


@dataclass(frozen=True)
class _Unit:
    """A committed unit with the headers of its files; ``adapter`` is None where it has no adapters."""

    record: BlockRecord
    base: TensorFile
    adapter: TensorFile | None

    @property
    def bits(self) -> dict[str, int]:
        """Bits of a code of each linear."""
        return {layer["name"]: layer["bits"] for layer in self.record.layers}


def assemble(
    store: ObjectStore, records: Mapping[str, BlockRecord], output: Output, exports: Iterable[str]
) -> Manifest:
    """Write the exports named (keys of ``EXPORTS``), besides those that the output has, and commit the output.

    Without any adapter (method ``none``) there is no ``adapter/``. Until the end of it readers find the output
    unfinished.

    Args:
        store: the output.
        records: every unit's record: the blocks "00000" … and "rest".
        output: what the records do not say.
        exports: ``compressed`` and ``dense``, one or both.

    Raises:
        OutputError: a unit has no record.
        StoreError: a unit's file is missing or damaged, or two of them hold the same tensor.
    """
    with ThreadPoolExecutor(STORE_THREADS) as pool:
        units = list(pool.map(lambda record: _open_unit(store, record), _in_order(records, output.block_count)))
    fingerprint = units[-1].record.fingerprint
    _refuse_repeated_tensors(units)
    folders = {folder for export in exports for folder in EXPORTS[export]} | _folders_of_earlier(store, fingerprint)
    if not any(unit.adapter for unit in units):
        folders.discard("adapter")
    store.delete(COMMIT)
    writers = {"base": _write_base, "adapter": _write_adapter, "dense": _write_dense}
    files: list[FileEntry] = []
    for folder in sorted(folders):
        logger.info("writing %s", store.location(folder))
        files += writers[folder](store, units, output)
    manifest = Manifest(
        fingerprint=fingerprint,
        created_by=dict(output.created_by),
        exports=sorted(folders),
        files={entry.path: entry for entry in files},
        unquantized=sorted(name for unit in units[:-1] for name in _dense_matrices(unit.base)),
        layers={layer["name"]: _chosen(layer, output) for unit in units for layer in unit.record.layers},
    )
    write_commit(store, manifest)
    RunArea(store, fingerprint).acquit_output()
    return manifest


def is_complete(store: ObjectStore, export: str) -> bool:
    """Whether the output is committed and unmarked, holds this export, and has every file in its size."""
    try:
        manifest = read_complete(store)
    except (OutputError, StoreError):
        return False
    if RunArea(store, manifest.fingerprint).is_condemned():
        return False
    if not {folder for folder in EXPORTS[export] if folder != "adapter"} <= set(manifest.exports):
        return False
    sizes = {path: size for folder in manifest.exports for path, size in store.list(folder).items()}
    return all(sizes.get(path) == entry.size for path, entry in manifest.files.items())


def _in_order(records: Mapping[str, BlockRecord], block_count: int) -> list[BlockRecord]:
    expected = [f"{index:05d}" for index in range(block_count)] + [REST]
    if missing := [unit for unit in expected if unit not in records]:
        raise OutputError(f"units {', '.join(missing)} have no valid record; repeat the run to finish them")
    return [records[unit] for unit in expected]


def _open_unit(store: ObjectStore, record: BlockRecord) -> _Unit:
    files = {kind: TensorFile.open(store, entry.path) for kind, entry in record.files.items()}
    adapter = files.get("adapter")
    return _Unit(record, files["base"], adapter if adapter and adapter.entries else None)


def _refuse_repeated_tensors(units: Iterable[_Unit]) -> None:
    owners: dict[str, str] = {}
    for unit in units:
        for name in unit.base.entries:
            if (owner := owners.setdefault(name, unit.record.unit)) != unit.record.unit:
                raise StoreError(f"tensor {name} is in units {owner} and {unit.record.unit}; redo one of them")


def _folders_of_earlier(store: ObjectStore, fingerprint: str) -> set[str]:
    """Folders of the output's last manifest, whether it is finished or was being extended when it was killed."""
    if not store.exists(MANIFEST):
        return set()
    try:
        earlier = Manifest.from_json(store.get(MANIFEST), store.location(MANIFEST))
    except StoreError as error:
        logger.warning("the output's earlier manifest does not count: %s", error)
        return set()
    return set(earlier.exports) if earlier.fingerprint == fingerprint else set()


def _write_base(store: ObjectStore, units: Sequence[_Unit], output: Output) -> list[FileEntry]:
    """Copy the units' shards as they are; add index, companions, and the configuration that unpacks them."""
    ignore = {"lm_head"}.union(*(_dense_matrices(unit.base) for unit in units))
    bits = {name: width for unit in units for name, width in unit.bits.items()}
    quantization = {"quantization_config": output.quantization_config(bits, ignore)}
    config = json.loads(output.companions["config.json"]) | quantization
    names = [f"base/{shard_name(i, len(units))}" for i in range(1, len(units) + 1)]
    with ThreadPoolExecutor(STORE_THREADS) as pool:
        list(pool.map(store.copy, [unit.base.path for unit in units], names))
    originals = [unit.record.files["base"] for unit in units]
    shards = [FileEntry(name, entry.size, entry.sha256) for name, entry in zip(names, originals, strict=True)]
    sizes = [{name: entry.nbytes for name, entry in unit.base.entries.items()} for unit in units]
    companions = {**output.companions, "config.json": _pretty(config), INDEX_NAME: _index(names, sizes)}
    return shards + _put_all(store, "base", companions)


def _write_adapter(store: ObjectStore, units: Sequence[_Unit], output: Output) -> list[FileEntry]:
    """Join the units' adapter files into one, a unit in memory at a time; each is checked against its record."""
    parts = [(unit.adapter, unit.record) for unit in units if unit.adapter]
    entries = [entry for part, _ in parts for entry in part.entries.values()]
    summary = {
        layer["name"]: {key: layer[key] for key in ("k", "rank", "singular_values")}
        for unit in units
        for layer in unit.record.layers
    }
    metadata = {"format": "pt", "srr": encode(summary, "adapter metadata").decode()}
    with Scratch() as folder:
        local = folder / "adapter_model.safetensors"
        with local.open("wb") as stream:
            stream.write(encode_header(entries, metadata))
            for part, record in parts:
                body = part.raw(len(part.header), part.size)
                found, expected = hashlib.sha256(part.header + body).hexdigest(), record.files["adapter"].sha256
                if found != expected:
                    problem = f"{part.path}: sha256 {found}, its record says {expected}"
                    RunArea(store, record.fingerprint).condemn(record, [problem])
                    raise StoreError(f"{problem}; it no longer counts, the same command again redoes its block")
                stream.write(body)
        weights = store.upload(local, f"adapter/{local.name}")
    ranks = adapter_ranks({entry.name: entry.shape for entry in entries})
    return [weights, *_put_all(store, "adapter", {"adapter_config.json": _pretty(adapter_config(ranks))})]


def _write_dense(store: ObjectStore, units: Sequence[_Unit], output: Output) -> list[FileEntry]:
    """Write an ordinary checkpoint whose weights are Q + L R, added in float32; one unit in memory at a time."""
    files, sizes = [], []
    names = [f"dense/{shard_name(i, len(units))}" for i in range(1, len(units) + 1)]
    with Scratch() as folder:
        for unit, name in zip(units, names, strict=True):
            tensors = _merged(unit, output)
            sizes.append({key: tensor.nbytes for key, tensor in tensors.items()})
            local = folder / "shard.safetensors"
            safetensors.torch.save_file(tensors, local, metadata={"format": "pt"})
            files.append(store.upload(local, name))
    return files + _put_all(store, "dense", {**output.companions, INDEX_NAME: _index(names, sizes)})


def _merged(unit: _Unit, output: Output) -> dict[str, torch.Tensor]:
    tensors = dense_tensors(unit.base.read(), unit.bits)
    factors = unit.adapter.read() if unit.adapter else {}
    for name in quantized_linears(unit.base.entries):
        weight = tensors[f"{name}.weight"].float()
        L, R = (factors.get(key) for key in lora_names(name))
        if L is not None and R is not None:
            weight += L.float() @ R.float()
        tensors[f"{name}.weight"] = weight.to(output.dtype)
    return tensors


def _dense_matrices(file: TensorFile) -> list[str]:
    """Modules of a shard whose weight is stored as a plain matrix."""
    packed = set(quantized_linears(file.entries))
    matrices = (name for name, entry in file.entries.items() if len(entry.shape) == 2 and name.endswith(".weight"))
    return [module for name in matrices if (module := name.removesuffix(".weight")) not in packed]


def _chosen(layer: Mapping[str, Any], output: Output) -> dict[str, Any]:
    chosen = {key: layer[key] for key in ("k", "rank", "shape", "bits")}
    chosen |= {"group_size": output.group_size}
    chosen |= {} if output.symmetric else {"symmetric": False}
    return chosen | ({"codebook": output.codebook} if output.codebook else {})


def _index(names: Sequence[str], sizes: Sequence[Mapping[str, int]]) -> bytes:
    return _pretty(shard_index({Path(name).name: tensors for name, tensors in zip(names, sizes, strict=True)}))


def _put_all(store: ObjectStore, folder: str, contents: Mapping[str, bytes]) -> list[FileEntry]:
    entries = []
    for name, data in sorted(contents.items()):
        store.put(f"{folder}/{name}", data)
        entries.append(FileEntry(f"{folder}/{name}", len(data), hashlib.sha256(data).hexdigest()))
    return entries


def _pretty(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
