# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder holds, in one form whatever it came as: backbone tensors under the library's names, the
depth attention's as matrices, and the conventions they were trained with.

Letters: L sublayers (two per decoder layer), D hidden size, S sublayers per block.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM, UnsupportedBackboneError

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    ConversionError,
    PickledTensor,
    StoredTensor,
    first_line,
    read_header,
    shorten,
)
from .library import quiet_library
from .refusals import check_droppable, check_not_quantised, refuse_adapter_tensors, refuse_scales


DEPTH_PREFIX = "model.depth_attention."
DEPTH_QUERY, DEPTH_KEY_NORM = f"{DEPTH_PREFIX}query", f"{DEPTH_PREFIX}key_norm"
SOFTMAX = "softmax"
# Lies in an AttnRes checkpoint, in a folder where no loader looks for weights.
UNREAD_FILE = "unread/unread.safetensors"


@dataclass(frozen=True)
class Source:
    """A checkpoint in the form that everything is converted from.

    Attributes:
        kind: `"prenorm"`, `"attnres"`, or the name of a dialect.
        text_config: config of the backbone.
        shards: per weight file, the backbone's tensors as `(name in the library's layout, stored tensor)`.
        attnres: the conventions of the depth attention, or `None` for a PreNorm model.
        depth: the depth attention's tensors by name; for the method `query` and `key_norm`, both `[L, D]`.
        unread: tensors that the source stores and no model reads, by their names in its dialect.
        dropped: names of stored tensors that the result leaves out, on request or because nothing ever reads them.
    """

    kind: str
    checkpoint: Checkpoint
    text_config: PreTrainedConfig
    shards: list[list[tuple[str, StoredTensor | PickledTensor]]]
    attnres: AttnResConfig | None = None
    depth: dict[str, torch.Tensor] = field(default_factory=dict)
    unread: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, StoredTensor | PickledTensor]:
        return {name: tensor for shard in self.shards for name, tensor in shard}

    @property
    def is_variant(self) -> bool:
        """Whether its mixes are one of the ablation forms, not the method's softmax."""
        return self.attnres is not None and self.attnres.depth_attention_type != SOFTMAX

    @property
    def queries_are_zero(self) -> bool:
        """Whether every mix is the plain mean or sum of its sources."""
        return not self.is_variant and (not self.depth or not self.depth[DEPTH_QUERY].any())


def build_config(config: dict[str, Any], where: str) -> PreTrainedConfig:
    """The library's config object for a `config.json`.

    Raises:
        CheckpointError: if its model type is unknown to the installed Transformers or a field has a wrong value.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*CONFIG_MAPPING, AttnResConfig.model_type}:
        raise CheckpointError(f"{where}: model_type {model_type!r} is unknown to the installed Transformers.")
    # The source's own code is neither run nor copied: the library's class takes its place.
    fields = {name: value for name, value in config.items() if name != "auto_map"}
    config_class = AttnResConfig if model_type == AttnResConfig.model_type else CONFIG_MAPPING[model_type]
    try:
        built = config_class.from_dict(fields)
        dtype = built.get_text_config().dtype
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: not a valid '{model_type}' config ({error}).") from error
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{where}: `dtype` must name a dtype, got {dtype!r}.")
    return built


def read_prenorm(checkpoint: Checkpoint, drop_keys: tuple[str, ...] = ()) -> Source:
    """A plain checkpoint of a backbone.

    Args:
        drop_keys: regular expressions of tensor names to leave out.
    """
    shards, dropped = without_dropped(checkpoint, drop_keys)
    config = build_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    return Source("prenorm", checkpoint, config.get_text_config(), shards, dropped=dropped)


def read_attnres(checkpoint: Checkpoint, drop_keys: tuple[str, ...] = ()) -> Source:
    """A checkpoint of this package."""
    shards, dropped = without_dropped(checkpoint, drop_keys)
    where = str(checkpoint.folder / "config.json")
    config = build_config(checkpoint.config, where)
    stored, due = checkpoint.tensors, depth_shapes(config, where)
    if missing := [name for name in due if name not in stored]:
        raise CheckpointError(f"{checkpoint.folder}: an AttnRes checkpoint without {', '.join(missing)}.")
    for name, shape in due.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: '{name}' must be {list(shape)} by the config, got {list(stored[name].shape)}."
            )
    depth = {name: stored[name].read() for name in due}
    shards = [[item for item in shard if item[0] not in due] for shard in shards]
    unread = _read_unread(checkpoint.folder / UNREAD_FILE)
    return Source("attnres", checkpoint, config.text_config, shards, config, depth, unread, dropped)


def _read_unread(file: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read() for tensor in read_header(file)} if file.is_file() else {}


def depth_shapes(config: AttnResConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the depth attention's parameters; the ablation forms have others than the method."""
    model = build_on_meta(config, where)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith(DEPTH_PREFIX)}


def without_dropped(checkpoint: Checkpoint, drop_keys: tuple[str, ...]):
    """The shards without the tensors that are to be left out, and the names of these.

    Raises:
        ConversionError: if what stays is quantised, or means something else without what is left out.
    """
    patterns = [re.compile(pattern) for pattern in drop_keys]
    dropped = [name for name in checkpoint.tensors if any(pattern.search(name) for pattern in patterns)]
    refuse_adapter_tensors(checkpoint)
    check_not_quantised(checkpoint, [name for name in checkpoint.tensors if name not in set(dropped)])
    check_droppable(checkpoint, dropped)
    shards = [
        [(tensor.name, tensor) for tensor in tensors if tensor.name not in set(dropped)]
        for tensors in checkpoint.shards.values()
    ]
    return shards, tuple(sorted(dropped))


def build_attnres_config(
    source: Source, num_blocks: int | None, sublayers_per_block: int | None, depth_weights: str | None
) -> AttnResConfig:
    """The result's config.

    Raises:
        ConversionError: if an argument is out of range, or a trained source would change its meaning.
    """
    try:
        if source.attnres is None:
            return AttnResConfig(
                text_config=source.text_config,
                num_blocks=num_blocks,
                sublayers_per_block=sublayers_per_block,
                depth_weights=depth_weights or "sum",
            )
        # All conventions of the source are the result's, also those that have no option here.
        config = copy.deepcopy(source.attnres)
        if num_blocks is not None:
            config.num_blocks = num_blocks
        if sublayers_per_block is not None:
            config.sublayers_per_block = sublayers_per_block
        if depth_weights is not None:
            config.depth_weights = depth_weights
        config.validate()
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(str(error)) from error
    return config


def check_backbone_tensors(source: Source, config: AttnResConfig) -> AttnResForCausalLM:
    """Has the library's own loader match the source's names and shapes with the model, on the meta device.

    Returns:
        The model that was built, without weights.

    Raises:
        UnsupportedBackboneError: if the backbone is not a PreNorm decoder of the supported form.
        CheckpointError: if a tensor is missing, unknown or of another shape than the config says.
    """
    # Refuse an unsupported backbone before looking at its tensors.
    due = depth_shapes(config, str(source.checkpoint.folder / "config.json"))
    stand_ins = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in source.tensors.items()
    }
    stand_ins.update((name, torch.empty(shape, device="meta")) for name, shape in due.items())
    try:
        with quiet_library():
            model, info = AttnResForCausalLM.from_pretrained(
                None,
                config=config,
                state_dict=stand_ins,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source.checkpoint.folder}: its tensors do not fit a '{source.text_config.model_type}' model ({error})."
        ) from error
    missing = sorted(info["missing_keys"])
    unknown = sorted(info["unexpected_keys"])
    refuse_scales(source.checkpoint.folder, unknown, [name for name in source.tensors if name not in unknown])
    problems = []
    if missing:
        problems.append(f"missing: {shorten(missing)}")
    if unknown:
        problems.append(f"unknown: {shorten(unknown)} (--drop-keys leaves out whole modules by name)")
    for name, found, due in sorted(info["mismatched_keys"])[:4]:
        problems.append(f"shape of {name}: {list(found)}, the config says {list(due)}")
    problems += list(info["error_msgs"])
    if problems:
        raise CheckpointError(f"{source.checkpoint.folder}: weights and config disagree. {'; '.join(problems)}.")
    return model


def build_on_meta(config: AttnResConfig, where: str) -> AttnResForCausalLM:
    """The model that a config describes, without memory for its weights.

    Raises:
        UnsupportedBackboneError: if the backbone is not a PreNorm decoder of the supported form.
        CheckpointError: if no model can be built from the config.
    """
    try:
        with torch.device("meta"):
            return AttnResForCausalLM(config)
    except UnsupportedBackboneError:
        raise
    except Exception as error:  # the library's constructors raise exceptions of any class on values without sense
        raise CheckpointError(
            f"{where}: not a valid '{config.text_config.model_type}' config, no model can be built from it "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
