# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint in Kimi K3's own format, with random weights, and what the official code computes for it in fp32.

Every size, name and convention is as in the released model: the multimodal model's prefix, `A_log` padded with zeros,
depth attention in blocks of 3 decoder layers.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_attnres import AttnResConfig, AttnResForCausalLM, KimiK3TextConfig


FOLDER = Path(__file__).parent / "fixtures" / "kimi-k3-tiny"


def published_fields() -> dict:
    """The checkpoint's `text_config` without what is not the backbone's."""
    fields = json.loads((FOLDER / "config.json").read_text())["text_config"]
    return {name: value for name, value in fields.items() if name not in ("model_type", "attn_res_block_size")}


def released_fields() -> dict:
    """The released model's `text_config`, as far as it describes the model."""
    full = [*range(4, 93, 4), 93]
    return {
        **{"num_hidden_layers": 93, "hidden_size": 7168, "intermediate_size": 33792, "vocab_size": 163840},
        **{"num_attention_heads": 96, "num_key_value_heads": 96, "q_lora_rank": 1536, "kv_lora_rank": 512},
        **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        **{"mla_use_nope": True, "mla_use_output_gate": True},
        **{"num_experts": 896, "num_experts_per_token": 16, "num_shared_experts": 2, "moe_intermediate_size": 3072},
        **{"routed_expert_hidden_size": 3584, "latent_moe_use_norm": True, "routed_scaling_factor": 1.0},
        **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1},
        **{"moe_router_activation_func": "sigmoid", "topk_method": "noaux_tc"},
        **{"moe_renormalize": True, "use_grouped_topk": True, "num_nextn_predict_layers": 0},
        **{"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0},
        **{"rms_norm_eps": 1e-5, "initializer_range": 0.02, "max_position_embeddings": 1048576},
        **{"bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839, "tie_word_embeddings": False},
        "linear_attn_config": {
            **{"num_heads": 96, "head_dim": 128, "short_conv_kernel_size": 4},
            **{"use_full_rank_gate": True, "gate_lower_bound": -5.0},
            "full_attn_layers": full,
            "kda_layers": [layer for layer in range(1, 94) if layer not in full],
        },
    }


def fixture_weights() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The backbone's tensors under their names in the file, and depth attention's queries and key norms `[L, D]`."""
    prefix = "language_model."
    stored = {name.removeprefix(prefix): value for name, value in load_file(FOLDER / "model.safetensors").items()}
    layers = range(published_fields()["num_hidden_layers"])
    mixes = [f"model.layers.{layer}.{part}" for layer in layers for part in ("self_attention_res", "mlp_res")]
    mixes.append("model.output_attn_res")
    pairs = [(stored.pop(f"{mix}_proj.weight")[0], stored.pop(f"{mix}_norm.weight")) for mix in mixes]
    queries, key_norms = zip(*pairs[1:])  # the first mix has one source
    return stored, torch.stack(queries), torch.stack(key_norms)


def fixture_model(**fields) -> AttnResForCausalLM:
    """The checkpoint as an AttnRes model, in evaluation mode; `fields` replace some of its config."""
    config = AttnResConfig(text_config=KimiK3TextConfig(**{**published_fields(), **fields}), sublayers_per_block=6)
    model = AttnResForCausalLM(config).eval()
    weights, queries, key_norms = fixture_weights()
    weights |= {"model.depth_attention.query": queries, "model.depth_attention.key_norm": key_norms}
    model.load_state_dict(weights)
    return model


def expected_logits() -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[2, T]`, `logits` of the first row, `padded_logits` of both rows."""
    return load_file(FOLDER / "expected.safetensors")
