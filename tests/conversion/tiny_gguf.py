# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files, written from a plain llama or qwen2 checkpoint."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_checkpoints import weights


LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.split(".", maxsplit=3)
    return f"blk.{layer}.{LAYER_NAMES[part]}"


def llama_cpp_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows that llama.cpp keeps llama's queries and keys in, for its kind of rotary embedding."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def save_gguf(
    source: Path,
    file: Path,
    *,
    without: tuple[str, ...] = (),
    beside: dict[str, np.ndarray] | None = None,
    replaced: dict[str, np.ndarray] | None = None,
    tensors_per_file: int = 0,
    quantise: bool = False,
    metadata=lambda writer: None,
) -> Path:
    """Writes `source` as a GGUF file.

    Args:
        without, beside, replaced: tensors to leave out, further ones and others, by their GGUF names.
        tensors_per_file: splits the file.
        quantise: whether matrices are stored in Q8_0.
        metadata: gets the writer, to add fields.
    """
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), config["model_type"], split_max_tensors=tensors_per_file)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    metadata(writer)
    if (source / "tokenizer.json").exists():
        _add_tokenizer(writer, source, config["vocab_size"])
    arrays = dict(beside or {})
    for name, tensor in weights(source).items():
        rows = {"q_proj.weight": heads, "k_proj.weight": kv_heads}.get(name.partition("self_attn.")[2])
        if rows is not None and config["model_type"] == "llama":
            tensor = llama_cpp_rows(tensor, rows)
        arrays[gguf_name(name)] = tensor.float().contiguous().numpy()
    for name, array in (arrays | (replaced or {})).items():
        if name in without:
            continue
        if quantise and array.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab_size: int):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokens = [f"<unused{index}>" for index in range(vocab_size)]
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index] = token
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index < 3 else gguf.TokenType.NORMAL for index in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
