# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi K3's files: every tensor that they must have, and what they have beyond the tensors of a text model.

A released folder holds a multimodal model. Its text model lies under `language_model.`, its vision parts are left out
here, and its routed experts are packed as MXFP4.

Letters: H heads of linear attention.
"""

import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checkpoint import Checkpoint, CheckpointError, PickledTensor, StoredTensor, shorten
from .mxfp4 import PackedTensor, check_mxfp4_config, pair_experts


OUTER_TYPE = "kimi_k3"  # the multimodal config around the text model's
KIMI_K3_TEXT, KIMI_LINEAR = "kimi_k3_text", "kimi_linear"  # the backbones that files in this naming become
PREFIX = "language_model."
VISION = ("vision_tower.", "mm_projector.")
QUANTISATION = "quantization_config"
_DECAY = "self_attn.A_log"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ReshapedTensor:
    """A stored tensor under another shape."""

    name: str
    stored: StoredTensor | PickledTensor
    shape: Shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    def read(self) -> torch.Tensor:
        return self.stored.read().view(self.shape)


# --- Beyond the text model -------------------------------------------------------------------------------------------


def unfold(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint without vision parts, with packed experts as the weights that they stand for.

    Which weights are packed is told by the tensors, not by the `ignore` list of the config.

    Returns:
        The checkpoint, and the names of the vision parts' tensors.

    Raises:
        CheckpointError: naming what is packed in another way, or not as the config says.
    """
    where = str(checkpoint.folder)
    config, quantisation = _without_quantisation(checkpoint.config, where)
    dropped = tuple(sorted(name for name in checkpoint.tensors if name.startswith(VISION)))
    text = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(VISION)}
    pairs = pair_experts(text.values(), where)
    if pairs and quantisation is None:
        raise CheckpointError(f"{where}: {len(pairs)} weights are packed, and no `{QUANTISATION}` says how.")
    if quantisation is not None:
        check_mxfp4_config(quantisation, where)
        if not pairs:
            raise CheckpointError(f"{where}: `{QUANTISATION}` says that weights are packed, and none is.")
    scales = {pair.scale.name for pair in pairs.values()}
    shards = {
        file: [
            pairs.get(tensor.name, tensor) for tensor in tensors if tensor.name in text and tensor.name not in scales
        ]
        for file, tensors in checkpoint.shards.items()
    }
    return Checkpoint(checkpoint.folder, config, shards), dropped


def _without_quantisation(config: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config without its `quantization_config`, of the text model or of the whole; and that, if there is one."""
    levels = [config]
    if isinstance(config.get("text_config"), dict):
        levels.append(config["text_config"])
    found = [level[QUANTISATION] for level in levels if level.get(QUANTISATION) is not None]
    if any(not isinstance(value, dict) or value != found[0] for value in found):
        raise CheckpointError(f"{where}: `{QUANTISATION}` must be one object, got {found!r:.200}.")
    outer, *inner = [{name: value for name, value in level.items() if name != QUANTISATION} for level in levels]
    return ({**outer, "text_config": inner[0]} if inner else outer), (found[0] if found else None)


def num_decoded(tensors: Mapping[str, Any]) -> int:
    """How many of a source's tensors are decoded when they are read."""
    return sum(isinstance(tensor, PackedTensor) for tensor in tensors.values())


# --- The text model --------------------------------------------------------------------------------------------------


def backbone_shapes(config: PreTrainedConfig) -> dict[str, Shape]:
    """Names and shapes of the text model's tensors in Kimi K3's files, without `language_model.` and depth attention.

    `A_log` has one number per head here, `[H]`; [`fit`] says what else is taken.
    """
    width = config.hidden_size
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for index, (mixer, feed_forward) in enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True)):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = _latent_attention(config) if mixer == "full_attention" else _delta_attention(config)
        shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in attention}
        if feed_forward == "dense":
            shapes |= {f"{layer}.mlp.{name}": shape for name, shape in _mlp(width, config.intermediate_size)}
        else:
            shapes |= {f"{layer}.block_sparse_moe.{name}": shape for name, shape in _experts(config)}
    return shapes


def _delta_attention(config: PreTrainedConfig) -> Iterator[tuple[str, Shape]]:
    width, heads, head = config.hidden_size, config.linear_num_heads, config.linear_head_dim
    inner = heads * head
    for part in "qkv":
        yield f"{part}_proj.weight", (inner, width)
        yield f"{part}_conv1d.weight", (inner, 1, config.linear_conv_kernel_dim)
    yield from {"A_log": (heads,), "dt_bias": (inner,), "o_norm.weight": (head,)}.items()
    yield from {"f_a_proj.weight": (head, width), "f_b_proj.weight": (inner, head)}.items()
    yield from {"b_proj.weight": (heads, width), "o_proj.weight": (width, inner)}.items()
    if getattr(config, "linear_use_full_rank_gate", False):
        yield "g_proj.weight", (inner, width)
    else:
        yield from {"g_a_proj.weight": (head, width), "g_b_proj.weight": (inner, head)}.items()


def _latent_attention(config: PreTrainedConfig) -> Iterator[tuple[str, Shape]]:
    width, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    values = heads * config.v_head_dim
    if config.q_lora_rank is None:
        yield "q_proj.weight", (query, width)
    else:
        yield "q_a_proj.weight", (config.q_lora_rank, width)
        yield "q_a_layernorm.weight", (config.q_lora_rank,)
        yield "q_b_proj.weight", (query, config.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, width)
    yield "kv_a_layernorm.weight", (latent,)
    yield "kv_b_proj.weight", (heads * config.qk_nope_head_dim + values, latent)
    if getattr(config, "mla_use_output_gate", False):
        yield "g_proj.weight", (values, width)
    yield "o_proj.weight", (width, values)


def _mlp(width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield from {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width)}.items()
    yield "down_proj.weight", (width, inner)


def _experts(config: PreTrainedConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_local_experts
    yield from {"gate.weight": (count, width), "gate.e_score_correction_bias": (count,)}.items()
    latent = getattr(config, "routed_expert_hidden_size", None)
    if latent is not None:
        yield "routed_expert_down_proj.weight", (latent, width)
        yield "routed_expert_up_proj.weight", (width, latent)
        if config.latent_moe_use_norm:
            yield "routed_expert_norm.weight", (latent,)
    if config.n_shared_experts:
        for name, shape in _mlp(width, config.n_shared_experts * inner):
            yield f"shared_experts.{name}", shape
    read = width if latent is None else latent
    for expert in range(count):
        yield from {f"experts.{expert}.{part}.weight": (inner, read) for part in ("w1", "w3")}.items()
        yield f"experts.{expert}.w2.weight", (read, inner)


def fit(stored: Mapping[str, Any], config: PreTrainedConfig, prefix: str, where: str) -> dict[str, Any]:
    """The text model's tensors in the shapes that the model loads.

    `A_log` may have zeros behind the heads' numbers, as it has in the released files, and axes of length 1. Kernels of
    convolutions may come without their axis of length 1.

    Args:
        stored: by name, without `prefix` and without depth attention.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape, as they are in the files.
    """
    due = backbone_shapes(config)
    if config.model_type == KIMI_LINEAR:
        due = {_as_transformers_writes(name, stored): shape for name, shape in due.items()}
    problems = [
        f"{what}: {shorten(f'{prefix}{name}' for name in names)}"
        for what, names in (
            ("missing", [name for name in due if name not in stored]),
            ("unknown", [name for name in stored if name not in due]),
        )
        if names
    ]
    fitted = {name: _fit_one(name, stored[name], shape) for name, shape in due.items() if name in stored}
    problems += [
        f"shape of {prefix}{name}: {list(stored[name].shape)}, the config says {list(due[name])}"
        for name, tensor in fitted.items()
        if tensor is None
    ][:8]
    if problems:
        raise CheckpointError(f"{where}: weights and config disagree. {'; '.join(problems)}.")
    for name, tensor in fitted.items():
        if name.endswith(_DECAY) and tensor.read().flatten()[due[name][0] :].view(torch.uint8).any():
            raise CheckpointError(
                f"{where}: '{prefix}{name}' must have zeros after its {due[name][0]} heads, got other values: they "
                "would have no meaning."
            )
    return fitted


def _as_transformers_writes(name: str, stored: Container[str]) -> str:
    """Transformers calls the feed-forward of every kimi_linear layer `block_sparse_moe`, also where it has no experts."""
    written = name.replace(".mlp.", ".block_sparse_moe.")
    return name if name in stored or written not in stored else written


def _fit_one(name: str, tensor: Any, due: Shape) -> Any | None:
    """The tensor in a shape that the model loads, or `None` if it has none."""
    if name.endswith(_DECAY):
        rest = [size for size in tensor.shape if size != 1] or [1]
        return tensor if len(rest) == 1 and rest[0] >= due[0] else None
    if tensor.shape == due:
        return tensor
    if name.endswith("_conv1d.weight") and tensor.shape == (due[0], due[2]):
        return ReshapedTensor(tensor.name, tensor, due)
    return None
