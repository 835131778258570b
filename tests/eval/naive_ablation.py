# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Gates on depth connections by brute force: the plain model's own parts called by hand, with naive mixes."""

import functools

import torch
import torch.nn.functional as F
from test_modeling_attnres_naive import naive_logits, plain_model

from modeling_attnres import naive_depth_attention


def naive_gated_mix(reader, sources, query, key_norm, eps, depth_weights, *, gates, ablate):
    """A mix `[B, T, D]` with gates by (sublayer, source)."""
    mix, weights = naive_depth_attention(sources, query, key_norm, eps, depth_weights)
    own = torch.tensor([gates.get((reader, source), 1.0) for source in range(len(sources))], dtype=weights.dtype)
    if (own == 1).all():
        return mix
    if ablate == "plain":
        weights = own * weights + (1 - own)
    else:
        weights = own * weights
        weights = weights / weights.sum(-1, keepdim=True) * (own.sum() if depth_weights == "sum" else 1)
    return (weights.movedim(-1, 0).unsqueeze(-1) * sources).sum(0)


def naive_gated_logits(model, gates, ids, attention_mask=None, ablate="remove", plain=None):
    """Logits `[B, T, V]`, one full forward; `plain` is the library's model with the same weights."""
    plain = plain_model(model).to(model.dtype) if plain is None else plain
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    mix = functools.partial(naive_gated_mix, gates=gates, ablate=ablate)
    return naive_logits(model, plain, ids, mask, mix)


def next_token_loss(logits, ids):
    """Mean nats per predicted token; in fp64, for differences of it are compared."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
