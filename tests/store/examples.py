"""Small valid documents to start from."""

from typing import Any

from srr_dist.store import BlockRecord, FileEntry, Manifest, RunArea

FINGERPRINT = "0123456789abcdef" * 4
SHA256 = "ab" * 32


def block_record(**changes: Any) -> BlockRecord:
    values: dict[str, Any] = {
        "unit": "00017",
        "generation": 1,
        "fingerprint": FINGERPRINT,
        "attempt": "1-aaaa",
        "layers": [{"name": "model.layers.17.mlp.down_proj", "k": 12, "objective": {"k0": 1.5, "chosen": 0.5}}],
        "source_sha256": SHA256,
        "seconds": {"solve": 2.5},
        "versions": {"torch": "2.13.0"},
        "hardware": "cpu",
        "finished": 1700000000.25,
        "stage": {"rank": 0},
    } | changes
    folder = f".srr/{values['fingerprint']}/blocks/{values['unit']}/{values['attempt']}"
    values.setdefault("files", {"base": FileEntry(f"{folder}/base.safetensors", 4, SHA256)})
    return BlockRecord(**values)


def finished_record(area: RunArea, **changes: Any) -> BlockRecord:
    """A record whose file lies in the store."""
    record = block_record(fingerprint=area.fingerprint, **changes)
    for entry in record.files.values():
        area.store.put(entry.path, bytes(entry.size))
    return record


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "created_by": {"srr_dist": "0.1.0"},
        "exports": ["base", "adapter"],
        "files": {"base/config.json": FileEntry("base/config.json", 2, SHA256)},
        "unquantized": ["lm_head"],
        "layers": {"model.layers.0.mlp.up_proj": {"k": 3, "rank": 16, "bits": 3}},
    }
    return Manifest(**values | changes)
