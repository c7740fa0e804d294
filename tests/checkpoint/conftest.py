"""Checkpoints that several test modules only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import build


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama in one file; not to be changed."""
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama in several shards; not to be changed."""
    return build("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="200KB")
