# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Everything of a source but its weights: which files come along, and the generation defaults.

What a source has beside its weights is not a list that could be known here. So every file comes along, except for
weights in whatever format and the few files that a conversion writes itself.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

import modeling_attnres

from .checkpoint import CheckpointError, first_line


CARD, REPORT, GENERATION_CONFIG = "README.md", "conversion_report.json", "generation_config.json"
SOURCE_CARD = "SOURCE_README.md"

# Endings of weight files, in every format that repositories hold beside one another, and of what trainers save.
WEIGHT_ENDINGS = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "keras", "msgpack", "ot", "onnx", "onnx_data"),
    *("onnx.data", "tflite", "mlmodel", "pkl", "pickle", "npy", "npz", "nemo", "distcp"),
)
_WEIGHTS = re.compile(rf"\.({'|'.join(map(re.escape, WEIGHT_ENDINGS))})$|\.index(\.\w+)?\.json$", re.IGNORECASE)
_NOT_OF_THE_MODEL = (".git", ".cache", "__pycache__")
# Never copied from the source: the conversion writes its own config, card, report and code under these names.
_CODE = Path(modeling_attnres.__file__).parent.glob("*_attnres.py")
_WRITTEN = {"config.json", CARD, REPORT, *(file.name for file in _CODE)}


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or the index of weight files."""
    return _WEIGHTS.search(name) is not None


def companion_files(folder: Path) -> list[Path]:
    """Files of `folder` and below that come along, as paths relative to it.

    Raises:
        CheckpointError: if one of them is a link that leads nowhere.
    """
    found = []
    for path in _files_below(folder, {folder.resolve()}):
        relative = path.relative_to(folder)
        at_top = len(relative.parts) == 1
        if is_weight_file(path.name) or (at_top and path.name in _WRITTEN):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: a link to a file that does not exist ({os.readlink(path)}).")
        if path.is_file():  # no sockets, pipes or devices
            found.append(relative)
    return sorted(found)


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files, through links too, each folder once."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif path.name not in _NOT_OF_THE_MODEL and (target := path.resolve()) not in seen:
            yield from _files_below(path, seen | {target})


def companion_bytes(folder: Path) -> int:
    """Size of what [`copy_companions`] copies."""
    return sum((folder / file).stat().st_size for file in companion_files(folder))


def copy_companions(folder: Path, result: Path, config: dict[str, Any] | PreTrainedConfig, keep_card: bool):
    """Copies the companions, and writes the generation defaults if the source has them in its `config.json`.

    Args:
        config: where generation defaults are if the source has no `generation_config.json`.
        keep_card: whether the source's model card comes along under the name `SOURCE_README.md`.
    """
    for file in companion_files(folder):
        (result / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, result / file)
    if keep_card and (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, result / SOURCE_CARD)
    if not (result / GENERATION_CONFIG).exists():
        _write_generation_config(config, folder, result)


def _write_generation_config(config: dict[str, Any] | PreTrainedConfig, folder: Path, result: Path):
    """Generation defaults of older sources are fields of `config.json`, which the result's config has no place for."""
    try:
        defaults = GenerationConfig.from_model_config(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: its generation defaults are not valid ({first_line(error)})."
        ) from error
    # `save_pretrained` would refuse combinations that the library loads with a warning.
    defaults.to_json_file(result / GENERATION_CONFIG)


def write_json(path: Path, fields: dict):
    """Writes a JSON object for people to read."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
