# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
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
MODEL_FILES = (
    *("*.json", "*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.py"),
    *("*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt", "*.tiktoken"),
)
# Arguments of lm-eval's `hf` that add weights from elsewhere to the model's.
ADAPTER_ARGUMENTS = ("peft", "delta")


def model_hash(folder: Path, *adapters: Path) -> str:
    """SHA-256 over names and contents of a checkpoint's files, the README apart, and of its adapters' in their order.

    A folder that is itself an adapter counts together with the model that it was made for, where that is a folder too.
    """
    base = _base_model(folder)
    others = [*([base] if base and base.is_dir() else []), *adapters]
    hashes = [_hash_of_files(each) for each in (folder, *others)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if others else hashes[0]


def _hash_of_files(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()


def _base_model(folder: Path) -> Path | None:
    """What an adapter's config names as its model; Transformers loads that first, whatever else lies beside."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    base = json.loads(config.read_text("utf-8")).get("base_model_name_or_path")
    return Path(base) if base else None


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write(folder: Path, arguments: dict, command: list[str], seconds: float, cpu_seconds: float):
    """Writes `provenance.json`.

    A model or adapter that is no folder has no hash: it is named by lm-eval's own `model_sha` and `peft_sha` instead.

    Args:
        arguments: those that lm-eval gave its model class.
    """
    model = Path(arguments["pretrained"], arguments.get("subfolder") or "")
    adapters = {name: arguments[name] for name in ADAPTER_ARGUMENTS if arguments.get(name)}
    local = all(path.is_dir() for path in (model, *map(Path, adapters.values())))
    record = {
        "model": arguments["pretrained"],
        **adapters,
        "model_hash": model_hash(model, *map(Path, adapters.values())) if local else None,
        "command": command,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
