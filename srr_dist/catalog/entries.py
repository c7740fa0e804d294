"""A zoo file: which models are quantized by which recipes. It is checked as a whole, before anything starts.

    defaults: {calibration: text.txt, num_samples: 64}     options of every run
    evaluation: {text: other.txt, num_samples: 8}          may be left out: nothing is evaluated
    models:
      - name: qwen3
        model: Qwen/Qwen3-0.6B                             as --model: a folder, a URL, a hub id or a preset
        recipes: [jobs/recipes/int4.yaml, …]               one result each; none: one result of the options alone
        options: {rank: 16}                                for this model
        priority: 10                                       higher ones start earlier, 0 by default

Options of a model win over its recipe, a recipe over the defaults, and these over a preset.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from srr_dist.config import RunConfig, canonical_json, load_mapping, load_recipe, resolve_options
from srr_dist.errors import ConfigError

STATISTICS = "statistics"
RESERVED = frozenset({STATISTICS, "logs", "results", "index.html", "index.json"})
"""Names in the zoo's output that no result may have."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOP = {"defaults": dict, "evaluation": dict, "models": list}
_MODEL = {"name": str, "model": str, "recipes": list, "options": dict, "priority": int}
_SET_HERE = ("model", "output", "statistics", "ray_address", "dry_run")
_CALIBRATION = ("model", "revision", "calibration", "num_samples", "seq_len", "seed", "dtype", "scaling")


@dataclass(frozen=True)
class Evaluation:
    """On what every result is measured against its original."""

    text: str
    num_samples: int = 8
    seq_len: int = 1024


@dataclass(frozen=True)
class Entry:
    """One result to make: a model under a recipe."""

    name: str
    """Of the result, and of its folder in the zoo's output."""
    recipe: str
    """The recipe's name, "" for none."""
    config: RunConfig
    evaluation: Evaluation | None
    priority: int

    @property
    def settings(self) -> str:
        """sha256 of what decides the result as it is written down; the contents of model and text are not looked at."""
        evaluation = asdict(self.evaluation) if self.evaluation else None
        chosen = {"quantize": asdict(self.config.quantize), "export": self.config.job.export, "evaluation": evaluation}
        return hashlib.sha256(canonical_json(chosen)).hexdigest()

    @property
    def calibration(self) -> tuple[Any, ...] | None:
        """Equal for entries that can share moments; None where nothing is calibrated."""
        quantize = self.config.quantize
        return tuple(getattr(quantize, name) for name in _CALIBRATION) if quantize.calibration else None


def read_zoo(path: str, output: str, ray_address: str | None = None) -> list[Entry]:
    """The entries of a zoo file in the order in which they start.

    Args:
        path: of the YAML file.
        output: the zoo's folder or URL; each entry has a folder of its name in it.
        ray_address: of the cluster on which the runs are executed.

    Raises:
        ConfigError: names everything that is wrong, a line each.
    """
    document = load_mapping(path, "zoo")
    problems = list(_misfits(document, _TOP, required=("models",)))
    if problems:
        raise _refusal(path, problems)
    base = {"output": output.rstrip("/"), "ray_address": ray_address}
    entries: list[Entry] = []
    evaluation = None
    if "evaluation" in document:
        evaluation = _collect(problems, "evaluation", _evaluation, document["evaluation"])
    for position, model in enumerate(document["models"], 1):
        where = f"model {position}"
        found = list(_misfits(model, _MODEL, required=("name", "model")))
        problems += [f"{where}: {problem}" for problem in found]
        for recipe in [] if found else model.get("recipes") or [None]:
            where = f"model {position}, {model['name']}" + (f" by {recipe}" if recipe else "")
            entry = _collect(problems, where, _entry, model, recipe, document.get("defaults", {}), evaluation, base)
            entries += [entry] if entry else []
    counts = Counter(entry.name for entry in entries)
    problems += [f"{name}: the name of {times} results, expected one" for name, times in counts.items() if times > 1]
    if problems or not entries:
        raise _refusal(path, problems or ["models: expected at least one"])
    return sorted(entries, key=lambda entry: -entry.priority)


def _entry(
    model: dict[str, Any],
    recipe: Any,
    defaults: dict[str, Any],
    evaluation: Evaluation | None,
    base: dict[str, str | None],
) -> Entry:
    if recipe is not None and not isinstance(recipe, str):
        raise ConfigError(f"recipes: expected paths of YAML files, found {recipe!r}")
    label = Path(recipe).stem if recipe else ""
    name = f"{model['name']}-{label}" if label else model["name"]
    if _NAME.fullmatch(name) is None or name in RESERVED:
        raise ConfigError(
            f"name: expected letters, digits and ._- and none of {', '.join(sorted(RESERVED))}, found {name!r}"
        )
    options = _options(defaults) | (load_recipe(recipe) if recipe else {}) | _options(model.get("options", {}))
    if taken := [option for option in _SET_HERE if option in options]:
        raise ConfigError(f"{taken[0]}: is set by the zoo, expected in no options and no recipe")
    options |= {"model": model["model"], "ray_address": base["ray_address"]}
    options |= {"output": f"{base['output']}/{name}", "statistics": f"{base['output']}/{STATISTICS}"}
    config = RunConfig.from_options(resolve_options(options, None))
    return Entry(name, label, config, evaluation, model.get("priority", 0))


def _evaluation(values: dict[str, Any]) -> Evaluation:
    kinds = {f.name: type(f.default) if f.name != "text" else str for f in fields(Evaluation)}
    for problem in _misfits(values, kinds, required=("text",)):
        raise ConfigError(problem)
    evaluation = Evaluation(**values)
    if evaluation.num_samples < 1 or evaluation.seq_len < 2:
        raise ConfigError(f"expected num_samples of at least 1 and seq_len of at least 2, found {values}")
    return evaluation


def _collect(problems: list[str], where: str, make: Any, *arguments: Any) -> Any:
    """What ``make`` makes; a ConfigError is noted instead, and None returned."""
    try:
        return make(*arguments)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        return None


def _misfits(value: Any, kinds: Mapping[str, type], *, required: tuple[str, ...]) -> Iterator[str]:
    """What keeps a value from being a mapping with these keys and types."""
    if not isinstance(value, dict):
        yield f"expected a mapping with {', '.join(kinds)}, found {value!r}"
        return
    for key, item in value.items():
        if key not in kinds:
            yield f"{key}: no such key; known are {', '.join(kinds)}"
        elif type(item) is not kinds[key]:
            yield f"{key}: expected a {kinds[key].__name__}, found {item!r}"
    yield from (f"{key}: is missing" for key in required if key not in value)


def _options(values: dict[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _refusal(path: str, problems: list[str]) -> ConfigError:
    return ConfigError(f"{path}: nothing was started, {len(problems)} to correct\n  " + "\n  ".join(problems))
