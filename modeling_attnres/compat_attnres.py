# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported versions of Transformers, found by asking the library, never by its version."""

import dataclasses

import torch
from transformers import modeling_utils
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import MoeModelOutputWithPast


def _has_field(output_class: type, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(output_class)}


# The library's name for a KV cache: an argument of its models, layers and masks, and a field of its outputs.
CACHE = "cache" if _has_field(MoeModelOutputWithPast, "cache") else "past_key_values"


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The KV cache that a model was called with, under either of its names.

    Raises:
        ValueError: if it was given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give the KV cache as `cache` or as `past_key_values`, not as both: one would be ignored.")
    return past_key_values if cache is None else cache


def is_for_attention_alone(cache: object) -> bool:
    """Whether `cache` is that of continuous batching, where the library's layers hand it to attention as it came.

    Where `CACHE` is "past_key_values", `cache` is one more keyword of theirs. Where it is "cache", they are one.
    """
    return CACHE != "cache" and isinstance(cache, PagedAttentionCache)


def _slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last `logits_to_keep` positions of `[B, T, D]` (0 for all), or those that a tensor of indices names."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept, :]


slice_logits_to_keep = getattr(modeling_utils, "slice_logits_to_keep", _slice_logits_to_keep)


__all__ = ["CACHE", "given_cache", "is_for_attention_alone", "slice_logits_to_keep"]
