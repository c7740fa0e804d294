"""A finished output, read block by block: for evaluation and fine-tuning of models that do not fit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from srr_dist.errors import OutputError
from srr_dist.export.adapter import lora_names
from srr_dist.export.base import INDEX_NAME, dense_tensors, quantized_linears, shard_name
from srr_dist.export.tensorfile import TensorFile
from srr_dist.store.manifest import Manifest, read_complete
from srr_dist.store.objects import ObjectStore

BASE_CONFIG = "base/config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class QuantizedModel:
    """A finished output whose description has been read; picklable, holds no tensor.

    Attributes:
        manifest: what the output consists of.
        config_json: the base's config.json, text.
        shards: file names of the base: one per decoder block, then the rest.
        bits: linear -> width of its codes.
        adapter: the adapter's file; None if the method made none.
    """

    store: ObjectStore
    manifest: Manifest
    config_json: str
    shards: tuple[str, ...]
    bits: Mapping[str, int]
    adapter: TensorFile | None

    @classmethod
    def open(cls, url: str) -> QuantizedModel:
        """Open the output at ``url``.

        Raises:
            OutputError: it is unfinished, or it was only exported merged.
            StoreError: a file is missing or damaged.
        """
        store = ObjectStore(url)
        manifest = read_complete(store)
        if BASE_CONFIG not in manifest.files:
            raise OutputError(f"{store.url}: no base/ among its exports; run again with --export compressed to add it")
        config_json = store.get(BASE_CONFIG).decode()
        shards = sorted(set(store.get_json(f"base/{INDEX_NAME}")["weight_map"].values()))
        adapter = TensorFile.open(store, ADAPTER_WEIGHTS) if ADAPTER_WEIGHTS in manifest.files else None
        bits = {name: layer["bits"] for name, layer in manifest.layers.items()}
        return cls(store, manifest, config_json, tuple(shards), bits, adapter)

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return len(self.shards) - 1

    def block(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """One decoder block.

        Returns:
            The block's tensors under the source's names: each quantized weight Q as transformers loads it (bfloat16;
            casting it gives what a model of another type holds), every other tensor as stored. And linear -> (L [m, r],
            R [r, n]), bfloat16, for the linears with an adapter; the layer computes with Q + L R.
        """
        file = TensorFile.open(self.store, f"base/{shard_name(index + 1, len(self.shards))}")
        return dense_tensors(file.read(), self.bits), self._factors(quantized_linears(file.entries))

    def rest(self) -> dict[str, torch.Tensor]:
        """The tensors outside the blocks, as stored."""
        return TensorFile.open(self.store, f"base/{self.shards[-1]}").read()

    def _factors(self, linears: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        if self.adapter is None:
            return {}
        adapted = [name for name in linears if lora_names(name)[0] in self.adapter.entries]
        tensors = self.adapter.read(name for linear in adapted for name in lora_names(linear))
        return {linear: (tensors[lora_names(linear)[0]], tensors[lora_names(linear)[1]]) for linear in adapted}
