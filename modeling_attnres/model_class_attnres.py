# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Model classes made per backbone: a class that is asked about itself gives the backbone's answer.

Transformers asks a model's class, not the model, what it can do (attention and expert implementations, stateful caches),
which plans it has and which names it ignores. It also finds a backbone's weight conversions by the name of a class.
"""

import functools
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from .backbone_attnres import backbone_class
from .configuration_attnres import AttnResConfig
from .flat_config_attnres import made_suffix, module_of_made


# What the library reads off a class beside every `_supports_*`.
_CAPABILITIES = ("_can_compile_fullgraph", "_is_stateful", "_compatible_flash_implementations")
_OF_A_HEAD = (
    *("_tp_plan", "_ep_plan", "_fsdp_plan", "input_modalities"),
    *("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_tied_weights_keys"),
)


# While the backbone was a module of its own, every tensor's name had this level.
FORMER_LEVEL = r"(?:^|(?<=^model\.))backbone\."

# PEFT asks whether a model type has conversions before it looks for those of the model's parts.
register_checkpoint_conversion_mapping(AttnResConfig.model_type, [], overwrite=True)


class _FormerName(PrefixChange):
    """A tensor's name with the former level: read, never written.

    Of all renamings, those of prefixes are the ones that a checkpoint need not have a name for.
    """

    __slots__ = ()

    def __init__(self):
        # The level may lie behind the prefix of a head's base model, which a base model's own names do not have.
        super(PrefixChange, self).__init__(FORMER_LEVEL, "")

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("^no tensor of this name$", "^nor of this$")


def model_class_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The subclass of an AttnRes model class for the backbone of `config`; of a base model, the backbone's subclass too.

    Raises:
        ValueError: if `config` is not an AttnRes config.
        UnsupportedBackboneError: if the installed Transformers has no model for its backbone.
    """
    config_class = getattr(config, "backbone_config_class", None)
    if config_class is None:
        raise ValueError(f"`config` must be an AttnResConfig, got a {type(config).__name__}.")
    return _made_class(cls, config_class, backbone_class(config.text_config))


@functools.cache
def _made_class(
    cls: type[PreTrainedModel], config_class: type[PreTrainedConfig], backbone: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    recorded = backbone._can_record_outputs or {}
    supported = [name for name in dir(backbone) if name.startswith("_supports_")]
    namespace: dict[str, Any] = {
        "__module__": module_of_made(cls, config_class),
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "made_of": (cls, config_class, backbone),
        "backbone_model_class": backbone,
        # Hidden states are collected by the loop over the layers.
        "_can_record_outputs": {key: recorded.get(key, []) for key in ("attentions", "router_logits")},
        # The library's plan hands one tensor from stage to stage. Depth attention needs every source.
        "_pp_plan": {},
        **{name: getattr(backbone, name) for name in (*supported, *_CAPABILITIES) if hasattr(backbone, name)},
    }
    counterpart = None if cls.library_classes is None else cls.library_classes.get(config_class, None)
    if counterpart is not backbone:
        namespace |= {name: getattr(counterpart, name) for name in _OF_A_HEAD if hasattr(counterpart, name)}
        return type(cls)(cls.__name__, (cls,), namespace)
    # The name tells the backbone: its conversions of weights are found by it.
    name = cls.__name__ + made_suffix(config_class)
    _register_conversions(name, backbone, config_class)
    return type(cls)(name, (cls, backbone), {**namespace, "__qualname__": name})


def _register_conversions(name: str, backbone: type[PreTrainedModel], config_class: type[PreTrainedConfig]):
    """The backbone's conversions of weights (experts merged, names of other code), for a class called `name`."""
    keys = (backbone.__name__, config_class.model_type)
    conversions = next(filter(None, map(get_checkpoint_conversion_mapping, keys)), [])
    register_checkpoint_conversion_mapping(name, [_FormerName(), *conversions], overwrite=True)


def blank_model(
    cls: type[PreTrainedModel], config_class: type[PreTrainedConfig], backbone: type[PreTrainedModel]
) -> PreTrainedModel:
    """An instance of the class made of these three, without anything in it: what a copy or a pickle starts from."""
    made = _made_class(cls, config_class, backbone)
    return made.__new__(made)


def plain_shell(model: PreTrainedModel) -> PreTrainedModel:
    """The backbone's own code around the children of an AttnRes base model that is still being built."""
    shell = object.__new__(model.backbone_model_class)
    shell.__dict__ = {**vars(model), "config": model.config.text_config}
    return shell


__all__ = ["FORMER_LEVEL", "blank_model", "model_class_for", "plain_shell"]
