"""What a solved block adds to its files: the values that the solver measured, as readers of the format see them."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from srr_dist.export.base import dense_tensors, quantization_config
from srr_dist.pipeline.solving import result_tensors
from srr_dist.solve import Metric, Quantizer, SolveOptions, make_grid, solve_layer
from tests.solve.problems import moment, objective, weight


@pytest.mark.parametrize("method", ["srr", "none"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", ["mxint", "int", "int-asym"])
def test_packed_layer_read_by_compressed_tensors_has_the_objective_that_was_measured(kind, bits, method):
    grid, W, H = make_grid(kind, bits, 16), weight(48, 64) + 0.02, moment("decaying", 64)
    options = SolveOptions(method, Quantizer(grid, "search", "gptq"), 4, split="criterion", iterations=1)
    solution = solve_layer(W, Metric.of(H), "lin", options)
    tensors = result_tensors({"lin": solution}, lambda _: grid)["base"]
    settings = quantization_config({"lin": bits}, 16, [], symmetric=grid.symmetric)
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    local = {name.removeprefix("lin."): tensor for name, tensor in tensors.items()}
    Q = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert Q.equal(grid.dequantize(solution.codes, solution.scale).bfloat16())
    assert Q.equal(dense_tensors(tensors, {"lin": bits})["lin.weight"])
    error = objective(W.double() - Q.double() - solution.L.double() @ solution.R.double(), H)
    assert solution.result["objective"]["stored"] == pytest.approx(error, rel=1e-3, abs=1e-7 * objective(W, H))


@pytest.mark.parametrize("method", ["srr", "none"])
def test_layer_read_by_bitsandbytes_has_the_objective_that_was_measured(method):
    grid, W, H = make_grid("nf4", 4, 32), weight(48, 64), moment("decaying", 64)
    options = SolveOptions(method, Quantizer(grid, "search", "gptq"), 4, split="criterion", iterations=1, descent=1)
    solution = solve_layer(W, Metric.of(H), "lin", options)
    tensors = result_tensors({"lin": solution}, lambda _: grid)["base"]
    stats = {name.removeprefix("lin.weight."): t for name, t in tensors.items() if name != "lin.weight"}
    state = QuantState.from_dict(stats, device=torch.device("cpu"))
    Q = dequantize_4bit(tensors["lin.weight"], state)
    assert Q.equal(grid.dequantize(solution.codes, solution.scale).bfloat16())
    assert Q.equal(dense_tensors(tensors, {})["lin.weight"])
    error = objective(W.double() - Q.double() - solution.L.double() @ solution.R.double(), H)
    assert solution.result["objective"]["stored"] == pytest.approx(error, rel=1e-3, abs=1e-7 * objective(W, H))
