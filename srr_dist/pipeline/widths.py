"""The bits of each layer's codes, where a run has a number of them to spend on the average.

Before anything is solved every layer is rounded to the nearest codes of each width, and gradients held out say what
that does to the loss. These curves are kept beside the sketches. Once all are there the driver spends the bits, and
writes down once and for all what each layer has, so that a resumed run goes on with the same:

    widths.json      {"model.layers.0.mlp.up_proj": 3, …}
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.config import BITS
from srr_dist.errors import CalibrationError, StoreError
from srr_dist.pipeline.gradients import recall_held_out
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.statistics import Statistics
from srr_dist.solve import allocate, make_grid, width_errors
from srr_dist.store import RunArea
from srr_dist.store.documents import decode, encode

WIDTHS = "widths.json"


def weigh(run: Run, block: Block, weights: Mapping[str, Tensor], device: torch.device, scratch: Path) -> None:
    """Keep what codes of each width do to the loss in the place of a block's weights.

    Args:
        run: options; says where gradients and curves are kept.
        block: its selected layers are weighed.
        weights: the source's tensors by name.
        device: where to compute.
        scratch: a local folder.

    Raises:
        StoreError: held-out gradients are not kept any more; another attempt makes them anew.
        CalibrationError: all of a layer's hold NaN or Inf.
    """
    config, curves = run.config, dict[str, dict[int, float]]()
    grids = {bits: make_grid(config.grid, bits, config.group_size) for bits in BITS}
    for linear in _selected(run, block):
        held_out = recall_held_out(run, linear)
        if held_out is None:
            raise StoreError(f"layer {linear.name}: its held-out gradients are not kept any more, or were damaged")
        W = weights[f"{linear.name}.weight"].to(device)
        curves[linear.name] = width_errors(W, grids, config.scales, held_out.on(device))
        if not all(map(math.isfinite, curves[linear.name].values())):
            raise CalibrationError(
                f"layer {linear.name}: the gradients of all {len(held_out)} sequences held out hold NaN or Inf; check "
                f"the model and --dtype {config.dtype}, or give all layers one width (--mean-bits 0)"
            )
    Statistics(run, config.sketch).save_curves(_kept_as(run, block), curves, scratch)


def spend(run: Run, area: RunArea) -> set[int]:
    """Write down the bits of every layer's codes, unless that is done or nothing asks for it.

    Returns:
        Blocks whose curves are not there, or damaged, without which nothing is spent: they are to be weighed.
    """
    path = area.path(WIDTHS)
    if not run.config.mean_bits or area.store.exists(path):
        return set()
    statistics = Statistics(run, run.config.sketch)
    blocks = [block for block in run.graph.blocks if _selected(run, block)]
    kept, curves = statistics.available(), dict[str, dict[int, float]]()
    unweighed = {block.index for block in blocks if _kept_as(run, block) not in kept}
    for block in blocks if not unweighed else ():
        if found := statistics.load_curves(_kept_as(run, block)):
            curves |= found
        else:
            unweighed.add(block.index)
    if not unweighed:
        area.store.create(path, encode(_allocated(run, curves), WIDTHS))
    return unweighed


def widths_of(run: Run, area: RunArea) -> dict[str, int]:
    """As they were written down.

    Raises:
        StoreError: they are not those of this run's layers.
    """
    path = area.path(WIDTHS)
    widths = decode(area.store.get(path), area.store.location(path))
    whole = isinstance(widths, dict) and widths.keys() == run.quantized
    if not whole or not all(bits in run.config.choices for bits in widths.values()):
        raise StoreError(
            f"{area.store.location(path)}: expected {', '.join(map(str, run.config.choices))} bits for each of "
            f"{len(run.quantized)} layers; remove it, and the bits are spent again"
        )
    return dict(widths)


def _allocated(run: Run, curves: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    layers = [linear for block in run.graph.blocks for linear in _selected(run, block)]
    sizes = {linear.name: linear.out_features * linear.in_features for linear in layers}
    leaders = None if run.config.own_widths else {linear.name: linear.input for linear in layers}
    errors = {layer: {bits: curve[bits] for bits in run.config.choices} for layer, curve in curves.items()}
    return allocate(errors, sizes, run.config.mean_bits, leaders)


def _selected(run: Run, block: Block) -> list[Linear]:
    return [linear for linear in block.linears if linear.name in run.quantized]


def _kept_as(run: Run, block: Block) -> str:
    """The name of a block's curves, which depend on the layers that are selected and on what their codes are."""
    config, layers = run.config, sorted(linear.name for linear in _selected(run, block))
    choices = [config.grid, config.group_size, config.scales, layers]
    return f"{block.name}.widths-{hashlib.sha256(encode(choices, WIDTHS)).hexdigest()[:16]}"
