# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of the backbones that must work: everything a real one has, at a size for a CPU."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM


NUM_LAYERS = 4
NUM_SUBLAYERS = 2 * NUM_LAYERS  # L
VOCAB_SIZE = 96

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Widths of experts are multiples of 16 bytes in every dtype: the grouped products want aligned rows.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.0,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 4},
    "smollm3": {},
    "mixtral": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "mlp_only_layers": [1], **_EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "deepseek_v3": {
        **_LATENT_ATTENTION,
        "q_lora_rank": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "qwen3_next": {
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 16,
        **_EXPERTS,
    },
    "kimi_linear": {
        **_LATENT_ATTENTION,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    },
    "kimi_k3_text": {
        **_LATENT_ATTENTION,
        **_EXPERTS,
        "q_lora_rank": 16,
        "mla_use_output_gate": True,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "linear_use_full_rank_gate": True,
        "linear_gate_lower_bound": -5.0,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "routed_expert_hidden_size": 16,
        "latent_moe_use_norm": True,
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
}
BACKBONES = tuple(_SPECIFIC)


def tiny_backbone(model_type: str, **overrides) -> PreTrainedConfig:
    """The backbone's config; `overrides` replace single fields."""
    return CONFIG_MAPPING[model_type](**{**_COMMON, **_SPECIFIC[model_type], **overrides})


def tiny_config(
    model_type: str = "llama",
    sublayers_per_block: int = 2,
    depth_weights: str = "mean",
    depth_attention_type: str = "softmax",
    **overrides,
):
    """An [`AttnResConfig`] around [`tiny_backbone`]."""
    return AttnResConfig(
        text_config=tiny_backbone(model_type, **overrides),
        sublayers_per_block=sublayers_per_block,
        depth_weights=depth_weights,
        depth_attention_type=depth_attention_type,
    )


def tiny_model(*args, model_class=AttnResForCausalLM, seed: int = 0, query_std: float = 0.5, **kwargs):
    """A model in evaluation mode of [`tiny_config`], whose queries and key norms are random, not at their start."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(*args, **kwargs)).eval()
    randomize_depth_attention(model, query_std)
    return model


def load_plain_weights(model, plain):
    """Gives an AttnRes model the weights of a plain one; all but depth attention have the same names."""
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("model.depth_attention.") for name in result.missing_keys)
    assert not result.unexpected_keys


@torch.no_grad()
def randomize_depth_attention(model, query_std: float = 0.5):
    """Queries of standard deviation `query_std`, key norms around 1: nothing cancels that should not."""
    for name, parameter in model.named_parameters():
        if name.endswith("depth_attention.query"):
            parameter.normal_(std=query_std)
        elif name.endswith("depth_attention.key_norm"):
            parameter.normal_(mean=1.0, std=0.2)


def tiny_inputs(batch: int = 2, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids `[batch, tokens]` without special tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(seed))
