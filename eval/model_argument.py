# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Checks a model that was named on a command line, before anything is loaded or written."""

import json
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..conversion.library import quiet_library


class ModelError(ValueError):
    """The argument names no model that can be loaded; the message says why."""


def check_model(model: str, argument: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint folder or a model on the Hub.

    Raises:
        ModelError: naming `argument`, if `model` is neither, or its config cannot be used.
    """
    path = Path(model)
    if path.is_dir():
        _check_folder(path, argument)
    elif path.exists():
        raise ModelError(f"{argument} must be a checkpoint folder or a name on the Hub, got the file {model}")
    else:
        try:
            validate_repo_id(model)
        except HFValidationError:
            raise ModelError(f"{argument} is neither an existing folder nor a name on the Hub: {model!r}") from None
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config's class, which may be remote code, raises what it likes
        if path.is_dir():
            raise ModelError(f"{argument}: the config of {model} cannot be used: {error}") from error
        raise ModelError(
            f"{argument} {model!r} is no existing folder, and could not be fetched from the Hub: {error}"
        ) from error


def check_weights(model: str, config: PreTrainedConfig, argument: str, trust_remote_code: bool = False):
    """Reads the names and shapes of a language model's weights, and none of the weights.

    The library makes up what is missing, with no more than a note.

    Args:
        config: of the model, see [`check_model`]. Of other models than decoders nothing is checked.

    Raises:
        ModelError: naming `argument`, if weights are missing or do not fit.
    """
    brought = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not brought and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    try:
        with quiet_library():
            _, found = AutoModelForCausalLM.from_pretrained(
                model, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # damaged files, unknown formats, missing packages
        raise ModelError(f"{argument}: the weights of {model} do not load: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{argument} must have all of its weights, {model} lacks {len(missing)}: {', '.join(missing[:4])}"
            f"{'...' if len(missing) > 4 else ''}"
        )


def _check_folder(folder: Path, argument: str):
    file = folder / "config.json"
    if (adapter := folder / "adapter_config.json").is_file() and not file.is_file():
        base = _read_object(adapter, argument).get("base_model_name_or_path")
        raise ModelError(f"{argument} must be a model, {folder} is a PEFT adapter of {base!r}")
    if not file.is_file():
        raise ModelError(f"{argument} must be a checkpoint folder, {folder} has no config.json")
    _read_object(file, argument)


def _read_object(file: Path, argument: str) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{argument}: {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{argument}: {file} must hold a JSON object, got {type(content).__name__}")
    return content
