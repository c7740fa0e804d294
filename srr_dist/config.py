"""What a run is: options, their validation, recipes and presets, and the fingerprint.

``QuantizeConfig`` holds everything that changes the output's bytes; it is fingerprinted and stored with the run.
``JobConfig`` holds where and how the run is executed; changing it never changes the result. Every field is a command
line flag and a recipe key of the same name; flags win over the recipe, the recipe over a preset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml

from srr_dist.errors import ConfigError

FORMAT_VERSION = 3
"""Raised whenever the stored bytes of a unit change for the same options."""

METHODS = ("srr", "qer", "none")
GRIDS = ("mxint", "int", "int-asym", "nf4")
BITS = range(2, 9)
"""Of a code, where its grid has no other rule."""
NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Group sizes under the grid nf4: those that bitsandbytes reads."""
SCALES = ("absmax", "search")
ROUNDINGS = ("nearest", "gptq", "yaqa")
ROUNDING_METRICS = ("full", "downdated")
FORMS = ("joint", "split")
SCALINGS = ("exact", "diag", "lqer", "identity")
EXPORTS = ("compressed", "dense")
DTYPES = ("auto", "float32", "bfloat16")
SKETCHES = ("B", "full", "diag", "scalar")
SPLIT_RULES = ("search", "criterion", "energy")
MODEL_ROOT_VARIABLE = "SRR_MODEL_ROOT"


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command line flag and a recipe key."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class QuantizeConfig:
    """Options that change the bytes of the result."""

    model: str = option("", "checkpoint: a folder, a .gguf file, any fsspec URL of these, a hub id or a preset")
    revision: str | None = option(None, "revision of a hub checkpoint")
    method: str = option("srr", "srr: preserve, quantize, reconstruct; qer: k = 0; none: no adapter", choices=METHODS)
    grid: str = option(
        "int", "base quantizer: power-of-two scales, bfloat16 scales, with zero points, NormalFloat", choices=GRIDS
    )
    bits: int = option(3, "bits of a code, 2 to 8")
    widths: str = option(
        "",
        "other bits for some layers: PATTERN=BITS rules between spaces, the first that a layer's name matches counts",
    )
    mean_bits: float = option(
        0.0,
        "bits of a code on the average, in each layer by what they do to gradients held out; 0: --bits everywhere",
    )
    among: str = option(" ".join(map(str, BITS)), "bits that --mean-bits chooses from; some kernels run 4 and 8 alone")
    own_widths: bool = option(
        False, "let layers that read one input differ then too, which serves better, but vLLM, which joins them, cannot"
    )
    group_size: int = option(64, "inputs that share a scale; -1 for one scale per output row")
    scales: str = option(
        "search", "absmax: reach a group's largest weight; search: the least error, inputs weighted", choices=SCALES
    )
    rounding: str = option(
        "gptq",
        "nearest; gptq: later inputs make up for the error of each; yaqa: later outputs too, by what --sketch keeps",
        choices=ROUNDINGS,
    )
    rank: int = option(16, "rank r of the adapters")
    split: str = option("search", "how k is chosen: search, criterion, energy or fixed:K")
    form: str = option("joint", "joint: best rank r of W - Q; split: P_k plus the best rank r - k", choices=FORMS)
    iterations: int = option(3, "times that codes and adapter are fitted to each other again, the best kept")
    descent: int = option(3, "times that codes, scales and adapter then descend from where they are, the best kept")
    rounding_metric: str = option(
        "downdated",
        "what iterations and descent work in: full, the input moment; downdated, what is left of it beyond the adapter",
        choices=ROUNDING_METRICS,
    )
    shrinkage: float = option(0.1, "share of the input moment's mean diagonal that is added to its diagonal")
    incoherence: bool = option(
        False, "rotate weights first, the residual stream and the values of heads, so that no entry stands out"
    )
    tune_steps: int = option(0, "gradient steps that tune codes, scales and adapters against each block's output")
    tune_batch: int = option(4, "calibration sequences of such a step")
    sketch: str = option(
        "", "what is kept of the model's own gradients: B, A:R in R rounds, or of outputs alone full, diag or scalar"
    )
    sketch_band: int = option(
        8192, "most outputs of a layer whose errors a sketch weighs against each other; 0: all, at the square of memory"
    )
    scaling: str = option("exact", "what weights the error: the input moment or a cheaper stand-in", choices=SCALINGS)
    calibration: str = option("", "text, jsonl, parquet, a folder of them, any fsspec URL, or a datasets id")
    first_token_share: float = option(
        0.03, "share of a sequence that its first token counts for, to which all others attend; 0: one of many"
    )
    num_samples: int = option(64, "calibration sequences")
    seq_len: int = option(1024, "tokens of a sequence")
    seed: int = option(0, "seed of the choice of sequences and of the layers' random numbers")
    include: str = option("", "only layers whose name matches this regular expression")
    exclude: str = option("", "leave layers whose name matches this regular expression unquantized")
    dtype: str = option(
        "auto", "type of the forward passes; auto: float32 on CPU, the checkpoint's on GPU", choices=DTYPES
    )
    max_bad_rows: float = option(0.01, "share of NaN/Inf input rows above which a layer's calibration fails")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _require(self.bits in BITS, "bits", "2 to 8", self.bits)
        _require(
            self.group_size == -1 or self.group_size >= 1, "group_size", "a positive number or -1", self.group_size
        )
        if self.grid == "nf4":
            _require(self.bits == 4, "bits", "4 (--bits 4) with --grid nf4", self.bits)
            blocks = ", ".join(map(str, NF4_BLOCKS))
            _require(self.group_size in NF4_BLOCKS, "group_size", f"{blocks} with --grid nf4", self.group_size)
        # bitsandbytes' table has one width, and transformers reads zero points of one alone.
        uniform = self.grid in ("nf4", "int-asym")
        _require(not (uniform and self.widths), "widths", f"one width with --grid {self.grid}", self.widths)
        _ = self.width_rules  # which refuses them
        choices = self.choices
        if self.mean_bits:
            some = choices[0] <= self.mean_bits <= choices[-1]
            _require(some, "mean_bits", f"{choices[0]} to {choices[-1]} (--among), or 0", self.mean_bits)
            _require(not uniform, "mean_bits", f"0, one width, with --grid {self.grid}", self.mean_bits)
            _require(not self.widths, "widths", "no rules with --mean-bits", self.widths)
        _require(self.rank >= 1 or self.method == "none", "rank", "at least 1 (or --method none)", self.rank)
        _require(self.iterations >= 0, "iterations", "0 or more", self.iterations)
        _require(self.descent >= 0, "descent", "0 or more", self.descent)
        _require(self.tune_steps >= 0, "tune_steps", "0 or more", self.tune_steps)
        _require(self.tune_batch >= 1, "tune_batch", "at least 1", self.tune_batch)
        _require(0.0 <= self.shrinkage <= 10.0, "shrinkage", "a share from 0 to 10", self.shrinkage)
        _require(0.0 <= self.first_token_share < 1.0, "first_token_share", "0 or more, below 1", self.first_token_share)
        _require(self.num_samples >= 1, "num_samples", "at least 1", self.num_samples)
        _require(
            self.num_samples >= 2 or not (self.tune_steps or self.sketch),
            "num_samples",
            "2 or more with --tune-steps or --sketch, which hold some out",
            self.num_samples,
        )
        _require(self.seq_len >= 2, "seq_len", "at least 2", self.seq_len)
        _require(0 <= self.seed < 2**63, "seed", "0 or more, below 2^63", self.seed)
        _require(0.0 <= self.max_bad_rows <= 1.0, "max_bad_rows", "a share from 0 to 1", self.max_bad_rows)
        _check_split(self.split, self.rank)
        _check_sketch(self.sketch)
        _require(self.sketch_band >= 0, "sketch_band", "0 or more", self.sketch_band)
        if self.rounding == "yaqa":
            # One number for all outputs of a layer would change nothing, and every layer be solved twice alike.
            known = self.sketch not in ("", "scalar")
            _require(known, "sketch", "B, A:R, full or diag with --rounding yaqa", self.sketch)
            _require(not self.tune_steps, "tune_steps", "0 with --rounding yaqa", self.tune_steps)
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is no regular expression: {error}") from None

    def selects(self, layer: str) -> bool:
        """Whether ``--include`` and ``--exclude`` let a layer be quantized."""
        included = not self.include or re.search(self.include, layer) is not None
        return included and not (self.exclude and re.search(self.exclude, layer) is not None)

    @property
    def width_rules(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        """The pattern and the bits of each rule of ``widths``, in their order."""
        return _width_rules(self.widths)

    def bits_of(self, layer: str) -> int:
        """Bits of a code of this layer."""
        return next((bits for pattern, bits in self.width_rules if pattern.search(layer)), self.bits)

    @property
    def choices(self) -> tuple[int, ...]:
        """The bits that ``--mean-bits`` chooses from, the least first."""
        bits = self.among.split()
        right = bool(bits) and all(each.isdecimal() and int(each) in BITS for each in bits)
        _require(right, "among", "whole numbers from 2 to 8 between spaces", self.among)
        return tuple(sorted(set(map(int, bits))))

    def fingerprint(self, *, source: str, tokens: str, dtype: str) -> str:
        """sha256 over everything that changes bytes.

        Locations do not count, contents do: ``source`` is the checkpoint's identity, ``tokens`` the hash of the
        calibration tokens, ``dtype`` the resolved type of the forward passes.
        """
        return hashlib.sha256(canonical_json(self.identity(source=source, tokens=tokens, dtype=dtype))).hexdigest()

    def identity(self, *, source: str, tokens: str, dtype: str) -> dict[str, Any]:
        """The fingerprinted content, one flat dict: options without locations, identities of what they point to."""
        options = dataclasses.asdict(self)
        for location in ("model", "revision", "calibration"):
            del options[location]
        return options | {"dtype": dtype, "source": source, "tokens": tokens, "format_version": FORMAT_VERSION}


@dataclass(frozen=True)
class JobConfig:
    """Options that say where and how a run is executed; they never change its result."""

    output: str = option("", "folder or URL of the result; running the same command again resumes it")
    export: str = option("compressed", "compressed: base + adapter; dense: Q + L R merged", choices=EXPORTS)
    workers: int = option(0, "stage actors; 0: one per GPU of the cluster, or one on CPUs")
    ray_address: str | None = option(None, "Ray cluster to join (default: RAY_ADDRESS, else an embedded local one)")
    gpu_memory: str = option("", "memory a worker may use on its GPU, as 70GiB; default: 90 % of what is free")
    host_memory: str = option("", "memory a worker may use on its host, as 8GiB; default: 80 % of what is free")
    blocks_per_stage: int = option(4, "decoder blocks a stage holds at most; fewer where memory is short")
    patience: float = option(120.0, "seconds to wait for nodes that are gone before going on with fewer workers")
    watchdog: float = option(60.0, "seconds without a sign of life after which a worker is replaced; 0: never")
    grace: float = option(20.0, "seconds that a stop waits for blocks that are being solved")
    model_root: str = option("", f"where hub ids are looked up instead of the hub (or {MODEL_ROOT_VARIABLE})")
    statistics: str = option("", "folder or URL that keeps moments, so that runs of one model and text share them")
    single_driver: bool = option(
        False, "nothing else writes this output: use a store without conditional writes, looking before writing instead"
    )
    dry_run: bool = option(False, "print the plan and stop")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _require(self.workers >= 0, "workers", "0 or more", self.workers)
        _require(self.blocks_per_stage >= 1, "blocks_per_stage", "at least 1", self.blocks_per_stage)
        for name in ("patience", "watchdog", "grace"):
            _require(getattr(self, name) >= 0, name, "0 or more seconds", getattr(self, name))
        for name in ("gpu_memory", "host_memory"):
            parse_bytes(getattr(self, name), name)


@dataclass(frozen=True)
class RunConfig:
    """A complete command: what is computed and how it is run."""

    quantize: QuantizeConfig
    job: JobConfig

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Build from flat option values; unknown names and wrong values raise ConfigError with the field's name."""
        known = {f.name for part in (QuantizeConfig, JobConfig) for f in fields(part)}
        for name in options:
            if name not in known:
                raise ConfigError(f"{name}: no such option; known are {', '.join(sorted(known))}")
        parts = [
            {f.name: options[f.name] for f in fields(part) if f.name in options} for part in (QuantizeConfig, JobConfig)
        ]
        config = cls(QuantizeConfig(**parts[0]), JobConfig(**parts[1]))
        for name, value in (("model", config.quantize.model), ("output", config.job.output)):
            _require(bool(value), name, f"a location (--{name})", value)
        for name in ("iterations", "descent"):
            count = getattr(config.quantize, name)
            joint = config.quantize.form == "joint" or not count
            _require(joint, name, f"0 (--{name} 0) with the split form", count)
        needs_text = config.quantize.scaling != "identity" and config.quantize.method != "none"
        needs_text |= config.quantize.tune_steps > 0 or config.quantize.sketch != ""
        _require(
            bool(config.quantize.calibration) or not needs_text,
            "calibration",
            "text to calibrate on (--calibration)",
            "",
        )
        spent = bool(config.quantize.mean_bits) or not config.quantize.own_widths
        _require(spent, "own_widths", "bits to spend (--mean-bits)", True)
        weighed = bool(config.quantize.sketch) or not config.quantize.mean_bits
        _require(weighed, "sketch", "a kind of sketch with --mean-bits (--sketch B)", "")
        kept = bool(config.job.statistics) or not config.quantize.sketch
        _require(kept, "statistics", "where to keep sketches (--statistics) with --sketch", "")
        return config

    def flags(self) -> list[str]:
        """The command line that gives this configuration: ``--name=value`` of each option that is not its default."""
        values = {f: getattr(part, f.name) for part in (self.quantize, self.job) for f in fields(part)}
        return [
            f"--{f.name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for f, value in values.items()
            if value != f.default
        ]


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Options from a YAML recipe, unvalidated but for its shape: a mapping of option names to single values."""
    content = load_mapping(path, "recipe")
    for key, value in content.items():
        if not isinstance(value, str | int | float | None):  # and never shown whole, since aliases can make it huge
            raise ConfigError(f"recipe: {path} gives {key} a {type(value).__name__}, expected a single value")
    return {key.replace("-", "_"): value for key, value in content.items()}


def load_mapping(path: str | Path, kind: str) -> dict[str, Any]:
    """What a YAML file maps names to, {} for an empty file; ``kind`` says in errors what the file is for."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{kind}: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # YAML's constructors raise whatever Python does on the text of a number or a date
        raise ConfigError(f"{kind}: {path} is no YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{kind}: {path} must be a mapping of option names to values, found {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{kind}: {path} must be a mapping of option names to values, found the key {key!r:.80}")
    return content


def jobs_folder(name: str) -> Path:
    """Where presets or hardware files lie: ``jobs/<name>`` of a source tree, or the package's copy of it."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / "jobs" / name


def resolve_options(flags: dict[str, Any], recipe: str | None) -> dict[str, Any]:
    """Merge preset, recipe and flags, the later winning, and point hub ids to the model root where one is set."""
    given = (load_recipe(recipe) if recipe else {}) | flags
    preset = jobs_folder("presets") / f"{given.get('model', '')}.yaml"
    name = str(given.get("model", ""))
    if re.fullmatch(r"[\w.-]+", name) and preset.is_file() and not Path(name).exists():
        given = load_recipe(preset) | {key: value for key, value in given.items() if key != "model"}
    root = given.get("model_root") or os.environ.get(MODEL_ROOT_VARIABLE, "")
    model = str(given.get("model", ""))
    if root and re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        given["model"] = f"{str(root).rstrip('/')}/{model}"
    return given


def canonical_json(value: Any) -> bytes:
    """One byte string for one value: sorted keys, no spaces, no NaN; raises on anything without a stable form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def one_line(error: Exception) -> str:
    """The message of a library's error for a message of ours, which is one line."""
    return " ".join(str(error).split())


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str, name: str) -> int | None:
    """Bytes of ``8GiB``, ``80G`` or ``123456``; None for an empty text."""
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{name}: expected a size as 8GiB or 80G, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _check_types(config: QuantizeConfig | JobConfig) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,), "str | None": (str, type(None)), "int": (int,), "float": (float, int), "bool": (bool,),
    }  # fmt: skip
    for f in fields(config):
        value = getattr(config, f.name)
        right = isinstance(value, kinds[str(f.type)]) and not (isinstance(value, bool) and f.type != "bool")
        _require(right, f.name, f"a value of type {f.type}", value)


def _check_choices(config: QuantizeConfig | JobConfig) -> None:
    for f in fields(config):
        choices = f.metadata.get("choices")
        if choices:
            _require(
                getattr(config, f.name) in choices, f.name, "one of " + ", ".join(choices), getattr(config, f.name)
            )


def _check_split(split: str, rank: int) -> None:
    rule, _, k = split.partition(":")
    fixed = rule == "fixed" and k.isdecimal()
    _require(fixed or split in SPLIT_RULES, "split", "search, criterion, energy or fixed:K", split)
    _require(not fixed or int(k) <= rank, "split", f"fixed:K with K from 0 to the rank {rank}", split)


@cache
def _width_rules(widths: str) -> tuple[tuple[re.Pattern[str], int], ...]:
    return tuple(_width_rule(rule) for rule in widths.split())


def _width_rule(rule: str) -> tuple[re.Pattern[str], int]:
    pattern, _, bits = rule.rpartition("=")
    right = bool(pattern) and bits.isdecimal() and int(bits) in BITS
    _require(right, "widths", r"rules like v_proj=4 \.0\.mlp=5 with 2 to 8 bits", rule)
    try:
        return re.compile(pattern), int(bits)
    except re.error as error:
        raise ConfigError(f"widths: {pattern!r} is no regular expression: {error}") from None


def _check_sketch(sketch: str) -> None:
    kind, _, rounds = sketch.partition(":")
    right = sketch in ("", *SKETCHES) or (kind == "A" and rounds.isdecimal() and int(rounds) >= 1)
    _require(right, "sketch", "A:R with R rounds, 1 or more, or one of " + ", ".join(SKETCHES), sketch)
