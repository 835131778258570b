# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""State dicts under the names of a checkpoint's files, for loading one into a model that exists already."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@torch.no_grad()
def to_model_names(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Brings a state dict from the names that `save_pretrained` writes to the model's own.

    `from_pretrained` does so by itself, but `Trainer` resumes by reading a checkpoint's file and calling
    `load_state_dict` with `strict=False`: names that do not fit are passed over, and training would go on from the
    wrong weights without an error.

    Args:
        model: names tensors as they are in memory.
        state_dict: under its names, those of its files (experts apart, for example), or both.

    Returns:
        `state_dict` itself if it fits; else one under the model's names. What is unknown keeps its name.

    Raises:
        ValueError: if a tensor is there under two names.
    """
    own = model.state_dict().keys()
    if state_dict.keys() <= own:
        return state_dict
    renamings, converters = _conversions(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    result, merged = {}, {}
    for key, tensor in sorted(state_dict.items(), key=lambda item: dot_natural_key(item[0])):  # experts in order
        name, pattern = rename_source_key(key, renamings, converters)
        if key in own or name not in own:
            result[key] = tensor
        elif pattern is None:
            if name in state_dict:
                raise ValueError(f"The state dict has `{key}` and `{name}`, two names of one tensor.")
            result[name] = tensor
        else:
            converter = merged.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, tensor)
    for name, converter in merged.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            result[target] = value[0] if isinstance(value, list) else value
    return result


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names that `save_pretrained` writes -> the names of the parameters that they become, or become a part of."""
    renamings, converters = _conversions(model)
    return {name: rename_source_key(name, renamings, converters)[0] for name in names}


def _conversions(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    return renamings, [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]


def rename_former_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str):
    """Takes the level `backbone.` out of a state dict's names, in place.

    State dicts that torch, distributed checkpoints or PEFT saved from earlier versions have it.

    Args:
        model: the base model.
        state_dict: of whatever holds the model.
        prefix: the model's name in it, up to a dot.

    Raises:
        ValueError: if a name without the level is not the model's, or is there already.
    """
    former = prefix + "backbone."
    old = [name for name in state_dict if name.startswith(former)]
    if not old:
        return
    own = model.state_dict(prefix=prefix).keys()
    for name in old:
        renamed = prefix + name.removeprefix(former)
        if renamed not in own or renamed in state_dict:
            known = "two names of one tensor" if renamed in own else "of which this model knows neither"
            raise ValueError(f"The state dict has `{name}`, today `{renamed}`: {known}.")
        state_dict[renamed] = state_dict.pop(name)


def refuse_lost_adapters(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor], prefix: str):
    """Refuses low-rank weights that a model has no place for; PEFT loads without asking that all be used.

    It brings the names of single experts, as adapters for Transformers 4 have them, to merged ones, but adapts the merged
    experts only in models whose `model_type` it knows.

    Args:
        model: the base model.
        state_dict: of whatever holds the model.
        prefix: the model's name in it, up to a dot.

    Raises:
        ValueError: if there are such weights.
    """
    adapter = [name for name in state_dict if name.startswith(prefix) and ".lora_" in name]
    if not adapter:
        return
    own = model.state_dict(prefix=prefix).keys()
    if lost := [name for name in adapter if name not in own]:
        raise ValueError(
            f"The adapter has {len(lost)} weights that this model has no place for, such as `{lost[0]}`; an adapter for "
            "single experts has to be loaded into the plain model and saved again, which merges them."
        )
