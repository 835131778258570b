# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One run on several ranks for all tests of this folder: importing everything takes longer than most of the checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """By scenario, what each of its ranks found."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share one run
        base = base.parent
    folder = base / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(folder)
    return load(folder)


def run(folder: Path, *names: str):
    """Runs the fast scenarios, or those that are named."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(folder), *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"


def load(folder: Path) -> dict[str, list[dict]]:
    found = {}
    for file in sorted(folder.glob("*.found.pt")):  # scenario.rank.found.pt
        found.setdefault(file.name.split(".")[0], []).append(torch.load(file))
    return found


@pytest.fixture
def run_ranks(tmp_path):
    """A function that runs slow scenarios by name."""

    def run_and_load(*names: str) -> dict[str, list[dict]]:
        run(tmp_path, *names)
        return load(tmp_path)

    return run_and_load
