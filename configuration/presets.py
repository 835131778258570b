# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Loads the presets beside this file: `models/*.json` (one per backbone) and `training/*.yaml` (recipes)."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from modeling_attnres import AttnResConfig


MODELS = Path(__file__).parent / "models"
TRAINING = Path(__file__).parent / "training"

# One backbone, three models: its plain residual stream, Full AttnRes, Block AttnRes.
VARIANTS = ("prenorm", "full", "block")
FULL = {"sublayers_per_block": 1}


def list_presets() -> list[str]:
    """Names that [`load_preset`] takes: every backbone in every variant."""
    return [f"{backbone}-{variant}" for backbone in _names(MODELS, "json") for variant in VARIANTS]


def load_preset(name: str, **overrides) -> AttnResConfig | PreTrainedConfig:
    """The configuration of a preset.

    Args:
        name: `"{backbone}-full"` or `"{backbone}-block"` for an AttnRes model, `"{backbone}-prenorm"` for the plain
            backbone that the paper compares with.
        overrides: arguments of [`AttnResConfig`] in place of the preset's. `text_config`, a `dict`, is merged into the
            backbone's; it is all that a `-prenorm` preset takes.

    Returns:
        An [`AttnResConfig`], or for `-prenorm` the backbone's own config (`AutoModelForCausalLM.from_config` builds
        it).

    Raises:
        ValueError: if there is no such preset, or an override names no field of the configuration it is meant for.

    ```python
    >>> from modeling_attnres import AttnResForCausalLM
    >>> from modeling_attnres.configuration import load_preset

    >>> config = load_preset("tiny-block", depth_weights="sum", text_config={"vocab_size": 512})
    >>> model = AttnResForCausalLM(config)
    ```
    """
    if name not in list_presets():
        raise ValueError(f"`name` must be one of {', '.join(list_presets())}; got {name!r}.")
    backbone, variant = name.rsplit("-", 1)
    preset = json.loads((MODELS / f"{backbone}.json").read_text(encoding="utf-8"))
    text_config = _merged(preset["text_config"], overrides.pop("text_config", {}))
    if variant == "prenorm":
        if overrides:
            raise ValueError(f"'{name}' is a plain backbone: `text_config` alone can be overridden, got {overrides}.")
        return AutoConfig.for_model(**text_config)

    allowed = {field.name for field in fields(AttnResConfig)} | {"num_blocks"}
    _check_known("AttnResConfig", overrides, allowed)
    blocks = FULL if variant == "full" else preset["block"]
    if {"sublayers_per_block", "num_blocks"} & set(overrides):
        blocks = {}
    return AttnResConfig(text_config=text_config, **{**blocks, **overrides})


def list_recipes() -> list[str]:
    """Names that [`load_recipe`] takes; each is also the name of the backbone it trains."""
    return _names(TRAINING, "yaml")


def load_recipe(name: str) -> dict[str, Any]:
    """A training recipe of the paper as plain data; what the paper does not say is listed under `not_published`.

    Raises:
        ValueError: if there is no such recipe.
    """
    if name not in list_recipes():
        raise ValueError(f"`name` must be one of {', '.join(list_recipes())}; got {name!r}.")
    return yaml.safe_load((TRAINING / f"{name}.yaml").read_text(encoding="utf-8"))


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*.{suffix}"))


def _merged(text_config: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(override, dict):
        raise ValueError(f"`text_config` must be a dict of fields to override, got {type(override).__name__}.")
    config_class = type(AutoConfig.for_model(text_config["model_type"]))
    # Configs take any name without a word: a misspelt field would change nothing.
    _check_known(config_class.__name__, override, {field.name for field in fields(config_class)})
    return {**text_config, **override}


def _check_known(config_name: str, overrides: dict[str, Any], allowed: set[str]):
    unknown = sorted(set(overrides) - allowed)
    if unknown:
        raise ValueError(f"{config_name} has no field {', '.join(f'`{key}`' for key in unknown)} to override.")


__all__ = ["VARIANTS", "list_presets", "list_recipes", "load_preset", "load_recipe"]
