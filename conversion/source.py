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
"""What a checkpoint folder holds, in one form whatever it came as: backbone tensors under the library's names, depth
queries and key norms as two matrices, and the conventions they were trained with.

Letters: L sublayers (two per decoder layer), D hidden size, S sublayers per block.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from modeling_attnres import AttnResConfig, AttnResForCausalLM, UnsupportedBackboneError

from .checkpoint import Checkpoint, CheckpointError, ConversionError, PickledTensor, StoredTensor, shorten


DEPTH_QUERY, DEPTH_KEY_NORM = "model.depth_attention.query", "model.depth_attention.key_norm"


@dataclass(frozen=True)
class Source:
    """A checkpoint in the form that everything is converted from.

    Attributes:
        kind: `"prenorm"`, `"attnres"`, or the name of a dialect.
        text_config: config of the backbone.
        shards: per weight file, the backbone's tensors as `(name in the library's layout, stored tensor)`.
        attnres: the conventions of the depth attention, or `None` for a PreNorm model.
        query, key_norm: `[L, D]` (see [`modeling_attnres.AttnResConfig`] for the rows), or `None`.
        dropped: names of stored tensors that the result leaves out, on request or because nothing ever reads them.
    """

    kind: str
    checkpoint: Checkpoint
    text_config: PreTrainedConfig
    shards: list[list[tuple[str, StoredTensor | PickledTensor]]]
    attnres: AttnResConfig | None = None
    query: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    dropped: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, StoredTensor | PickledTensor]:
        return {name: tensor for shard in self.shards for name, tensor in shard}

    @property
    def queries_are_zero(self) -> bool:
        return self.query is None or not self.query.any()


def build_config(config: dict[str, Any], where: str) -> PreTrainedConfig:
    """The library's config object for a `config.json`.

    Raises:
        CheckpointError: if its model type is unknown to the installed Transformers or a field has a wrong value.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*CONFIG_MAPPING, AttnResConfig.model_type}:
        raise CheckpointError(f"{where}: model_type {model_type!r} is unknown to the installed Transformers.")
    # Code that came with the source is neither run nor carried along: the library's own class takes its place.
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
    config = build_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    check_not_quantised(checkpoint)
    shards, dropped = without_dropped(checkpoint, drop_keys)
    return Source("prenorm", checkpoint, config.get_text_config(), shards, dropped=dropped)


def read_attnres(checkpoint: Checkpoint, drop_keys: tuple[str, ...] = ()) -> Source:
    """A checkpoint of this package."""
    check_not_quantised(checkpoint)
    config = build_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    shards, dropped = without_dropped(checkpoint, drop_keys)
    stored = checkpoint.tensors
    missing = [name for name in (DEPTH_QUERY, DEPTH_KEY_NORM) if name not in stored]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: an AttnRes checkpoint without {', '.join(missing)}.")
    due = (config.num_sublayers, config.text_config.hidden_size)
    for name in (DEPTH_QUERY, DEPTH_KEY_NORM):
        if stored[name].shape != due:
            raise CheckpointError(
                f"{checkpoint.folder}: '{name}' must be {list(due)} by the config, got {list(stored[name].shape)}."
            )
    query, key_norm = stored[DEPTH_QUERY].read(), stored[DEPTH_KEY_NORM].read()
    shards = [[item for item in shard if item[0] not in (DEPTH_QUERY, DEPTH_KEY_NORM)] for shard in shards]
    return Source("attnres", checkpoint, config.text_config, shards, config, query, key_norm, dropped)


def without_dropped(checkpoint: Checkpoint, drop_keys: tuple[str, ...]):
    patterns = [re.compile(pattern) for pattern in drop_keys]
    dropped = [name for name in checkpoint.tensors if any(pattern.search(name) for pattern in patterns)]
    shards = [
        [(tensor.name, tensor) for tensor in tensors if tensor.name not in set(dropped)]
        for tensors in checkpoint.shards.values()
    ]
    return shards, tuple(sorted(dropped))


def check_not_quantised(checkpoint: Checkpoint):
    """Raises `ConversionError` unless all weights are plain floating-point numbers."""
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        quantization = (checkpoint.config.get("text_config") or {}).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConversionError(
            f"{checkpoint.folder}: quantised weights ({method}) cannot be converted; save the model dequantised first."
        )
    odd = [tensor.name for tensor in checkpoint.tensors.values() if not tensor.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(odd)} tensors are not floating point: {shorten(odd)} "
            f"('{odd[0]}' is {checkpoint.tensors[odd[0]].dtype})."
        )


def build_attnres_config(
    source: Source, num_blocks: int | None, sublayers_per_block: int | None, depth_weights: str | None
) -> AttnResConfig:
    """The result's config.

    Raises:
        ConversionError: if an argument is out of range, or a trained source would change its meaning.
    """
    fields: dict[str, Any] = {"text_config": source.text_config, "depth_weights": depth_weights or "sum"}
    if source.attnres is not None:
        fields.update(
            depth_weights=depth_weights or source.attnres.depth_weights,
            depth_norm_eps=source.attnres.depth_norm_eps,
            depth_query_init_std=source.attnres.depth_query_init_std,
        )
        if num_blocks is None and sublayers_per_block is None:
            sublayers_per_block = source.attnres.sublayers_per_block
    try:
        return AttnResConfig(num_blocks=num_blocks, sublayers_per_block=sublayers_per_block, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(str(error)) from error


def check_backbone_tensors(source: Source, config: AttnResConfig) -> AttnResForCausalLM:
    """Has the library's own loader match the source's names and shapes with the model, on the meta device.

    Returns:
        The model that was built, without weights.

    Raises:
        UnsupportedBackboneError: if the backbone is not a PreNorm decoder of the supported form.
        CheckpointError: if a tensor is missing, unknown or of another shape than the config says.
    """
    _check_builds(source, config)  # a backbone that is refused is refused before its tensors are
    stand_ins = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in source.tensors.items()
    }
    depth_shape = (config.num_sublayers, config.text_config.hidden_size)
    stand_ins.update((name, torch.empty(depth_shape, device="meta")) for name in (DEPTH_QUERY, DEPTH_KEY_NORM))
    try:
        with _quiet_library():
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
    missing = sorted(_plain(name) for name in info["missing_keys"])
    unknown = sorted(_plain(name) for name in info["unexpected_keys"])
    problems = []
    if missing:
        problems.append(f"missing: {shorten(missing)}")
    if unknown:
        problems.append(f"unknown: {shorten(unknown)} (--drop-keys leaves named ones out)")
    for name, found, due in sorted(info["mismatched_keys"])[:4]:
        problems.append(f"shape of {_plain(name)}: {list(found)}, the config says {list(due)}")
    problems += list(info["error_msgs"])
    if problems:
        raise CheckpointError(f"{source.checkpoint.folder}: weights and config disagree. {'; '.join(problems)}.")
    return model


def _check_builds(source: Source, config: AttnResConfig):
    try:
        with torch.device("meta"):
            AttnResForCausalLM(config)
    except UnsupportedBackboneError:
        raise
    except Exception as error:  # on values that make no sense the library's constructors raise whatever they meet
        raise CheckpointError(
            f"{source.checkpoint.folder / 'config.json'}: not a valid '{source.text_config.model_type}' config, no model "
            f"can be built from it ({type(error).__name__}: {error})."
        ) from error


@contextmanager
def _quiet_library() -> Iterator[None]:
    """No load report, whose findings become the error, and no progress bar of loading nothing."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _plain(name: str) -> str:
    """The name that a tensor has on disk (up to the library's own rearrangements)."""
    return name.replace("model.backbone.", "model.", 1)
