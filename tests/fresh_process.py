# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Starts Python where nothing of this process is left: another folder, another Hugging Face cache."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file


LOADER = Path(__file__).parent / "load_without_package.py"


def run_python(*arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with `arguments` in `folder`, which also holds its cache; fails with the output if it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    own = {"HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(
        command, cwd=folder, env={**kept, **own, **environment}, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, f"{' '.join(command)} failed:\n{process.stdout}\n{process.stderr}"
    return process


def load_results(path: Path) -> dict[str, dict]:
    """What `load_without_package.py` wrote, as outputs of the first and of the second load."""
    results = {"first": {}, "again": {}}
    for key, value in load_file(path).items():
        turn, name = key.split(".")
        results[turn][name] = value
    return results
