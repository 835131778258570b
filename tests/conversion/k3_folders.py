# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Folders in Kimi K3's own layout: the tiny one with the official code's numbers, and random ones of other kinds."""

import json
import shutil
from pathlib import Path

import torch
from kimi_k3_tiny import FOLDER
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_attnres import KimiK3TextConfig


PREFIX = "language_model."
K3_NAMES, K3_OUTPUT = ("self_attention_res", "mlp_res"), "output_attn_res"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# As the released config has them, beside what the text config says.
OUTER = {
    "architectures": ["KimiK3ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_kimi_k3.KimiK3Config"},
    "model_type": "kimi_k3",
    "ignore_index": -100,
    "image_placeholder": "<|kimi_image_placeholder|>",
    "media_placeholder_token_id": 5,
    "vision_config": {"vt_hidden_size": 8, "patch_size": 14},
}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "format": "mxfp4-pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "scale_dtype": "torch.uint8",
                "zp_dtype": None,
                "observer": "minmax",
            },
        }
    },
    # The released list, which names neither the latent's projections nor depth attention.
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
    ],
}


def copy_fixture(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copyfile(FOLDER / name, folder / name)
    return folder


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, text: dict | None = None, linear: dict | None = None, **outer):
    """Sets fields of the multimodal config, of its `text_config`, and of that one's `linear_attn_config`."""
    config = read_config(folder)
    config |= outer
    config["text_config"] |= text or {}
    if linear:
        config["text_config"]["linear_attn_config"] |= linear
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: torch.Tensor | None):
    """Sets tensors by their names; `None` removes one."""
    tensors = {**load_file(folder / SINGLE), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)


def split(folder: Path, shards: int = 3):
    """Spreads the tensors over several files with an index, neighbours apart."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_folder(folder: Path, block: int | None, nested: bool = True, **fields) -> tuple[PreTrainedModel, dict]:
    """A folder of another kind of Kimi K3, as its text config's fields say.

    Returns:
        The backbone as a PreNorm model, and depth attention's tensors by their names without prefix.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KimiK3TextConfig(**fields)).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data.normal_(mean=float(name.endswith("norm.weight")), std=0.1)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    mixes = [f"layers.{layer}.{name}" for layer in range(layers) for name in K3_NAMES] + [K3_OUTPUT]
    mixes = mixes if block else []
    depth = {f"model.{mix}_proj.weight": torch.randn(1, width, generator=generator) for mix in mixes}
    depth |= {f"model.{mix}_norm.weight": 1 + 0.2 * torch.randn(width, generator=generator) for mix in mixes}
    stored = load_file(folder / SINGLE) | depth
    text = {"model_type": "kimi_linear", "attn_res_block_size": block, "dtype": "float32", **fields}
    if nested:
        stored = {PREFIX + name: tensor for name, tensor in stored.items()}
        text = {**OUTER, "text_config": text}
    save_file(stored, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(text))
    return model, depth


# --- Kinds -----------------------------------------------------------------------------------------------------------

# What all text models of Kimi K3's kind say, at a size for a CPU.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "hidden_act": "situ",
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "routed_expert_hidden_size": 16,
    "latent_moe_use_norm": True,
    "first_k_dense_replace": 1,
}


def layers(number: int, full: list[int], **fields) -> dict:
    """`num_hidden_layers` and `linear_attn_config`, with the layers of full attention counted from 1."""
    linear = {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4, "use_full_rank_gate": True, **fields}
    kda = [layer for layer in range(1, number + 1) if layer not in full]
    return {"num_hidden_layers": number, "linear_attn_config": {"full_attn_layers": full, "kda_layers": kda, **linear}}


KINDS = {
    # As the small public checkpoints are, by their configs.
    "no lower bound": (4, {**TINY, **EXPERTS, **layers(8, [4, 8])}),
    "dense and tied": (4, {**TINY, **layers(4, [4]), "tie_word_embeddings": True}),
    "more layers and experts": (12, {**TINY, **EXPERTS, **layers(17, [4, 8, 12, 16, 17], gate_lower_bound=-5.0)}),
    # And what else a config can say.
    "low-rank gate, no latent": (
        1,
        {
            **TINY,
            **layers(3, [3], use_full_rank_gate=False),
            **EXPERTS,
            **{"routed_expert_hidden_size": None, "latent_moe_use_norm": False, "num_shared_experts": 0},
        },
    ),
    "plain queries, SwiGLU": (
        2,
        {
            **TINY,
            **layers(4, [2, 4]),
            **{"q_lora_rank": None, "hidden_act": "silu", "mla_use_output_gate": False},
            **{"activation_situ_beta": None, "activation_situ_linear_beta": None},
        },
    ),
    "experts in every second layer": (3, {**TINY, **EXPERTS, **layers(6, [6]), "moe_layer_freq": 2}),
}


# --- MXFP4 -----------------------------------------------------------------------------------------------------------

CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest MXFP4 weight: packed codes, scale bytes, and the values that they stand for in bf16."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1, keepdim=True).log2().floor() - 2  # the largest code is 1.5 * 2^2
    scaled = groups / torch.exp2(exponent)
    codes = (scaled.abs().unsqueeze(-1) - CODES).abs().argmin(-1)
    values = (CODES[codes].copysign(scaled) * torch.exp2(exponent)).flatten(-2)
    codes = (codes + 8 * scaled.signbit()).flatten(-2).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponent + 127).flatten(-2).to(torch.uint8), values.bfloat16()


def pack_experts(folder: Path, plain: Path):
    """Packs a folder's routed experts in place; `plain` becomes a copy of it whose experts have the values in bf16."""
    shutil.copytree(folder, plain)
    tensors = load_file(folder / SINGLE)
    packed, unpacked = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            packed[name] = unpacked[name] = tensor
            continue
        codes, scales, unpacked[name] = pack(tensor)
        packed |= {f"{name}_packed": codes.contiguous(), f"{name}_scale": scales.contiguous()}
    save_file(packed, folder / SINGLE)
    save_file(unpacked, plain / SINGLE)
    edit_config(folder, text={"quantization_config": QUANTISATION})
