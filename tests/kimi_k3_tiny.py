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
