"""English text that every machine has: the prose in the docstrings of Python's standard library.

Modules are taken in the order of the hash of their name, which mixes subjects; the first eighth of them is for
evaluation, the others for calibration. One Python installation always gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}
"""Folders that hold no library code, or no prose, or what was installed later."""

SHORTEST_WORDS = 12
"""Shorter paragraphs are mostly signatures and headings."""


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write ``text-calibration.txt`` and ``text-evaluation.txt`` into ``folder``; returns their paths."""
    modules = library_modules(Path(sysconfig.get_paths()["stdlib"]))
    bound = len(modules) // 8
    paths = []
    for name, part in (("calibration", modules[bound:]), ("evaluation", modules[:bound])):
        paths.append(folder / f"text-{name}.txt")
        paths[-1].write_text("\n\n".join(text for module in part for text in prose(module)) + "\n", encoding="utf-8")
    return paths[0], paths[1]


def library_modules(library: Path) -> list[Path]:
    """The source files of a library folder, by the hash of their relative names."""
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = [name for name in names if SKIPPED.isdisjoint(name.parts)]
    return [library / name for name in sorted(kept, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())]


def prose(module: Path) -> Iterator[str]:
    """The paragraphs of a source file's docstrings that read as text, one line each, in their order."""
    try:
        tree = ast.parse(module.read_bytes())
    except SyntaxError:
        return  # templates that only look like Python
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                if is_prose(text):
                    yield text


def is_prose(text: str) -> bool:
    """Whether a paragraph is long enough, ends as a sentence does, and holds words rather than code or tables."""
    words = text.split(" ")
    if len(words) < SHORTEST_WORDS or not text.endswith((".", "!", "?")) or ">>>" in text:
        return False
    return sum(word.strip("(),.;:'\"!?").isalpha() for word in words) > 0.8 * len(words)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for written in write_texts(target):
        print(written)
