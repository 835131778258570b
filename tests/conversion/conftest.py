# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk for the conversion tests."""

from pathlib import Path

import pytest
from tiny_checkpoints import save_backbone


@pytest.fixture
def llama(tmp_path) -> Path:
    """A llama checkpoint in one file."""
    return save_backbone(tmp_path / "llama")


@pytest.fixture
def sharded_llama(tmp_path) -> Path:
    """A llama checkpoint in several shards."""
    return save_backbone(tmp_path / "sharded", max_shard_size="30KB")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """What real models need and tiny ones only wait for: tests survive no power cut and fit into memory twice."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("gc.collect", lambda *generation: 0)
