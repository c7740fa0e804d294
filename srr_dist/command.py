"""What the verbs share: flags made from configuration fields, log lines, and errors turned into exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import Any

from srr_dist.config import JobConfig, QuantizeConfig, RunConfig, resolve_options
from srr_dist.errors import SrrError

_KINDS = {"int": int, "float": float, "str": str, "str | None": str}


def add_options(parser: argparse.ArgumentParser, fields: Iterable[Field[Any]]) -> None:
    """One flag per configuration field. Flags not given are absent, so that a recipe's values can show through."""
    for field in fields:
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        shown = f" (default: {field.default})" if field.default not in ("", None) else ""
        parser.add_argument(
            flag,
            type=_KINDS[str(field.type)],
            choices=field.metadata.get("choices"),
            default=argparse.SUPPRESS,
            help=(text + shown).replace("%", "%%"),
        )


def run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of a verb that takes a whole run's options."""
    usage = f"srr-dist {verb} --model MODEL --calibration TEXT --output OUTPUT [option …]"
    parser = argparse.ArgumentParser(prog=f"srr-dist {verb}", usage=usage, description=description)
    parser.add_argument("--recipe", default=None, help="YAML file of the options below; flags win over it")
    add_options(parser, QuantizeConfig.__dataclass_fields__.values())
    add_options(parser, JobConfig.__dataclass_fields__.values())
    return parser


def parse_run(parser: argparse.ArgumentParser, arguments: list[str]) -> RunConfig:
    """The run that the arguments, their recipe and their preset describe."""
    return run_config(vars(parser.parse_args(arguments)))


def run_config(flags: dict[str, Any]) -> RunConfig:
    """The run that parsed flags, their recipe and their preset describe."""
    return RunConfig.from_options(resolve_options(flags, flags.pop("recipe")))


def run_command(work: Callable[[], int]) -> int:
    """Do a verb's work with log lines on stderr; a deliberate error becomes one line and its exit code."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("srr_dist").setLevel(logging.INFO)
    try:
        return work()
    except SrrError as error:
        print(f"srr-dist: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("srr-dist: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
