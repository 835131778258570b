# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear 48B-A3B's public layout at a size for a CPU: its own config fields, names and shapes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_checkpoints import weights
from transformers import AutoConfig, AutoModelForCausalLM


NUM_LAYERS, HEADS = 27, 32
FULL = [4, 8, 12, 16, 20, 24, 27]
# The published config, with smaller widths.
PUBLISHED = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "kda_layers": [layer for layer in range(1, NUM_LAYERS + 1) if layer not in FULL],
        "head_dim": 4,
        "num_heads": HEADS,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1024,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 4,
    "num_expert_group": 1,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.56.1",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 8,
    "vocab_size": 96,
}


def save_published(folder: Path):
    """A checkpoint in that layout, with what the official code keeps in fp32 in fp32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in weights(folder).items():
        if "layers.0." in name:  # the library's word for every feed-forward; published files have it for experts alone
            name = name.replace(".block_sparse_moe.", ".mlp.")
        in_fp32 = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        random = torch.randn(tensor.shape, generator=generator) * 0.1 + ("norm" in name)
        tensors[name] = random if in_fp32 else random.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLISHED))  # as published, not as the library writes it
