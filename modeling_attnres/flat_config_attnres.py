# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What makes one flat config of a backbone's config and AttnRes' own fields.

For every backbone a class is made that inherits from the AttnRes config and from the backbone's. Fields of AttnRes' own
lie in a slot of the instance. Its `__dict__` holds the backbone's fields alone, as a plain config's does.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig


# Both fields describe the file and its model, not the backbone.
_FIELDS_OF_THE_FILE = ("architectures", "auto_map")

_made: list[type[PreTrainedConfig]] = []
_listeners: list[Callable[[type[PreTrainedConfig]], None]] = []


class OwnField:
    """A field of AttnRes' own, kept where the backbone's view of the config does not see it."""

    def __init__(self, name: str, default: Any = MISSING):
        self.name, self.default = name, default

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Any:
        value = self.default if config is None else config._own.get(self.name, self.default)
        if value is MISSING:
            raise AttributeError(f"'{owner.__name__}' has no attribute '{self.name}'")
        return value

    def __set__(self, config: PreTrainedConfig, value: Any):
        config._own[self.name] = value

    def __delete__(self, config: PreTrainedConfig):
        if config._own.pop(self.name, MISSING) is MISSING:
            raise AttributeError(f"'{type(config).__name__}' has no attribute '{self.name}'")


def keep_own_fields_apart(cls: type[PreTrainedConfig]):
    """Makes an [`OwnField`] of every field of an AttnRes config class that not every config has."""
    common = {field.name for field in fields(PreTrainedConfig)}
    defaults = {field.name: field.default for field in fields(cls) if field.name not in common}
    for name, default in {**defaults, "architectures": None, "auto_map": MISSING}.items():
        if not isinstance(inspect.getattr_static(cls, name, None), OwnField):
            setattr(cls, name, OwnField(name, default))


def on_config_class(callback: Callable[[type[PreTrainedConfig]], None]):
    """Calls `callback` with every class that was or will be made: the auto classes look models up by them."""
    _listeners.append(callback)
    for made in _made:
        callback(made)


@functools.cache
def config_class_for(cls: type[PreTrainedConfig], backbone_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of the AttnRes config class `cls` and of a backbone's config class.

    Raises:
        ValueError: if the latter describes no decoder, or has a field named like one of AttnRes' own.
    """
    known = {field.name for field in fields(backbone_class)} | {*backbone_class.attribute_map}
    if "num_hidden_layers" not in known:
        raise ValueError(
            "`text_config` must describe a decoder and give its `num_hidden_layers`, got a "
            f"'{backbone_class.model_type}' config (of a multimodal model, pass the text config alone)."
        )
    own = {name for name in dir(cls) if not name.startswith("_") and not hasattr(PreTrainedConfig, name)}
    if taken := known & (own | {field.name for field in fields(cls)}) - {
        field.name for field in fields(PreTrainedConfig)
    }:
        raise ValueError(
            f"`text_config` must have no field named like one of AttnRes' own, got a '{backbone_class.model_type}' "
            f"config with {sorted(taken)}."
        )
    namespace = {
        "__module__": module_of_made(cls, backbone_class),
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "attnres_config_class": cls,
        "backbone_config_class": backbone_class,
        # The library's plan hands one tensor from stage to stage, and depth attention needs every source.
        "base_model_pp_plan": None,
    }
    made = type(cls)(cls.__name__, (cls, backbone_class), namespace)
    # Of the fields that every config has, the backbone's defaults win over the general ones.
    general = PreTrainedConfig.__dataclass_fields__
    for name, field in backbone_class.__dataclass_fields__.items():
        if made.__dataclass_fields__[name] is general.get(name):
            made.__dataclass_fields__[name] = field
    made = strict(made)
    _made.append(made)
    for callback in _listeners:
        callback(made)
    return made


def blank_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """An instance of a made class without any field set."""
    config = object.__new__(cls)
    object.__setattr__(config, "_own", {})
    object.__setattr__(config, "_valid_depth", None)
    return config


def backbone_of(text_config: Any, backbone_type: str | None, own_type: str) -> type[PreTrainedConfig]:
    """The backbone's config class, as an AttnRes config's arguments name it.

    Args:
        text_config: a config, or its fields with their `model_type`.
        backbone_type: of a flat config; if it has none, its `model_type`, which is a plain config's or AttnRes' own.
        own_type: the `model_type` of AttnRes configs.

    Raises:
        ValueError: if they name none, or one as a part of another model.
    """
    if isinstance(text_config, dict):
        if not text_config.get("model_type"):
            raise ValueError(
                "`text_config` given as a dict must name its backbone in `model_type` (for example 'llama'), got keys "
                f"{sorted(text_config)}."
            )
        if backbone_type not in (None, own_type, text_config["model_type"]):
            raise ValueError(
                f"`text_config` must be the backbone's alone, got a part of a '{backbone_type}' config. A checkpoint of "
                "Kimi K3 is converted first: `attnres-convert SOURCE OUT`."
            )
        backbone_type = text_config["model_type"]
    elif isinstance(text_config, PreTrainedConfig):
        backbone_type = text_config.model_type
    elif text_config is not None:
        raise ValueError(f"`text_config` must be a config object or a dict, got {type(text_config).__name__}.")
    elif backbone_type is None:
        return LlamaConfig
    config_class = type(text_config) if isinstance(text_config, PreTrainedConfig) else None
    if config_class is None and backbone_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[backbone_type]
    if backbone_type == own_type or hasattr(config_class, "backbone_config_class"):
        raise ValueError(
            "`text_config` must describe the PreNorm backbone, got an AttnRes config; a flat one names it in "
            "`backbone_type`."
        )
    if config_class is None:
        raise ValueError(f"`backbone_type` must be a model type that Transformers knows, got {backbone_type!r}.")
    return config_class


def backbone_fields(text_config: PreTrainedConfig | dict | None, given: dict[str, Any]) -> dict[str, Any]:
    """All fields of a flat config: those of a nested `text_config`, with what is `given` beside it in their place.

    Raises:
        ValueError: if they are of a checkpoint whose depth attention is laid out in another project's way.
    """
    if text_config is None:
        nested = {}
    elif isinstance(text_config, dict):
        nested = dict(text_config)
    else:
        nested = text_config.to_dict()
        nested["attn_implementation"] = getattr(text_config, "_attn_implementation_internal", None)
        nested["experts_implementation"] = getattr(text_config, "_experts_implementation_internal", None)
    for level in (nested, given):
        if (block := level.get("attn_res_block_size")) is not None:
            raise ValueError(
                f"`attn_res_block_size`={block!r} counts blocks in checkpoints of Kimi K3's layout, whose depth attention "
                "has other tensors. Convert one with `attnres-convert SOURCE OUT`; for a new model give "
                "`sublayers_per_block` in its place, which counts two sublayers per decoder layer."
            )
    if text_config is None:
        return dict(given)
    replaced = ["model_type", "transformers_version", *_FIELDS_OF_THE_FILE]
    # Two ways of giving one thing: the library would take the nested one.
    if given.get("num_labels") is not None:
        replaced += ["id2label", "label2id", "num_labels"]
    if given.get("torch_dtype") is not None:
        replaced += ["dtype", "torch_dtype"]
    nested = {name: value for name, value in nested.items() if name not in replaced}
    return {**nested, **{name: value for name, value in given.items() if value is not None}}


def public_names(fields: dict[str, Any], backbone_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """A config's fields with the models in `architectures` and `auto_map` under the names that a module has them by."""
    suffix = made_suffix(backbone_class)
    if isinstance(fields.get("architectures"), list):
        fields["architectures"] = [name.removesuffix(suffix) for name in fields["architectures"]]
    if isinstance(fields.get("auto_map"), dict):
        fields["auto_map"] = {
            auto: name.removesuffix(suffix) if isinstance(name, str) else name
            for auto, name in fields["auto_map"].items()
        }
    return fields


def plain_architectures(architectures: list[str] | None, backbone_class: type[PreTrainedConfig]) -> list[str] | None:
    """The library's models of a backbone in the place of AttnRes models' names, if it has them."""
    # Deliberately not globals: servers pickle a config with every global that its code refers to, and these
    # tables lead to every model.
    library = importlib.import_module("transformers")
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    base = tables.MODEL_MAPPING_NAMES.get(backbone_class.model_type)
    if not isinstance(base, str) or not architectures:
        return None
    names = [base.removesuffix("Model") + name.removeprefix("AttnRes") for name in architectures]
    return names if all(hasattr(library, name) for name in names) else None


def module_of_made(cls: type, backbone_class: type[PreTrainedConfig]) -> str:
    """The module that a class made for a backbone belongs to: the file that a checkpoint's `auto_map` names.

    Transformers copies to a checkpoint what this file imports, and imports nothing else of it. It is the file of `cls`,
    unless the backbone comes with a file of its own that has `cls` too, as Kimi K3 does.
    """
    offered = getattr(sys.modules.get(backbone_class.__module__), cls.__name__, None)
    # By its file's name and not by identity: two checkpoints may have registered two copies of a backbone.
    if getattr(offered, "__module__", "").rpartition(".")[-1] == cls.__module__.rpartition(".")[-1]:
        return backbone_class.__module__
    return cls.__module__


def made_suffix(backbone_class: type[PreTrainedConfig]) -> str:
    """What the name of a model class that was made for a backbone has after the name of the class it was made of."""
    return f"_{backbone_class.__name__.removesuffix('Config')}"


__all__ = [
    "OwnField",
    "backbone_fields",
    "backbone_of",
    "blank_config",
    "config_class_for",
    "keep_own_fields_apart",
    "made_suffix",
    "module_of_made",
    "on_config_class",
    "plain_architectures",
    "public_names",
]
