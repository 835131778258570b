# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a run's figures depend on besides the tasks: the model's bytes, versions, dtype, batch size and threads."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


FILE_NAME = "provenance.json"
PACKAGES = ("modeling-attnres", "torch", "transformers", "lm-eval", "datasets", "numpy")
# What decides a checkpoint's outputs: config, weights, the code it may bring along, tokenizer.
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.py", "*.jinja", "*.model", "*.txt")


def model_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint's files, the README apart."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write(folder: Path, model: str, command: list[str], seconds: float, cpu_seconds: float):
    """Writes `provenance.json`. A model that is no folder is named by lm-eval's own `model_sha` instead of a hash."""
    record = {
        "model": model,
        "model_hash": model_hash(Path(model)) if Path(model).is_dir() else None,
        "command": command,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
