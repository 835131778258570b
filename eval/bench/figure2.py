# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The peer: depth attention as the paper's Figure 2 writes it, and as public code runs it.

Stack, norm, einsum, softmax and einsum again at every sublayer. It is kept apart from the model, on the stock layers of
the PreNorm base, so that it is both the cost to beat and an independent reference for the equality gate.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block, n sources of a mix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_attnres.compat_attnres import CACHE, given_cache


def figure2_mix(
    sources: Sequence[torch.Tensor], query: torch.Tensor, key_norm: torch.Tensor, eps: float, sums_to_n: bool = False
) -> torch.Tensor:
    """One mix over depth, Figure 2's `block_attn_res`.

    Args:
        sources: n tensors `[B, T, D]`.
        query, key_norm: `[D]`.
        sums_to_n: whether weights sum to n instead of 1.

    Returns:
        `[B, T, D]`.
    """
    values = torch.stack(tuple(sources))
    # The RMSNorm of the Llama family, upcast included, as Figure 2's `norm`.
    floats = values.float() if values.dtype != torch.float64 else values
    floats = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + eps)
    keys = key_norm * floats.to(values.dtype)
    weights = torch.einsum("d, n b t d -> n b t", query, keys).softmax(0)
    if sums_to_n:
        weights = weights * len(sources)
    return torch.einsum("n b t, n b t d -> b t d", weights, values)


def figure2_stack(
    embedding: torch.Tensor,
    sublayers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    query: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    sublayers_per_block: int,
    sums_to_n: bool = False,
) -> torch.Tensor:
    """A stack of sublayers under Figure 2, arguments as in `modeling_attnres.attention_residuals`.

    Returns:
        `[B, T, D]`: the output mix.
    """
    sources, hidden_states = [embedding], embedding
    for index, sublayer in enumerate(sublayers):
        if index > 0:
            hidden_states = figure2_mix(sources, query[index - 1], key_norm[index - 1], eps, sums_to_n)
        output = sublayer(hidden_states)
        if index % sublayers_per_block == 0:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output
    return figure2_mix(sources, query[-1], key_norm[-1], eps, sums_to_n)


class Figure2ForCausalLM(nn.Module):
    """Figure 2 over the layers of a stock Llama, which it shares with the base instead of owning a copy.

    Args:
        base: the PreNorm model.
        query, key_norm: `[L, D]`.
        eps: epsilon of the key RMSNorm.
        sublayers_per_block: S.
        sums_to_n: whether weights sum to n instead of 1.
    """

    def __init__(
        self,
        base: LlamaForCausalLM,
        query: nn.Parameter,
        key_norm: nn.Parameter,
        eps: float,
        sublayers_per_block: int,
        sums_to_n: bool = False,
    ):
        super().__init__()
        self.config = base.config
        self.base, self.query, self.key_norm = base, query, key_norm
        self.eps, self.sublayers_per_block, self.sums_to_n = eps, sublayers_per_block, sums_to_n

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        cache: DynamicCache | None = None,
    ) -> CausalLMOutputWithPast:
        model = self.base.model
        embedding = model.embed_tokens(input_ids)
        cache = given_cache(past_key_values, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.base.config)
        past = cache.get_seq_length() if cache is not None else 0
        position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past).unsqueeze(0)
        layer_kwargs = {
            "attention_mask": create_causal_mask(
                config=self.base.config,
                inputs_embeds=embedding,
                attention_mask=None,
                position_ids=position_ids,
                **{CACHE: cache},
            ),
            "position_ids": position_ids,
            "position_embeddings": model.rotary_emb(embedding, position_ids=position_ids),
            CACHE: cache,
        }
        sublayers = [part for layer in model.layers for part in _sublayers(layer, layer_kwargs)]
        mix = figure2_stack(
            embedding, sublayers, self.query, self.key_norm, self.eps, self.sublayers_per_block, self.sums_to_n
        )
        hidden_states = model.norm(mix)
        logits = self.base.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        loss = None
        if labels is not None:
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=self.base.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


def _sublayers(layer: nn.Module, layer_kwargs: dict) -> tuple[Callable, Callable]:
    return (
        lambda hidden_states: layer.self_attn(layer.input_layernorm(hidden_states), **layer_kwargs)[0],
        lambda hidden_states: layer.mlp(layer.post_attention_layernorm(hidden_states)),
    )
