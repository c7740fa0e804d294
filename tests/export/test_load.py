"""A finished output read block by block."""

import pickle

import pytest
import torch
from random_runs import Recipe, commit_run, llama_config

from srr_dist.errors import OutputError
from srr_dist.export.assemble import assemble
from srr_dist.export.base import dequantized
from srr_dist.export.load import QuantizedModel
from srr_dist.store.manifest import COMMIT
from srr_dist.store.objects import ObjectStore


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_and_rest_together_are_the_model_with_its_factors(tmp_path, symmetric):
    rank = {"q_proj": None, "k_proj": 0}
    others = (("v_proj", 3), ("layers.1.mlp.up_proj", 8))
    recipe = Recipe(4, -1, False, lambda name: rank.get(name.rpartition(".")[2], 4), symmetric, others=others)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="float32"), recipe)
    assemble(run.store, run.records, run.output, ["compressed"])
    model = pickle.loads(pickle.dumps(QuantizedModel.open(run.store.url)))
    tensors, factors = model.rest(), {}
    for index in range(model.block_count):
        block, found = model.block(index)
        assert all(name.startswith(f"model.layers.{index}.") for name in [*block, *found])
        tensors |= block
        factors |= found
    expected = run.model.state_dict()
    expected |= {f"{name}.weight": dequantized(linear.codes, linear.scale) for name, linear in run.linears.items()}
    assert tensors.keys() == expected.keys()
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert factors.keys() == {name for name, linear in run.linears.items() if linear.L.shape[1]}
    for name, (L, R) in factors.items():
        assert torch.equal(L, run.linears[name].L)
        assert torch.equal(R, run.linears[name].R)


def test_output_without_adapters_has_no_factors(tmp_path):
    recipe = Recipe(rank=lambda _: 0)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), recipe)
    assemble(run.store, run.records, run.output, ["compressed"])
    assert QuantizedModel.open(run.store.url).block(1)[1] == {}


def test_open_unfinished_output_is_refused(committed):
    assemble(committed.store, committed.records, committed.output, ["compressed"])
    committed.store.delete(COMMIT)
    with pytest.raises(OutputError, match="no COMMIT"):
        QuantizedModel.open(committed.store.url)


def test_open_merged_export_alone_is_refused(committed):
    assemble(committed.store, committed.records, committed.output, ["dense"])
    with pytest.raises(OutputError, match="--export compressed"):
        QuantizedModel.open(committed.store.url)
