"""Who may import whom: by reading every module's imports, and by importing packages in a clean interpreter."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import srr_dist

ROOT = Path(srr_dist.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
FOUNDATION = {"srr_dist", "errors", "seeds", "threads", "scratch"}  # the bare package holds its version alone
ALLOWED_OURS = {
    "errors": set(),
    "threads": set(),
    "seeds": set(),
    "scratch": set(),
    "config": {"errors"},
    "solve": {"solve", "config", *FOUNDATION},
    "calibration": {"calibration", "config", *FOUNDATION},
    "store": {"store", *FOUNDATION},
    "checkpoint": {"checkpoint", "store", "config", *FOUNDATION},
    "export": {"export", "store", "checkpoint", "solve", "config", *FOUNDATION},
    "catalog": {"catalog", "export", "store", "config", *FOUNDATION},
    "pipeline": {
        "pipeline", "export", "store", "checkpoint", "solve", "calibration", "config", *FOUNDATION,
    },
}  # fmt: skip
ONLY_IN = {
    "ray": {"pipeline"},
    "transformers": {"checkpoint"},
    "accelerate": {"checkpoint"},
    "gguf": {"checkpoint"},
    "datasets": {"checkpoint"},
    "torch": {"threads", "solve", "calibration", "checkpoint", "export", "pipeline"},
}
THIRD_PARTY = {
    "solve": {"torch"},
    "calibration": {"torch"},
    "config": {"yaml"},
    "errors": set(),
    "seeds": set(),
    "scratch": set(),
    "threads": {"torch"},
}


def imported_modules(source, package):
    """Full names of all modules that a source text imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            if module == "srr_dist":
                yield from (f"srr_dist.{alias.name}" for alias in node.names if not alias.name.startswith("_"))


def area(path):
    """``solve`` for srr_dist/solve/grids.py, ``config`` for srr_dist/config.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    package = ".".join(("srr_dist", *path.relative_to(ROOT).parts[:-1]))
    return set(imported_modules(path.read_text(encoding="utf-8"), package))


def identify(path):
    return str(path.relative_to(ROOT))


def test_reader_sees_every_form_of_import():
    source = """
import torch.nn as nn, json
from srr_dist import solve
from . import grids
from ..store import records
def late():
    from ray.util import state
"""
    assert set(imported_modules(source, "srr_dist.export")) == {
        "torch.nn", "json", "srr_dist", "srr_dist.solve", "srr_dist.export", "srr_dist.store", "ray.util",
    }  # fmt: skip


def test_every_package_has_its_rule():
    packages = {path.parent.name for path in MODULES if path.name == "__init__.py" and path.parent != ROOT}
    assert packages == set(ALLOWED_OURS) - {"errors", "config", "seeds", "threads", "scratch"}


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_module_imports_only_the_layers_below(path):
    if area(path) not in ALLOWED_OURS:  # the entry modules may use everything
        return
    ours = {name for name in imports(path) if name.split(".")[0] == "srr_dist"}
    areas = {name.split(".")[1] if "." in name else "srr_dist" for name in ours}
    assert areas <= ALLOWED_OURS[area(path)]


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_module_imports_heavy_libraries_only_where_they_belong(path):
    top = {name.split(".")[0] for name in imports(path)}
    for library, homes in ONLY_IN.items():
        assert library not in top or area(path) in homes, library
    if area(path) in THIRD_PARTY:
        assert top - set(sys.stdlib_module_names) - {"srr_dist"} <= THIRD_PARTY[area(path)]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("srr_dist", {"torch", "ray", "transformers"}),
        ("srr_dist.config", {"torch", "ray", "transformers"}),
        ("srr_dist.store", {"torch", "ray", "transformers"}),
        ("srr_dist.solve", {"ray", "transformers", "fsspec"}),
        ("srr_dist.calibration", {"ray", "transformers", "fsspec"}),
        ("srr_dist.checkpoint", {"ray"}),
        ("srr_dist.export", {"ray"}),
    ],
)
def test_import_in_a_clean_interpreter_leaves_out(module, unwanted):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(json.loads(answer.stdout.splitlines()[-1]))
    assert module in loaded
    assert not unwanted & loaded
