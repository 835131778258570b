# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes: the weight files, config and code of its target."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.modeling_attnres import auto_map
from modeling_attnres.state_dict_attnres import names_in_memory

from .checkpoint import ConversionError, PickledTensor, StoredTensor
from .dialects import DIALECTS, dialect_config, dialect_depth_tensors, to_dialect_names
from .source import DEPTH_KEY_NORM, DEPTH_QUERY, UNREAD_FILE, Source
from .writer import OutputShard, OutputTensor, write_safetensors


ATTNRES, PRENORM = "attnres", "prenorm"
TARGETS = (ATTNRES, PRENORM, *DIALECTS)
# A file is split where decoding makes it larger than this: the Hub takes files of up to 50 GB.
MAX_SHARD_BYTES = 40_000_000_000


def check_target(source: Source, to: str, config: AttnResConfig):
    """Checks that the source can become `to` without losing anything.

    Raises:
        ConversionError: with the reason, if it cannot.
    """
    if to == PRENORM:
        if source.attnres is None:
            raise ConversionError("`to='prenorm'` takes an AttnRes checkpoint, the source is a PreNorm model already.")
        if source.is_variant:
            raise ConversionError(
                "Only a model with softmax mixes has a PreNorm model that computes the same; this one's "
                f"`depth_attention_type` is {source.attnres.depth_attention_type!r}."
            )
        if not source.queries_are_zero:
            query = source.depth[DEPTH_QUERY]
            trained = int(query.any(dim=-1).sum())
            raise ConversionError(
                f"A PreNorm model has no place for trained queries: {trained} of {len(query)} are not zero (the "
                f"largest entry is {query.abs().max():.3g}), and what they learned would be lost."
            )
        if source.attnres.depth_weights != "sum":
            raise ConversionError(
                "Only a model with `depth_weights='sum'` computes exactly what its PreNorm backbone does; this one's "
                f"is {source.attnres.depth_weights!r}."
            )
    elif to in DIALECTS:
        if source.attnres is None:
            raise ConversionError(f"`to={to!r}` takes an AttnRes checkpoint; convert the PreNorm model first.")
        dialect_config(source, DIALECTS[to])
    elif source.attnres is not None and not source.queries_are_zero:
        for name in ("sublayers_per_block", "depth_weights"):
            before, after = getattr(source.attnres, name), getattr(config, name)
            if before != after and source.is_variant:
                raise ConversionError(
                    f"`{name}` cannot change from {before!r} to {after!r} in a model whose `depth_attention_type` is "
                    f"{config.depth_attention_type!r}: its mixes were trained for these sources."
                )
            if before != after:
                raise ConversionError(
                    f"`{name}` cannot change from {before!r} to {after!r}: the queries are trained, and they were "
                    "trained for these sources. Only a model whose queries are all zero can be re-blocked."
                )


def plan_weights(
    source: Source, to: str, model: AttnResForCausalLM, dtype: torch.dtype | None
) -> tuple[list[OutputShard], torch.dtype]:
    """The weight files of the result: the source's, and one more with the depth tensors where the target has them.

    Args:
        model: the result's model, on the meta device.
        dtype: to cast the weights to, `None` to keep theirs.

    Returns:
        The files and the dtype of the model.
    """
    sizes = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.num_bytes
    stored = source.text_config.dtype if source.text_config.dtype in sizes else sizes.most_common(1)[0][0]
    kept_in_fp32 = _kept_in_fp32(model, source.tensors)
    names = {name: name for name in source.tensors}
    if to in DIALECTS:
        names = to_dialect_names(DIALECTS[to], names, source.text_config)

    shards = []
    for (file, before), after in zip(source.checkpoint.shards.items(), source.shards, strict=True):
        tensors = [_output_tensor(names[name], name, tensor, dtype, kept_in_fp32) for name, tensor in after]
        unchanged = len(before) == len(after) and all(
            isinstance(tensor, StoredTensor) and (tensor.name, tensor.dtype) == (output.name, output.dtype)
            for (_, tensor), output in zip(after, tensors)
        )
        if unchanged and tensors:
            shards.append(OutputShard(tensors, copy_of=file))
        else:
            shards += [OutputShard(part) for part in _parts(tensors, MAX_SHARD_BYTES)]
    depth = [] if to == PRENORM else _depth_tensors(source, to, model.config, dtype or stored)
    if dtype is not None:
        depth = [(name, value.to(dtype)) for name, value in depth]
    if depth:
        shards.append(
            OutputShard(
                [OutputTensor(name, value.dtype, tuple(value.shape), _constant(value)) for name, value in depth]
            )
        )
    return shards, dtype or stored


def _parts(tensors: list[OutputTensor], max_bytes: int) -> Iterator[list[OutputTensor]]:
    """The tensors in runs of at most `max_bytes`; a larger tensor is a run of its own."""
    part, size = [], 0
    for tensor in tensors:
        if part and size + tensor.num_bytes > max_bytes:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.num_bytes
    if part:
        yield part


def _depth_tensors(source: Source, to: str, config: AttnResConfig, dtype: torch.dtype):
    if to in DIALECTS:
        return dialect_depth_tensors(source, DIALECTS[to])
    if source.attnres is not None:
        return list(source.depth.items())
    shape = (config.num_sublayers, config.text_config.hidden_size)
    return [(DEPTH_QUERY, torch.zeros(shape, dtype=dtype)), (DEPTH_KEY_NORM, torch.ones(shape, dtype=dtype))]


def _output_tensor(
    new_name: str, name: str, tensor: StoredTensor | PickledTensor, dtype: torch.dtype | None, kept_in_fp32: set[str]
) -> OutputTensor:
    if dtype is None or tensor.dtype == dtype or name in kept_in_fp32:
        return OutputTensor(new_name, tensor.dtype, tensor.shape, tensor.read)
    return OutputTensor(new_name, dtype, tensor.shape, lambda: tensor.read().to(dtype))


def _constant(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def write_unread(result: Path, source: Source, dtype: torch.dtype | None):
    """Writes what the source stores and no model reads, so that it can be written back.

    Args:
        dtype: to cast it to, as the weights are.
    """
    if source.unread:
        cast = {name: value if dtype is None else value.to(dtype) for name, value in source.unread.items()}
        (result / UNREAD_FILE).parent.mkdir()
        write_safetensors(
            result / UNREAD_FILE,
            [OutputTensor(name, value.dtype, tuple(value.shape), _constant(value)) for name, value in cast.items()],
        )


def _kept_in_fp32(model: AttnResForCausalLM, names: Iterable[str]) -> set[str]:
    """The names, as they are in files, of tensors that the backbone keeps in fp32 whatever the model's dtype."""
    backbone = model.model
    groups = [backbone._keep_in_fp32_modules, backbone._keep_in_fp32_modules_strict]
    kept = {name for group in groups if group for name in group}
    return {name for name, own in names_in_memory(model, names).items() if kept & set(own.split("."))}


# --- Everything but the weights --------------------------------------------------------------------------------------


def write_config(
    result: Path, source: Source, to: str, config: AttnResConfig, model: AttnResForCausalLM, dtype: torch.dtype | None
):
    """Writes `config.json`; for an AttnRes model also its code, so that the folder loads without this package.

    Args:
        dtype: that the weights were cast to, if they were.
    """
    if dtype is not None:
        config.text_config.dtype = source.text_config.dtype = dtype
    if to == PRENORM:
        source.text_config.save_pretrained(result)
    elif to in DIALECTS:
        fields = dialect_config(source, DIALECTS[to])
        (result / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        config.architectures = [type(model).__name__]
        custom_object_save(model, result, config=config)
        config.auto_map |= auto_map(type(model))
        config.save_pretrained(result)
