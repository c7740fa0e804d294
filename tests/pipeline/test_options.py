"""Every option has an effect: on the solved bytes where it is fingerprinted, on the execution where it is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from srr_dist.config import JobConfig, QuantizeConfig
from srr_dist.errors import CheckpointError, ConfigError, StoreError
from srr_dist.export.load import QuantizedModel
from srr_dist.export.verify import verify_output
from srr_dist.pipeline.cluster import Cluster, connected
from srr_dist.pipeline.driver import finish
from srr_dist.pipeline.memory import Budget
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.store import BlockRecord, RunArea, read_complete
from tests.commands import wait_until
from tests.conftest import RayCluster, kept_torch_settings
from tests.families import build
from tests.s3 import MotoServer, environment, set_variables

DEFAULTS: dict[str, Any] = {
    "rank": 4, "num_samples": 4, "seq_len": 24, "split": "fixed:2", "scales": "absmax", "iterations": 1,
    "descent": 0, "shrinkage": 0.0,
}  # fmt: skip
"""A plain run, so that each option can be told apart."""

CHANGES: list[dict[str, Any]] = [
    {"method": "qer"},
    {"method": "none"},
    {"grid": "mxint"},
    {"grid": "int-asym"},
    {"grid": "nf4", "bits": 4},
    {"bits": 2},
    {"bits": 4},
    {"bits": 8},
    {"widths": "v_proj$=4"},
    {"group_size": 16},
    {"group_size": -1},
    {"scales": "search"},
    {"rounding": "nearest"},
    {"incoherence": True},
    {"rank": 5},
    {"split": "search"},
    {"split": "criterion"},
    {"split": "energy"},
    {"split": "fixed:1"},
    {"form": "split", "iterations": 0},
    {"iterations": 0},
    {"descent": 2},
    {"rounding_metric": "full"},
    {"shrinkage": 0.3},
    {"first_token_share": 0.5},
    {"tune_steps": 8, "tune_batch": 2, "seq_len": 64, "num_samples": 16},
    {"scaling": "diag"},
    {"scaling": "lqer"},
    {"scaling": "identity"},
    {"num_samples": 3},
    {"seq_len": 16},
    {"seed": 1},
    {"include": "mlp"},
    {"exclude": "q_proj"},
    {"dtype": "bfloat16"},
]
LOCATIONS = {"model", "calibration"}
"""Options whose content counts."""
REFUSALS = {"revision", "max_bad_rows"}
"""Options that decide whether a run is refused; the latter is tested with the stage."""
KEPT = {"sketch", "sketch_band"}
"""Options that decide what is kept beside the result; tested with the way back of gradients."""
WEIGHED = {"mean_bits", "own_widths", "among"}
"""Options that ask gradients for the bits of each layer; tested with these widths."""


@dataclass(frozen=True)
class Solved:
    """A model of one block, solved under some options."""

    fingerprint: str
    record: BlockRecord
    area: RunArea

    @property
    def contents(self) -> dict[str, str]:
        return {kind: entry.sha256 for kind, entry in self.record.files.items()}


class Solver:
    """Solves a model of one block under varying options, without Ray."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.model, self.text, self.folder = model, text, folder
        self.default = self.solve()

    def solve(self, **changes: Any) -> Solved:
        options = {"model": str(self.model), "calibration": str(self.text)} | DEFAULTS | changes
        output = self.folder / str(len(list(self.folder.iterdir())))
        run = make_run(open_sources(QuantizeConfig(**options)), str(output), on_gpu=False)
        stage = Stage(run, "host", threads=1)
        stage.open(StagePlan(0, 0, (0,), frozenset({0}), start=0, save=None, last=True, planned_memory={"host": 1}))
        stage.forward(range(len(run.token_ids)), None)
        stage.end_forward()
        stage.area.begin(run.document())
        stage.solve(0, 1)
        stage.commit("00000")
        stage.store_rest(1)
        finish(run, stage.area, "compressed", anew=True)
        return Solved(run.fingerprint, stage.area.records()["00000"], stage.area)


@pytest.fixture(scope="module")
def solver(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Solver]:
    model = build("llama", tmp_path_factory.mktemp("one-block"), num_hidden_layers=1)
    with kept_torch_settings():
        yield Solver(model, text, tmp_path_factory.mktemp("solved"))


def test_same_options_give_the_same_bytes(solver):
    again = solver.solve()
    assert again.fingerprint == solver.default.fingerprint
    assert again.contents == solver.default.contents
    assert again.record.attempt != solver.default.record.attempt


def test_table_of_changes_names_every_option():
    named = {name for change in CHANGES for name in change}
    assert named | LOCATIONS | REFUSALS | KEPT | WEIGHED == {field.name for field in fields(QuantizeConfig)}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()))
def test_option_changes_fingerprint_and_bytes(solver, change):
    changed = solver.solve(**change)
    assert changed.fingerprint != solver.default.fingerprint
    assert changed.contents != solver.default.contents


def test_form_changes_bytes(solver):
    joint, split = solver.solve(iterations=0), solver.solve(iterations=0, form="split")
    assert joint.contents != split.contents


def test_tuning_steps_and_their_sequences_change_bytes(solver):
    roomy = {"num_samples": 16, "seq_len": 64, "grid": "int", "rounding": "nearest", "iterations": 0}
    found = [solver.solve(**roomy, tune_steps=steps, tune_batch=batch) for steps, batch in ((0, 4), (8, 4), (8, 2))]
    assert len({solved.contents["adapter"] for solved in found}) == 3


def test_another_model_or_text_changes_fingerprint_and_bytes(solver, tmp_path):
    other_text = tmp_path / "other.txt"
    other_text.write_text(solver.text.read_text()[100:])
    other_model = build("llama", tmp_path / "other", num_hidden_layers=1, initializer_range=0.2)
    for change in ({"calibration": str(other_text)}, {"model": str(other_model)}):
        changed = solver.solve(**change)
        assert changed.fingerprint != solver.default.fingerprint
        assert changed.contents != solver.default.contents


def test_normalfloat_differs_from_integers_of_its_width_and_is_named_with_what_is_left_out(solver):
    solved = solver.solve(grid="nf4", bits=4, exclude="q_proj")
    assert solved.contents != solver.solve(bits=4, exclude="q_proj").contents
    quantization = solved.area.store.get_json("base/config.json")["quantization_config"]
    left = {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    assert set(quantization["llm_int8_skip_modules"]) == left
    assert "4-bit NF4 codes, a scale per 64 inputs" in solved.area.store.get("README.md").decode()
    totals = solved.area.store.get_json("report.json")["totals"]
    assert (totals["bits_codes"], totals["bits_scales"]) == (4, 0.5)


def test_layers_have_the_bits_that_rules_give_them_in_records_files_and_views(solver):
    solved = solver.solve(widths=r"v_proj$=5 mlp\.(up|gate)=2", exclude="q_proj", group_size=32)
    store, manifest = solved.area.store, read_complete(solved.area.store)
    bits = {name.rpartition(".")[2]: layer["bits"] for name, layer in manifest.layers.items()}
    assert bits == {"k_proj": 3, "v_proj": 5, "o_proj": 3, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    plain = {layer["type"]: layer for layer in solver.solve(exclude="q_proj", group_size=32).record.layers}
    for layer in solved.record.layers:
        before, width = plain[layer["type"]], bits[layer["type"].rpartition(".")[2]]
        assert layer["bits"] == width
        assert layer["bits_per_weight"] - before["bits_per_weight"] == pytest.approx(width - 3)
        error, was = layer["objective"]["stored"], before["objective"]["stored"]
        assert (error < was, error == was, error > was) == (width > 3, width == 3, width < 3)
    sizes = {name: m * n for name, (m, n) in ((name, layer["shape"]) for name, layer in manifest.layers.items())}
    mean = sum(bits[name.rpartition(".")[2]] * size for name, size in sizes.items()) / sum(sizes.values())
    totals = store.get_json("report.json")["totals"]
    assert (totals["bits_codes"], totals["bits_scales"]) == (pytest.approx(mean), pytest.approx(0.5, abs=0.02))
    assert "2-, 3- and 5-bit codes" in store.get("README.md").decode()
    assert verify_output(store.url) == []


@pytest.mark.parametrize(
    "change", [{"tune_steps": 4, "tune_batch": 2, "num_samples": 8}, {"iterations": 1, "descent": 2}]
)
def test_codes_stay_within_their_width_whatever_changes_them(solver, change):
    solved = solver.solve(widths="v_proj$=2 mlp=5", **change)
    assert verify_output(solved.area.store.url) == []
    model = QuantizedModel.open(solved.area.store.url)
    weights, _ = model.block(0)
    for name, layer in model.manifest.layers.items():
        W = weights[f"{name}.weight"].float()
        groups = W.reshape(len(W), -1, layer["group_size"])
        values = max(len(set(group.tolist())) for row in groups for group in row)
        assert 2 ** (layer["bits"] - 1) < values <= 2 ** layer["bits"]


def test_rule_that_gives_no_layer_its_bits_is_refused(solver):
    for widths in ("v_proj=4 values=5", "_proj=4 v_proj=5", "q_proj=4"):
        pattern = widths.split()[-1]
        with pytest.raises(ConfigError, match=rf"^widths: {pattern} gives no layer its bits.*of 6 layers is .*k_proj"):
            solver.solve(widths=widths, exclude="q_proj")


def test_widths_that_vllm_will_not_serve_are_warned_of(solver, caplog):
    solver.solve(widths="up_proj=4 gate_proj=4 o_proj=2")
    assert "vLLM" not in caplog.text
    solver.solve(widths="up_proj=4")
    assert (
        "in 1 places layers that read one input differ in bits, first beside model.layers.0.mlp.gate_proj"
        in caplog.text
    )


def test_method_none_makes_no_adapter(solver):
    solved = solver.solve(method="none")
    assert set(solved.contents) == {"base"}
    assert read_complete(solved.area.store).exports == ["base"]


def test_method_qer_preserves_nothing(solver):
    assert {layer["k"] for layer in solver.solve(method="qer").record.layers} == {0}
    assert {layer["k"] for layer in solver.default.record.layers} == {2}


def test_rank_above_a_layers_size_is_cut(solver):
    ranks = {layer["type"]: layer["rank"] for layer in solver.solve(rank=50).record.layers}
    assert ranks["self_attn.k_proj"] == 32
    assert ranks["mlp.up_proj"] == 50


@pytest.mark.parametrize(
    ("change", "left", "reason"),
    [
        ({"include": r"mlp\."}, {"q_proj", "k_proj", "v_proj", "o_proj"}, "not selected"),
        ({"exclude": "down_proj|o_proj"}, {"down_proj", "o_proj"}, "not selected"),
        (
            {"include": "self_attn", "exclude": "k_proj"},
            {"k_proj", "gate_proj", "up_proj", "down_proj"},
            "not selected",
        ),
        ({"group_size": 128}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}, "no multiple of"),
    ],
    ids=["include", "exclude", "both", "group size that does not divide"],
)
def test_layers_left_unquantized_are_listed_everywhere(solver, change, left, reason):
    solved = solver.solve(**change)
    store = solved.area.store
    report, manifest = store.get_json("report.json"), read_complete(store)
    quantization = store.get_json("base/config.json")["quantization_config"]
    listed = {entry["name"]: entry["reason"] for entry in report["unquantized"]}
    assert {name.rpartition(".")[2] for name in listed} == left
    assert all(reason in why for why in listed.values())
    assert set(manifest.unquantized) == set(listed)
    assert set(quantization["ignore"]) == set(listed) | {"lm_head", "model.embed_tokens"}
    assert {layer["name"].rpartition(".")[2] for layer in solved.record.layers}.isdisjoint(left)
    assert len(report["layers"]) == 7 - len(left)


@pytest.mark.parametrize("change", [{"include": "nothing"}, {"exclude": "."}, {"group_size": 48}], ids=str)
def test_options_that_leave_nothing_to_quantize_are_refused(solver, change):
    with pytest.raises(ConfigError, match="none of the 7 linear layers would be quantized"):
        solver.solve(**change)


def test_revision_of_what_has_none_is_refused(solver):
    with pytest.raises(CheckpointError, match="only hub ids have revisions"):
        solver.solve(revision="main")


def test_single_driver_commits_where_the_server_refuses_conditional_writes(solver, monkeypatch):
    server = MotoServer()
    set_variables(monkeypatch, environment(server.url))
    server.make_bucket()
    server.handler = server.refuse_conditions
    sources = open_sources(QuantizeConfig(model=str(solver.model), calibration=str(solver.text), **DEFAULTS))

    def stage(single_driver: bool) -> Stage:
        run = make_run(sources, "s3://bucket/single", on_gpu=False, single_driver=single_driver)
        return Stage(run, "host", threads=1)

    with pytest.raises(StoreError, match="refused by the test"):
        stage(single_driver=False).store_rest(1)
    worker = stage(single_driver=True)
    worker.store_rest(1)
    assert set(worker.area.records()) == {"rest"}
    server.stop()


def cluster_of(ray_cluster: RayCluster, **options: Any) -> Cluster:
    with connected(JobConfig(ray_address=ray_cluster.address, **options)) as cluster:
        return cluster


def test_workers_and_host_memory_share_out_the_cluster(ray_cluster):
    assert cluster_of(ray_cluster, host_memory="3GiB") == Cluster(1, 2, 0, Budget(3 * 2**30, None))
    assert cluster_of(ray_cluster, host_memory="2G", workers=2) == Cluster(2, 1, 0, Budget(2 * 10**9, None))


def test_host_memory_is_a_share_of_what_is_free_unless_given(ray_cluster):
    budget = cluster_of(ray_cluster, workers=2).budget
    assert 0 < 2 * budget.host < psutil.virtual_memory().total


def test_more_workers_than_a_cluster_has_room_for_are_refused_without_patience(ray_cluster):
    with pytest.raises(ConfigError, match=r"^workers: 3 asked for, but the cluster has 2 CPUs"):
        cluster_of(ray_cluster, workers=3, host_memory="1GiB", patience=0.0)


def test_with_patience_the_run_goes_on_with_fewer_workers(ray_cluster, caplog):
    found = cluster_of(ray_cluster, workers=3, host_memory="1GiB", patience=0.1)
    assert found == Cluster(2, 1, 0, Budget(2**30, None))
    assert "workers: 3 asked for, but the cluster has 2 CPUs; going on with 2" in caplog.text


def test_run_waits_for_a_node_that_is_on_its_way(ray_cluster, caplog):
    command = ["ray", "start", f"--address={ray_cluster.address}", "--num-cpus=1", "--block"]
    with subprocess.Popen([str(Path(sys.executable).with_name(command[0])), *command[1:]]) as node:
        try:
            found = cluster_of(ray_cluster, workers=3, host_memory="1GiB")
        finally:
            node.terminate()
    assert found == Cluster(3, 1, 0, Budget(2**30, None))
    assert "room for 2 of 3 workers; waiting for nodes" in caplog.text
    with connected(JobConfig(ray_address=ray_cluster.address)):
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
