"""The model class without weights, and how the names in the files map onto its state dict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from srr_dist.config import one_line
from srr_dist.errors import CheckpointError

_CAUSAL_LM: Any = AutoModelForCausalLM  # its methods are not annotated

MAX_BLOCKS = 10_000
"""Deeper models are refused, since only a damaged configuration has one and building it would take all memory."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_TEXT_PREFIXES = (("language_model.", ""), ("model.language_model.", "model."))
"""How a text model's names look in a checkpoint saved from its multimodal parent."""


def parse_config(text: str) -> PretrainedConfig:
    """The transformers configuration in the text of a config.json.

    Raises:
        CheckpointError: invalid JSON, an already quantized model, or an architecture that is not a decoder-only
            language model native to transformers.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json: not valid JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CheckpointError("config.json: no model_type; expected a transformers config.json")
    _refuse_quantized(fields)
    _refuse_depth(fields)
    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        reason = "is code that comes with the checkpoint (auto_map)" if "auto_map" in fields else "is unknown"
        raise CheckpointError(
            f"config.json: model_type {model_type!r} {reason}; only architectures native to the installed transformers "
            "are supported, and no remote code is run"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # every config class validates in its own way
        raise CheckpointError(f"config.json: transformers refuses it: {one_line(error)}") from error
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"config.json: model_type {model_type!r} is not a decoder-only language model")
    return config


def _sections(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [section for section in (fields, fields.get("text_config")) if isinstance(section, dict)]


def _refuse_depth(fields: Mapping[str, Any]) -> None:
    for section in _sections(fields):
        for name in _DEPTHS:
            if isinstance(depth := section.get(name), int) and depth > MAX_BLOCKS:
                raise CheckpointError(f"config.json: {name} is {depth}, expected at most {MAX_BLOCKS}; it is damaged")


def _refuse_quantized(fields: Mapping[str, Any]) -> None:
    for section in _sections(fields):
        if described := section.get("quantization_config"):
            method = described.get("quant_method", "unknown") if isinstance(described, dict) else "unknown"
            raise CheckpointError(
                f"config.json: already quantized (quantization_config, method {method}); "
                "start from the original weights"
            )


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of ``config`` in eval mode: parameters on the meta device, buffers real and on the CPU.

    Attention is the class's own default, torch's scaled dot product wherever the architecture allows it.

    Raises:
        CheckpointError: the class cannot be built from this configuration.
    """
    try:
        with init_empty_weights():
            model: Any = _CAUSAL_LM.from_config(config, dtype=dtype)
    except Exception as error:  # constructors raise anything on fields that do not fit together
        raise CheckpointError(
            f"model_type {config.model_type!r}: transformers cannot build it: {one_line(error)}"
        ) from error
    model.tie_weights()  # init_empty_weights gives each name its own parameter
    skeleton: PreTrainedModel = model.eval()
    return skeleton


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Module name -> decoder block, in the order they run.

    Raises:
        CheckpointError: the decoder has no list of as many modules as its configuration has layers.
    """
    untyped: Any = model
    decoder: nn.Module = untyped.get_decoder()
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    if len(lists) != 1:
        raise CheckpointError(
            f"{type(model).__name__}: expected one list of {count} decoder blocks in {type(decoder).__name__}, "
            f"found {len(lists)}; this architecture is not supported"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(block)]: block for block in lists[0]}


def names_outside(names: Iterable[str], blocks: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that lie under none of the modules ``blocks``."""
    prefixes = tuple(f"{block}." for block in blocks)
    return tuple(name for name in names if not name.startswith(prefixes))


def hollow_out(model: PreTrainedModel, names: Iterable[str], device: torch.device, fill: float = 0.0) -> None:
    """Make the named parameters constants of their shape and dtype that occupy one element each.

    With everything around its blocks hollow a model runs and builds masks and rotary embeddings, at no memory.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters:
            constant = torch.full((), fill, dtype=parameters[name].dtype, device=device)
            set_tensor(model, name, constant.expand(parameters[name].shape), device)


def set_tensor(root: nn.Module, name: str, value: torch.Tensor, device: torch.device) -> None:
    """Replace a parameter or buffer of ``root`` by ``value`` on ``device``, in the dtype it has in the skeleton.

    Parameters do not require gradients.
    """
    module_name, _, leaf = name.rpartition(".")
    module = root.get_submodule(module_name)
    if leaf in module._parameters:
        value = value.to(device, module.get_parameter(leaf).dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value.to(device, module.get_buffer(leaf).dtype)


def tied_sources(model: PreTrainedModel) -> dict[str, str]:
    """State-dict name -> the name whose weight it shares."""
    return dict(model.all_tied_weights_keys)


def map_names(model: PreTrainedModel, stored_names: Iterable[str]) -> dict[str, str]:
    """State-dict name -> stored name, for every stored tensor that the model has a place for.

    Transformers' own renamings apply, a base model's missing or extra prefix is added or removed, and so is a
    multimodal parent's.

    Raises:
        CheckpointError: a tensor would have to be converted and not only renamed (fused experts), or two stored
            tensors have the same place.
    """
    transforms = get_model_conversion_mapping(model)
    state = model.state_dict()
    mapped: dict[str, str] = {}
    for stored in stored_names:
        name = _state_name(model, state, transforms, stored)
        if name is None:
            continue
        if name in mapped:
            raise CheckpointError(f"tensors {mapped[name]} and {stored} are both {name} of the model; remove one")
        mapped[name] = stored
    return mapped


def _state_name(model: PreTrainedModel, state: dict[str, Any], transforms: list[Any], stored: str) -> str | None:
    fresh = deepcopy(transforms)  # matching leaves traces in them
    renamings = [t for t in fresh if isinstance(t, WeightRenaming)]
    converters = [t for t in fresh if isinstance(t, WeightConverter)]
    candidates = [(stored, renamings, converters), (stored, [], [])]
    candidates += [(new + stored.removeprefix(old), [], []) for old, new in _TEXT_PREFIXES if stored.startswith(old)]
    for candidate in candidates:
        name, converted_by = rename_source_key(*candidate, model.base_model_prefix, state)
        if name in state and converted_by is not None:
            raise CheckpointError(
                f"tensor {stored}: {type(model).__name__} holds it merged into {name}; checkpoints whose files and "
                "model differ in layout (fused experts) are not supported"
            )
        if name in state:
            return str(name)
    return None


def missing_names(model: PreTrainedModel, present: Iterable[str]) -> list[str]:
    """State-dict names that are neither present nor tied to a name that is."""
    found = set(present)
    tied = tied_sources(model)
    return [name for name in model.state_dict() if name not in found and tied.get(name) not in found]
