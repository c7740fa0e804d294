"""Options: what is refused and how, which source wins, and what the fingerprint holds."""

import dataclasses
import json

import pytest
import yaml

import srr_dist.config
from srr_dist.command import parse_run, run_parser
from srr_dist.config import (
    FORMAT_VERSION,
    JobConfig,
    QuantizeConfig,
    RunConfig,
    canonical_json,
    jobs_folder,
    load_recipe,
    parse_bytes,
    resolve_options,
)
from srr_dist.errors import ConfigError

COMPLETE = {"model": "m", "output": "o", "calibration": "c"}
CONTENT = {"source": "s", "tokens": "t", "dtype": "float32"}

REFUSED = [
    ("model", "", "a location (--model)"),
    ("model", 3, "a value of type str, found 3"),
    ("revision", 3, "a value of type str | None"),
    ("method", "gptq", "one of srr, qer, none, found 'gptq'"),
    ("grid", "fp4", "one of mxint, int"),
    ("bits", 1, "2 to 8, found 1"),
    ("bits", 9, "2 to 8, found 9"),
    ("bits", "3", "a value of type int, found '3'"),
    ("bits", 3.0, "a value of type int"),
    ("bits", True, "a value of type int, found True"),
    ("widths", "v_proj", "rules like v_proj=4"),
    ("widths", "v_proj=9", "2 to 8 bits, found 'v_proj=9'"),
    ("widths", "=4", "rules like v_proj=4"),
    ("widths", "v_proj=4 (=3", "'(' is no regular expression"),
    ("mean_bits", 1.9, "2 to 8 (--among), or 0, found 1.9"),
    ("mean_bits", 8.1, "2 to 8 (--among), or 0"),
    ("mean_bits", float("nan"), "2 to 8 (--among), or 0"),
    ("among", "", "whole numbers from 2 to 8 between spaces"),
    ("among", "4,8", "whole numbers from 2 to 8 between spaces, found '4,8'"),
    ("among", "4 9", "whole numbers from 2 to 8"),
    ("own_widths", True, "bits to spend (--mean-bits)"),
    ("group_size", 0, "a positive number or -1"),
    ("group_size", -2, "a positive number or -1"),
    ("scales", "best", "one of absmax, search"),
    ("rounding", "ldlq", "one of nearest, gptq"),
    ("iterations", -1, "0 or more"),
    ("descent", -1, "0 or more"),
    ("tune_steps", -1, "0 or more"),
    ("tune_batch", 0, "at least 1"),
    ("rounding_metric", "half", "one of full, downdated"),
    ("first_token_share", 1.0, "0 or more, below 1"),
    ("first_token_share", float("nan"), "0 or more, below 1"),
    ("shrinkage", -0.1, "a share from 0 to 10"),
    ("shrinkage", float("nan"), "a share from 0 to 10"),
    ("rank", 0, "at least 1 (or --method none)"),
    ("split", "best", "search, criterion, energy or fixed:K"),
    ("split", "fixed", "search, criterion, energy or fixed:K"),
    ("split", "fixed:", "search, criterion, energy or fixed:K"),
    ("split", "fixed:-1", "search, criterion, energy or fixed:K"),
    ("split", "search:3", "search, criterion, energy or fixed:K"),
    ("split", "fixed:17", "K from 0 to the rank 16"),
    ("form", "both", "one of joint, split"),
    ("scaling", "hessian", "one of exact, diag, lqer, identity"),
    ("calibration", "", "text to calibrate on (--calibration)"),
    ("num_samples", 0, "at least 1"),
    ("seq_len", 1, "at least 2"),
    ("seed", -1, "0 or more"),
    ("seed", 2**63, "below 2^63"),
    ("include", "(", "'(' is no regular expression"),
    ("exclude", "*x", "'*x' is no regular expression"),
    ("dtype", "float16", "one of auto, float32, bfloat16"),
    ("max_bad_rows", -0.1, "a share from 0 to 1"),
    ("max_bad_rows", 1.1, "a share from 0 to 1"),
    ("max_bad_rows", float("nan"), "a share from 0 to 1"),
    ("incoherence", "yes", "a value of type bool"),
    ("output", "", "a location (--output)"),
    ("export", "gguf", "one of compressed, dense"),
    ("workers", -1, "0 or more"),
    ("ray_address", 1, "a value of type str | None"),
    ("gpu_memory", "lots", "a size as 8GiB or 80G, found 'lots'"),
    ("host_memory", "0", "a size as 8GiB or 80G"),
    ("host_memory", "-1G", "a size as 8GiB or 80G"),
    ("blocks_per_stage", 0, "at least 1"),
    ("sketch_band", -1, "0 or more"),
    ("sketch", "A", "A:R with R rounds, 1 or more, or one of B, full, diag, scalar"),
    ("sketch", "A:0", "A:R with R rounds"),
    ("sketch", "b", "one of B"),
    ("patience", -1.0, "0 or more seconds"),
    ("watchdog", -1.0, "0 or more seconds"),
    ("grace", float("nan"), "0 or more seconds"),
    ("model_root", None, "a value of type str"),
    ("statistics", None, "a value of type str"),
    ("single_driver", "yes", "a value of type bool"),
    ("dry_run", "yes", "a value of type bool"),
]

ACCEPTED = [
    {"bits": 2}, {"bits": 8}, {"group_size": -1}, {"group_size": 1}, {"rank": 0, "method": "none"}, {"seed": 2**63 - 1},
    {"split": "fixed:0"}, {"split": "fixed:16"}, {"split": "energy"}, {"max_bad_rows": 0}, {"max_bad_rows": 1.0},
    {"calibration": "", "scaling": "identity"}, {"calibration": "", "method": "none"}, {"gpu_memory": "70GiB"},
    {"sketch": "B", "statistics": "kept"}, {"sketch": "A:12", "statistics": "kept"},
    {"widths": r"v_proj$=5 \.[0-3]\.mlp=2"},
    {"revision": "main"}, {"include": r"layers\.[0-3]\."}, {"grid": "nf4", "bits": 4},
    {"grid": "nf4", "bits": 4, "group_size": 32},
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[f"{n}={v!r}" for n, v, _ in REFUSED])
def test_wrong_value_is_refused_with_the_field_and_what_was_expected(name, value, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_options(COMPLETE | {name: value})
    assert str(caught.value).startswith(f"{name}: ")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_sketch_needs_text_a_place_and_sequences_to_hold_out():
    with pytest.raises(ConfigError, match=r"^statistics: expected where to keep sketches"):
        RunConfig.from_options(COMPLETE | {"sketch": "B"})
    with pytest.raises(ConfigError, match=r"^num_samples: expected 2 or more with .*--sketch"):
        QuantizeConfig(num_samples=1, sketch="B")
    plain = {key: value for key, value in COMPLETE.items() if key != "calibration"} | {"method": "none"}
    with pytest.raises(ConfigError, match=r"^calibration: expected text"):
        RunConfig.from_options(plain | {"sketch": "B", "statistics": "kept"})


def test_bits_to_spend_on_the_average_need_a_sketch_and_no_rules():
    asked = {"mean_bits": 3.5, "sketch": "diag"}
    assert RunConfig.from_options(COMPLETE | asked | {"statistics": "kept"}).quantize.mean_bits == 3.5
    with pytest.raises(ConfigError, match=r"^sketch: expected a kind of sketch with --mean-bits \(--sketch B\)"):
        RunConfig.from_options(COMPLETE | {"mean_bits": 3.5})
    with pytest.raises(ConfigError, match=r"^widths: expected no rules with --mean-bits, found 'a=4'"):
        QuantizeConfig(**asked, widths="a=4")
    assert QuantizeConfig(among="8 4 8").choices == (4, 8)
    with pytest.raises(ConfigError, match=r"^mean_bits: expected 4 to 8 \(--among\), or 0, found 3\.5"):
        QuantizeConfig(**asked, among="8 4")
    for grid in ("nf4", "int-asym"):
        with pytest.raises(ConfigError, match=rf"^mean_bits: expected 0, one width, with --grid {grid}, found 3\.5"):
            QuantizeConfig(**asked, grid=grid, bits=4)


def test_configuration_lists_its_options_and_nothing_else():
    config = QuantizeConfig(widths="a=4")
    assert config.bits_of("a") == 4
    assert vars(config).keys() == {field.name for field in fields(QuantizeConfig)}


def test_rounding_against_the_output_needs_a_sketch_and_no_tuning():
    with pytest.raises(ConfigError, match=r"^sketch: expected B, A:R, full or diag with --rounding yaqa"):
        QuantizeConfig(rounding="yaqa")
    with pytest.raises(ConfigError, match=r"^tune_steps: expected 0 with --rounding yaqa, found 8"):
        QuantizeConfig(rounding="yaqa", sketch="B", tune_steps=8)
    assert QuantizeConfig(rounding="yaqa", sketch="B").rounding == "yaqa"


def test_tuning_needs_text_and_sequences_to_hold_out():
    with pytest.raises(ConfigError, match=r"^num_samples: expected 2 or more with --tune-steps"):
        QuantizeConfig(num_samples=1, tune_steps=5)
    plain = {key: value for key, value in COMPLETE.items() if key != "calibration"} | {"method": "none"}
    with pytest.raises(ConfigError, match=r"^calibration: expected text"):
        RunConfig.from_options(plain | {"tune_steps": 5})
    RunConfig.from_options(plain)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("bits", 3, r"4 \(--bits 4\)"), ("group_size", -1, "32, 64"), ("group_size", 16, "32, 64")],
)
def test_normalfloat_has_four_bits_and_the_blocks_that_bitsandbytes_reads(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^{name}: expected {expected}.* with --grid nf4, found {value}"):
        RunConfig.from_options(COMPLETE | {"grid": "nf4", "bits": 4} | {name: value})


@pytest.mark.parametrize("grid", ["nf4", "int-asym"])
def test_grids_that_readers_know_in_one_width_refuse_others(grid):
    with pytest.raises(ConfigError, match=rf"^widths: expected one width with --grid {grid}, found 'a=4'"):
        QuantizeConfig(grid=grid, bits=4, widths="a=4")


def test_first_rule_that_matches_gives_a_layer_its_bits():
    config = QuantizeConfig(bits=3, widths=r"\.0\.mlp=4 mlp=2 (?=q|k)_?=8 v_proj$=5")
    names = ("a.0.mlp.up", "a.1.mlp.up", "a.1.v_proj", "a.0.v_proj_norm", "a.o")
    assert [config.bits_of(name) for name in names] == [4, 2, 5, 3, 3]


@pytest.mark.parametrize("name", ["iterations", "descent"])
def test_iterations_and_descent_need_the_joint_form(name):
    other = {"iterations": 0, "descent": 0, "form": "split"}
    with pytest.raises(ConfigError, match=rf"^{name}: expected 0 \(--{name} 0\) with the split form, found 2"):
        RunConfig.from_options(COMPLETE | other | {name: 2})
    RunConfig.from_options(COMPLETE | other)
    RunConfig.from_options(COMPLETE | {"method": "none", "iterations": 2})  # which has nothing to iterate


def test_refusals_cover_every_option():
    assert {name for name, _, _ in REFUSED} == {f.name for part in (QuantizeConfig, JobConfig) for f in fields(part)}


def fields(part):
    return dataclasses.fields(part)


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_values_at_the_edge_are_accepted(options):
    config = RunConfig.from_options(COMPLETE | options)
    everything = dataclasses.asdict(config.quantize) | dataclasses.asdict(config.job)
    assert everything.items() >= options.items()


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_flags_of_a_configuration_give_it_back(options):
    changes = {"workers": 3, "dry_run": True, "ray_address": "host:1", "statistics": "s"} | options
    config = RunConfig.from_options(COMPLETE | changes)
    assert parse_run(run_parser("quantize", ""), config.flags()) == config


def test_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"ranks: no such option; known are .*rank.*"):
        RunConfig.from_options(COMPLETE | {"ranks": 3})


def test_options_have_help_and_no_name_twice():
    names = [f.name for part in (QuantizeConfig, JobConfig) for f in fields(part)]
    assert len(set(names)) == len(names)
    assert all(f.metadata["help"] for part in (QuantizeConfig, JobConfig) for f in fields(part))


@pytest.mark.parametrize(
    ("include", "exclude", "selected"),
    [
        ("", "", {"a.q", "a.k", "b.q"}),
        ("q$", "", {"a.q", "b.q"}),
        ("", "^a", {"b.q"}),
        ("q", "^b", {"a.q"}),
        ("", ".", set()),
    ],
)
def test_include_and_exclude_select_layers(include, exclude, selected):
    config = QuantizeConfig(include=include, exclude=exclude)
    assert {name for name in ("a.q", "a.k", "b.q") if config.selects(name)} == selected


# The fingerprint: each option is either a location (never counts) or has here another value that must change it.
LOCATIONS = {"model": "elsewhere", "revision": "abc", "calibration": "other.txt"}
CHANGES = {
    "method": "qer", "grid": "mxint", "bits": 4, "group_size": 32, "rank": 33, "split": "criterion", "form": "split",
    "scaling": "diag", "num_samples": 65, "seq_len": 1025, "seed": 1, "include": "q", "exclude": "q",
    "max_bad_rows": 0.5, "scales": "absmax", "rounding": "nearest", "iterations": 1, "descent": 1, "shrinkage": 0.3,
    "rounding_metric": "full", "widths": "a=4", "tune_steps": 9, "tune_batch": 2, "sketch": "B",
    "first_token_share": 0.1, "incoherence": True, "sketch_band": 512, "mean_bits": 3.5, "own_widths": True,
    "among": "4 8",
}  # fmt: skip
RESOLVED = {"dtype"}  # the argument, not the option, says what "auto" became


def fingerprint(**options):
    return QuantizeConfig(**options).fingerprint(**CONTENT)


def test_every_option_is_classified_for_the_fingerprint():
    assert {f.name for f in fields(QuantizeConfig)} == {*LOCATIONS, *CHANGES, *RESOLVED}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_changes_with(name):
    assert fingerprint(**{name: CHANGES[name]}) != fingerprint()


def test_fingerprints_of_all_changes_differ():
    assert len({fingerprint(**{name: value}) for name, value in CHANGES.items()}) == len(CHANGES)


@pytest.mark.parametrize("name", LOCATIONS)
def test_fingerprint_ignores_the_location(name):
    assert fingerprint(**{name: LOCATIONS[name]}) == fingerprint()


@pytest.mark.parametrize("name", CONTENT)
def test_fingerprint_changes_with_the_content_behind_locations(name):
    assert QuantizeConfig().fingerprint(**CONTENT | {name: "another"}) != fingerprint()


def test_fingerprint_takes_the_resolved_dtype():
    assert fingerprint(dtype="auto") == fingerprint(dtype="float32")


def test_fingerprint_ignores_job_options():
    identity = QuantizeConfig().identity(**CONTENT)
    assert not {f.name for f in fields(JobConfig)} & set(identity)


def test_identity_is_flat_json_and_says_the_format():
    identity = QuantizeConfig().identity(**CONTENT)
    assert identity["format_version"] == FORMAT_VERSION
    assert json.loads(canonical_json(identity)) == identity
    assert all(not isinstance(value, dict | list) for value in identity.values())


def test_fingerprint_of_the_defaults_is_a_stable_literal():
    assert fingerprint() == "0ecb33976a026d85eef143473cf9d0a5ff4bd09799722dc04c0c75f4bb3de81e"


def test_canonical_json_is_one_byte_string():
    assert canonical_json({"b": 1, "a": ["é", None, 0.1]}) == rb'{"a":["\u00e9",null,0.1],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError):
        canonical_json({1, 2})


@pytest.fixture
def recipe(tmp_path):
    def write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_the_recipe(recipe):
    path = recipe({"model": "a", "rank": 8, "bits": 4})
    assert resolve_options({"rank": 16}, path) == {"model": "a", "rank": 16, "bits": 4}


def test_recipe_keys_may_be_written_as_flags(recipe):
    assert load_recipe(recipe("group-size: 64\nsplit: fixed:4\n")) == {"group_size": 64, "split": "fixed:4"}


def test_empty_recipe_sets_nothing(recipe):
    assert load_recipe(recipe("# nothing\n")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must be a mapping of option names to values, found list"),
        ("just text", "must be a mapping of option names to values, found str"),
        ("1: 2\n", "must be a mapping of option names"),
        ("a: [1,\n", "is no YAML"),
    ],
)
def test_wrong_recipe_is_refused_with_its_path(recipe, content, message):
    path = recipe(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe: {path} ") and message in str(caught.value)


def test_unreadable_recipe_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe: .*none\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.fixture
def presets(tmp_path, monkeypatch):
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": "org/tiny", "rank": 4, "bits": 4, "seed": 9}))
    monkeypatch.setattr(srr_dist.config, "jobs_folder", lambda name: folder)
    monkeypatch.delenv("SRR_MODEL_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_preset_loses_to_the_recipe_and_the_recipe_to_flags(presets, recipe):
    path = recipe({"model": "tiny", "bits": 5, "seed": 7})
    resolved = resolve_options({"seed": 1}, path)
    assert resolved == {"model": "org/tiny", "rank": 4, "bits": 5, "seed": 1}


def test_preset_name_of_an_existing_path_means_the_path(presets, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert resolve_options({"model": "tiny"}, None) == {"model": "tiny"}


@pytest.mark.parametrize("model", ["unknown", "../presets/tiny", "org/tiny", ""])
def test_other_model_is_no_preset(presets, model):
    assert resolve_options({"model": model}, None) == {"model": model}


def test_presets_of_the_source_tree_are_valid(monkeypatch):
    monkeypatch.delenv("SRR_MODEL_ROOT", raising=False)
    for path in jobs_folder("presets").glob("*.yaml"):
        options = resolve_options({"model": path.stem, "output": "o", "calibration": "c"}, None)
        assert RunConfig.from_options(options).quantize.model != path.stem


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", "s3://mirror/models/org/name"),
        ("tiny", "s3://mirror/models/org/tiny"),  # a preset's hub id too
        ("./org/name", "./org/name"),
        ("/data/org/name", "/data/org/name"),
        ("s3://bucket/name", "s3://bucket/name"),
        ("model.gguf", "model.gguf"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "variable"])
def test_model_root_replaces_the_hub(presets, monkeypatch, model, expected, source):
    flags = {"model": model}
    if source == "flag":
        flags["model_root"] = "s3://mirror/models/"
    else:
        monkeypatch.setenv("SRR_MODEL_ROOT", "s3://mirror/models")
    assert resolve_options(flags, None)["model"] == expected


def test_model_root_flag_wins_over_the_variable(presets, monkeypatch):
    monkeypatch.setenv("SRR_MODEL_ROOT", "/variable")
    assert resolve_options({"model": "org/name", "model_root": "/flag"}, None)["model"] == "/flag/org/name"


def test_model_root_leaves_an_existing_folder_alone(presets, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("SRR_MODEL_ROOT", "/variable")
    assert resolve_options({"model": "org/name"}, None)["model"] == "org/name"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None), ("123456", 123456), ("8GiB", 8 * 2**30), ("80G", 80 * 10**9), ("80GB", 80 * 10**9),
        ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("2TiB", 2**41), ("7k", 7000), (" 1 KiB ", 1024), ("9B", 9),
    ],
)  # fmt: skip
def test_sizes_are_read_in_both_kinds_of_units(text, size):
    assert parse_bytes(text, "host_memory") == size


@pytest.mark.parametrize("text", ["8 iB", "GiB", "1e9", "8GiBs", "8.GiB", "0.0G", "8 G iB", "inf"])
def test_wrong_size_names_the_field(text):
    with pytest.raises(ConfigError, match=r"^gpu_memory: expected a size as 8GiB or 80G, found"):
        parse_bytes(text, "gpu_memory")
